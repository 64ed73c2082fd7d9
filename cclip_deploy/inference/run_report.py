"""Report of what `predict` ran: backend, device, precision of each graph, and unused engines."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.manifest import EngineEntry
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.inference.spec import chain_precisions
from cclip_deploy.runtime.registry import OpenBackend
from cclip_deploy.runtime.tensorrt.runner import TensorRtBackend


@dataclass(frozen=True)
class RunReport:
    """The backend that computed the masks, the precision of each graph, and the engines that were not used."""

    opened: OpenBackend
    graphs: dict[str, str]
    unused: tuple[EngineEntry, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON form: `ran` of `predict --json`."""
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
        """Return a sentence: "Ran: onnxruntime on cpu; image_encoder int8, prompt_encoder fp32, mask_decoder fp32."."""
        graphs = ", ".join(f"{graph} {precision}" for graph, precision in self.graphs.items())
        return f"Ran: {self.opened.backend.name} on {self.opened.device}; {graphs}."

    def notes(self) -> list[str]:
        """Return sentences on a fallback, on arithmetic in another precision than a graph's, and on unused engines."""
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
    """Return a sentence for each backend whose engines were not used, with the options that use them."""
    sentences = []
    for backend in dict.fromkeys(engine.backend for engine in engines):
        found = [engine for engine in engines if engine.backend == backend]
        encoders = [engine for engine in found if engine.graph == "image_encoder"] or found
        options = " or ".join(dict.fromkeys(f"--precision {engine.precision}" for engine in encoders))
        named = ", ".join(f"{engine.graph} {engine.precision}" for engine in found)
        sentences.append(
            f"The bundle's {backend} engines were not used ({named}). On a GPU, use them with --backend {backend} and "
            f"{options}."
        )
    return sentences
