"""What ran: backend, device and the precision of each graph, and which of a bundle's engines were not used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.manifest import EngineEntry
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.inference.segmenter import chain_precisions
from cclip_deploy.runtime.registry import OpenBackend
from cclip_deploy.runtime.tensorrt.runner import TensorRtBackend


@dataclass(frozen=True)
class RunReport:
    """What computed the masks of a run; `graphs` is the precision of each, `unused` the engines that were not run."""

    opened: OpenBackend
    graphs: dict[str, str]
    unused: tuple[EngineEntry, ...]

    def to_dict(self) -> dict[str, Any]:
        """The form of `predict --json`, under `ran`."""
        return {
            **self.opened.to_dict(),
            "backend": self.opened.backend.name,
            "device": self.opened.device,
            "graphs": self.graphs,
            "engines_not_used": [
                {"graph": engine.graph, "precision": engine.precision, "backend": engine.backend, "file": engine.file}
                for engine in self.unused
            ],
            "notes": self.notes(),
        }

    def summary(self) -> str:
        """One sentence: "Ran: onnxruntime on cpu; image_encoder int8, prompt_encoder fp32, mask_decoder fp32."."""
        graphs = ", ".join(f"{graph} {precision}" for graph, precision in self.graphs.items())
        return f"Ran: {self.opened.backend.name} on {self.opened.device}; {graphs}."

    def notes(self) -> list[str]:
        """Sentences about a fallback, about arithmetic wider than a graph's, and about engines that were not used."""
        notes = self.opened.notes(self.graphs)
        half = [graph for graph, precision in self.graphs.items() if Precision(precision).has_16_bits]
        if half and (self.opened.backend.name, self.opened.device) == ("onnxruntime", "cpu"):
            notes.append(f"On a CPU, ONNX Runtime computes the 16-bit part of {', '.join(half)} in FP32 arithmetic.")
        return [*notes, *_unused_engines(self.unused)]


def report_run(opened: OpenBackend, bundle: Bundle) -> RunReport:
    """Return what a backend runs of a bundle, and the bundle's engines that it does not use."""
    ran = opened.backend.entries if isinstance(opened.backend, TensorRtBackend) else ()
    unused = tuple(engine for engine in bundle.manifest.engines if engine not in ran)
    return RunReport(opened, chain_precisions(opened.backend, bundle), unused)


def _unused_engines(engines: tuple[EngineEntry, ...]) -> list[str]:
    """A sentence for each backend whose engines were not run, with the options that run them."""
    sentences = []
    for backend in dict.fromkeys(engine.backend for engine in engines):
        found = [engine for engine in engines if engine.backend == backend]
        encoders = [engine for engine in found if engine.graph == "image_encoder"] or found
        options = " or ".join(dict.fromkeys(f"--precision {engine.precision}" for engine in encoders))
        named = ", ".join(f"{engine.graph} {engine.precision}" for engine in found)
        sentences.append(
            f"The bundle's {backend} engines were not used ({named}). Where there is a GPU, they run with "
            f"--backend {backend} and {options}."
        )
    return sentences
