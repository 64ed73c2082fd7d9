"""The peers: what a user would run instead of a bundle, on the same weights and threads."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cclip_deploy.bundle import Bundle
from cclip_deploy.errors import UsageError
from cclip_deploy.evidence.latency import Candidate
from cclip_deploy.pipeline.bench_plan import MACHINE, WHOLE, BenchInputs, BenchOptions, Floats, LeftOut, Progress
from cclip_deploy.runtime.onnx_runtime import OnnxRuntimeBackend, load_onnxruntime, make_session
from cclip_deploy.runtime.openvino import OpenVinoBackend, compile_graph, load_openvino

if TYPE_CHECKING:
    import torch

    from cclip_deploy.model.network import CausalCLIPSeg

EAGER, PLAIN = "pytorch eager", "plain export"
PRODUCT_SIDE = 3072
SGEMM = f"sgemm {PRODUCT_SIDE}³"
PRODUCT_MULTIPLY_ADDS = PRODUCT_SIDE**3
REASON_LENGTH = 160


@dataclass(frozen=True)
class Peers:
    """Makes candidates; those that cannot run are named in `left_out` with the reason."""

    inputs: BenchInputs
    options: BenchOptions
    left_out: LeftOut
    tell: Progress

    def of_pytorch(self, model: CausalCLIPSeg) -> list[Candidate]:
        """Eager, whole and causal path; compiled, if asked for."""
        found = [
            self._candidate(EAGER, "pytorch", self._in_torch(lambda *pair: model(*pair).causal)),
            self._candidate(f"{EAGER}, causal path", "pytorch", self._in_torch(model.causal_logits)),
        ]
        if not self.options.compile:
            self.left_out.append({"name": "torch.compile", "reason": "switched off"})
            return found
        self.tell("Compiling with torch.compile")
        return found + self._attempt("torch.compile", "pytorch", lambda: self._in_torch(compiled(model)))

    def of_plain_export(self, plain: Bundle) -> list[Candidate]:
        """The plain graph in ONNX Runtime; beside it, with `peers`, slimmed, and in OpenVINO."""
        backend = OnnxRuntimeBackend(plain, "fp32", self.options.device, self.options.threads)
        backend.load("plain")
        found = [self._candidate(PLAIN, backend.name, lambda: backend.run("plain", self._arrays())["logits"])]
        if self.options.peers:
            path = plain.file(plain.graph("plain").file)
            self.tell("Slimming the plain export")
            found += self._attempt(f"{PLAIN}, onnxslim", "onnxruntime", lambda: self._slimmed(path))
            self.tell("Compiling the plain export in OpenVINO")
            found += self._attempt(f"{PLAIN}, OpenVINO", "openvino", lambda: self._plain_in_openvino(plain))
        return found

    def of_openvino_conversion(self, model: CausalCLIPSeg) -> list[Candidate]:
        """OpenVINO's own conversion of the PyTorch module, its causal path."""
        self.tell("Converting the PyTorch module with OpenVINO")
        return self._attempt("ov.convert_model", "openvino", lambda: self._converted(model))

    def answer_of(self, model: CausalCLIPSeg) -> Floats:
        """The reference's logits (1, 1, H, W), in the published order of operations."""
        return self._in_torch(model.causal_logits)()

    def of_machine(self) -> Candidate:
        """A float32 product of two large matrices: what this machine's arithmetic can do at best."""
        import torch

        torch.set_num_threads(self.options.threads)
        left, right = torch.rand(2, PRODUCT_SIDE, PRODUCT_SIDE)
        into = torch.empty_like(left)
        extra = {**self.options.extra(), "multiply_adds": PRODUCT_MULTIPLY_ADDS}
        return Candidate(SGEMM, "pytorch", "fp32", MACHINE, lambda: torch.mm(left, right, out=into), extra)

    def _candidate(self, name: str, backend: str, run: Callable[[], object]) -> Candidate:
        device = {"device": "cpu"} if backend == "pytorch" else {}
        return Candidate(name, backend, "fp32", WHOLE, run, {**self.options.extra(), **device})

    def _attempt(self, name: str, backend: str, prepare: Callable[[], Callable[[], object]]) -> list[Candidate]:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a stranger's tool about its own insides
                run = prepare()
                run()
        except Exception as error:  # whatever keeps a stranger's tool from working is a fact to report
            said = " ".join(str(error).split())[:REASON_LENGTH]
            self.left_out.append({"name": name, "reason": f"does not work here: {type(error).__name__}: {said}"})
            return []
        return [self._candidate(name, backend, run)]

    def _arrays(self) -> dict[str, Any]:
        return {"image": self.inputs.image, "tokens": self.inputs.prompt}

    def _in_torch(self, compute: Callable[..., torch.Tensor]) -> Callable[[], Floats]:
        import torch

        torch.set_num_threads(self.options.threads)
        pair = [torch.from_numpy(np.ascontiguousarray(array)) for array in self._arrays().values()]

        def run() -> Floats:
            with torch.inference_mode():
                return compute(*pair).numpy()

        return run

    def _slimmed(self, path: Path) -> Callable[[], Floats]:
        import onnxslim

        model = onnxslim.slim(str(path))
        session = make_session(load_onnxruntime("cpu"), model.SerializeToString(), "cpu", self.options.threads)
        return lambda: session.run(["logits"], self._arrays())[0]

    def _plain_in_openvino(self, plain: Bundle) -> Callable[[], Floats]:
        backend = OpenVinoBackend(plain, "fp32", self.options.threads)
        backend.load("plain")
        return lambda: backend.run("plain", self._arrays())["logits"]

    def _converted(self, model: CausalCLIPSeg) -> Callable[[], Floats]:
        import torch

        openvino = load_openvino()
        arrays = self._arrays()
        pair = tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays.values())
        with torch.no_grad():
            graph = openvino.convert_model(
                causal_path(model), example_input=pair, input=[tuple(array.shape) for array in arrays.values()]
            )
        runs = compile_graph(openvino.Core(), graph, "fp32", self.options.threads)
        return lambda: runs(list(arrays.values()), share_inputs=True)[0]


