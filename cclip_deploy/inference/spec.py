"""What a segmenter must know of a network, read from a bundle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cclip_deploy.bundle.bundle import CHAIN, TOKENIZER, Bundle
from cclip_deploy.errors import BundleError, UsageError
from cclip_deploy.imaging.preprocess import Preprocessing
from cclip_deploy.inference.prompt_cache import KernelOrigin
from cclip_deploy.prompts.tokenizer import PromptTokenizer
from cclip_deploy.runtime.backend import Backend
from cclip_deploy.runtime.tensorrt.runner import TensorRtBackend


@dataclass(frozen=True)
class SegmenterSpec:
    """How a network's inputs are prepared and its outputs are read.

    Attributes:
        name: the bundle or checkpoint, for messages.
        image_hw: height and width of the network's input.
        prompt_length: number of tokens in a prompt.
        preprocessing: resizing and normalization of images.
        tokenizer: splits prompts into tokens.
        vocabulary_size: of the network; token ids are smaller.
        threshold: probability from which a pixel is part of the mask.
        graphs: precision of each graph, if there are graphs.
    """

    name: str
    image_hw: tuple[int, int]
    prompt_length: int
    preprocessing: Preprocessing
    tokenizer: PromptTokenizer
    vocabulary_size: int
    threshold: float
    graphs: Mapping[str, str] = field(default_factory=dict)


def bundle_spec(bundle: Bundle, backend: Backend) -> SegmenterSpec:
    """Return the spec of a bundle, after checking that the backend can segment with it.

    Raises:
        UsageError: the bundle was exported with --plain, lacks a graph or engine of the backend's precision, or is not
            the one that the backend was opened with.
        BundleError: the tokenizer has more tokens than the network.
    """
    manifest = bundle.manifest
    if manifest.form != "deploy":
        raise UsageError(
            f"{bundle.path} was exported with --plain, as a reference for benchmarks. Export it without --plain."
        )
    if getattr(backend, "bundle", bundle).identity != bundle.identity:
        raise UsageError(f"The backend was opened with another bundle than {bundle.path}. Open both from one Bundle.")
    graphs = chain_precisions(backend, bundle)
    tokenizer = bundle.tokenizer()
    tokens = tokenizer.vocabulary_size
    vocabulary_size = manifest.model.get("vocabulary_size", tokens)
    if not isinstance(vocabulary_size, int) or vocabulary_size < tokens:
        raise BundleError(
            f"{bundle.path} has a tokenizer of {tokens} tokens and a network of {vocabulary_size}. Export the bundle "
            "again."
        )
    return SegmenterSpec(
        str(bundle.path), manifest.image_hw, manifest.prompt_length, manifest.preprocessing, tokenizer,
        vocabulary_size, manifest.threshold, graphs,
    )  # fmt: skip


def chain_precisions(backend: Backend, bundle: Bundle) -> dict[str, str]:
    """Return the precision of each graph that segments on a backend.

    Raises:
        UsageError: the bundle lacks one of the graphs or engines; the message names the command that builds it.
    """
    if isinstance(backend, TensorRtBackend):
        return {graph: backend.entry(graph).precision for graph in CHAIN}
    return {graph: entry.precision for graph, entry in bundle.chain(backend.precision).items()}


def kernel_origin(bundle: Bundle, precision: str) -> KernelOrigin:
    """Return what the prompt kernels of a bundle depend on besides the prompt.

    Raises:
        UsageError: the bundle has no prompt encoder of that precision.
        BundleError: the prompt encoder's kernel has no fixed number of channels.
    """
    entry = bundle.graph_in("prompt_encoder", precision)
    channels = [tensor.shape[-1] for tensor in entry.outputs if tensor.name == "kernel"]
    if len(channels) != 1 or not isinstance(channels[0], int):
        raise BundleError(f"{bundle.path} has a prompt encoder without a kernel of fixed width. Export it again.")
    length = bundle.manifest.prompt_length
    return KernelOrigin(entry.sha256, entry.precision, bundle.sums[TOKENIZER], length, channels[0])
