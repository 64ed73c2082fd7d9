"""cclip-deploy: from a CausalCLIPSeg checkpoint to an engine that is proved equal to it."""

__version__ = "0.1.0"