def load_network(bundle: Bundle, options: BenchOptions) -> CausalCLIPSeg:
    """The network that the bundle was exported from.

    Raises:
        UsageError: another checkpoint.
        EnvironmentProblem: torch is not installed.
    """
    from cclip_deploy.pipeline.export import require_export_packages

    require_export_packages()
    from cclip_deploy.model.checkpoint import load_checkpoint

    if options.checkpoint is None:
        raise UsageError("PyTorch needs the weights: give --checkpoint FILE.")
    loaded = load_checkpoint(options.checkpoint)
    if loaded.sha256 != bundle.manifest.checkpoint.sha256:
        raise UsageError(
            f"{options.checkpoint} is not the file that {bundle.path} was exported from "
            f"({bundle.manifest.checkpoint.name}), so they cannot be compared. Give that one."
        )
    return loaded.model


def compiled(model: CausalCLIPSeg) -> Callable[..., torch.Tensor]:
    """The causal path through torch.compile; it compiles at its first call."""
    import torch

    path: Callable[..., torch.Tensor] = torch.compile(model.causal_logits)
    return path


def causal_path(model: CausalCLIPSeg) -> torch.nn.Module:
    """The causal path as a module of its own, for converters that take modules."""
    import torch

    class CausalPath(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = model

        def forward(self, image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
            return self.network.causal_logits(image, tokens)

    return CausalPath().eval()


def open_plain(bundle: Bundle, options: BenchOptions, scratch: Path, tell: Progress) -> Bundle | None:
    """The plain export to compare with: the bundle given, or one made for this run; None without checkpoint and it."""
    path = options.plain_bundle
    if path is None:
        if options.checkpoint is None:
            return None
        from cclip_deploy.pipeline.export import ExportOptions, export_bundle

        path = scratch / "plain.cclip"
        manifest = bundle.manifest
        chosen = ExportOptions(manifest.image_hw, manifest.prompt_length, plain=True, threads=options.threads)
        export_bundle(options.checkpoint, path, chosen, "bench", lambda what: tell(f"Plain export: {what}"))
    plain = Bundle.open(path)
    _refuse_another_network(bundle, plain)
    batch = int(plain.graph("plain").inputs[0].shape[0])
    if batch != 1:
        raise UsageError(
            f"{path} has a batch of {batch}; the benchmark compares single pictures. Export it with --batch 1."
        )
    return plain


def _refuse_another_network(bundle: Bundle, plain: Bundle) -> None:
    ours, theirs = bundle.manifest, plain.manifest
    if theirs.form != "plain":
        raise UsageError(f"{plain.path} is no plain export. Make one: cclip-deploy export CHECKPOINT --plain -o PLAIN")
    facts = ("image_hw", "prompt_length")
    different = [name for name in facts if getattr(ours, name) != getattr(theirs, name)]
    if ours.checkpoint.sha256 != theirs.checkpoint.sha256:
        different.append("checkpoint")
    if different:
        raise UsageError(f"{plain.path} differs from {bundle.path} in {', '.join(different)}. Export both alike.")
