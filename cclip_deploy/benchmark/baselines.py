"""Baselines: what a user would run instead of a bundle, on the same weights and threads."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cclip_deploy.benchmark.candidate import Answer, BenchCandidate, Floats, Form, Setting, Tokens
from cclip_deploy.benchmark.plan import MACHINE, WHOLE, BenchInputs, BenchOptions, LeftOut, Progress
from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.common.threads import set_torch_threads
from cclip_deploy.errors import UsageError
from cclip_deploy.runtime.graph_check import read_checked
from cclip_deploy.runtime.graph_model import load_model
from cclip_deploy.runtime.onnxruntime.session import load_onnxruntime, make_session
from cclip_deploy.runtime.openvino.arithmetic import arithmetic_of
from cclip_deploy.runtime.openvino.backend import OpenVinoBackend, compile_graph, load_openvino
from cclip_deploy.runtime.registry import BackendConfig, open_backend

if TYPE_CHECKING:
    import torch

    from cclip_deploy.model.network import CausalCLIPSeg

PRODUCT_SIDE = 3072
SGEMM = f"sgemm {PRODUCT_SIDE}³"
PRODUCT_MULTIPLY_ADDS = PRODUCT_SIDE**3
REASON_LENGTH = 160


@dataclass(frozen=True)
class Prepared:
    """A baseline ready to run: its answer, what its products run in, and further facts for the report."""

    answer: Answer
    precision: str = "fp32"
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Baselines:
    """Makes the baselines; those that cannot run are named in `left_out` with the reason.

    `on_cpu` says whether the bundle runs on the CPU: baselines that only run there are not timed beside a GPU.
    """

    inputs: BenchInputs
    options: BenchOptions
    left_out: LeftOut
    tell: Progress
    on_cpu: bool = True

    def of_pytorch(self, model: CausalCLIPSeg) -> list[BenchCandidate]:
        """Eager, whole network and causal path, in both memory formats; compiled, unless switched off."""
        import torch

        if not self._runs_on_cpu(Form.EAGER, Form.EAGER_CAUSAL, Form.COMPILED):
            return []
        last = copy.deepcopy(model)
        last.to(memory_format=torch.channels_last)
        found = []
        for network, setting in ((model, None), (last, Setting.CHANNELS_LAST)):
            found += [
                self._candidate(form, "pytorch", self._in_torch(compute, setting), setting)
                for form, compute in ((Form.EAGER, whole_network(network)), (Form.EAGER_CAUSAL, network.causal_logits))
            ]
        if not self.options.compile:
            self.left_out.append({"name": str(Form.COMPILED), "reason": "switched off"})
            return found
        self.tell("Compiling with torch.compile")
        return found + self._attempt(Form.COMPILED, "pytorch", lambda: self._in_torch(compiled(model)))

    def of_plain_export(self, plain: Bundle) -> list[BenchCandidate]:
        """The plain graph in ONNX Runtime; beside it, with `peers`, slimmed, and in OpenVINO."""
        if self.options.device == "cpu" and not self._runs_on_cpu(Form.PLAIN):
            return []
        entry = plain.graph("plain")
        cost = entry.multiply_adds
        found = self._attempt(Form.PLAIN, "onnxruntime", lambda: self._plain(plain), multiply_adds=cost)
        if not self.options.peers or not self._runs_on_cpu(Form.PLAIN_SLIM, f"{Form.PLAIN}, OpenVINO"):
            return found
        self.tell("Slimming the plain export")
        found += self._attempt(Form.PLAIN_SLIM, "onnxruntime", lambda: self._slimmed(plain))
        self.tell("Compiling the plain export in OpenVINO")
        found += self._attempt(
            Form.PLAIN, "openvino", lambda: self._plain_in_openvino(plain), Setting.OPENVINO_F32, cost
        )
        found += self._attempt(
            Form.PLAIN, "openvino",
            lambda: self._with_defaults(lambda core: core.read_model(read_checked(plain, entry))),
            Setting.OPENVINO_DEFAULTS, cost,
        )  # fmt: skip
        return found

    def of_openvino_conversion(self, model: CausalCLIPSeg) -> list[BenchCandidate]:
        """OpenVINO's own conversion of the PyTorch module, its causal path, in FP32 and with OpenVINO's defaults."""
        if not self._runs_on_cpu(Form.CONVERTED):
            return []
        self.tell("Converting the PyTorch module with OpenVINO")
        graphs: list[Any] = []

        def converted(core: Any) -> Any:
            if not graphs:
                graphs.append(self._converted(model))
            return graphs[0].clone()

        def in_f32() -> Prepared:
            core = load_openvino().Core()
            return self._in_openvino(compile_graph(core, converted(core), "fp32", self.options.threads))

        return [
            *self._attempt(Form.CONVERTED, "openvino", in_f32),
            *self._attempt(
                Form.CONVERTED, "openvino", lambda: self._with_defaults(converted), Setting.OPENVINO_DEFAULTS
            ),
        ]

    def answer_of(self, model: CausalCLIPSeg) -> Answer:
        """The reference's answer, in the published order of operations."""
        return self._in_torch(model.causal_logits).answer

    def of_machine(self) -> BenchCandidate:
        """A float32 product of two large matrices: what this machine's arithmetic can do at best."""
        import torch

        set_torch_threads(self.options.threads)
        left, right = torch.rand(2, PRODUCT_SIDE, PRODUCT_SIDE)
        into = torch.empty_like(left)
        return BenchCandidate(
            SGEMM, "pytorch", "fp32", MACHINE, lambda: torch.mm(left, right, out=into),
            {"threads": self.options.threads}, role="machine", form=Form.PRODUCT, device="cpu",
            multiply_adds=PRODUCT_MULTIPLY_ADDS,
        )  # fmt: skip

    def _runs_on_cpu(self, *names: str) -> bool:
        if not self.on_cpu:
            reason = f"runs on the CPU only, and the bundle on {self.options.backends()[0]}'s GPU"
            self.left_out.extend({"name": str(name), "reason": reason} for name in names)
        return self.on_cpu

    def _candidate(
        self, form: Form, backend: str, prepared: Prepared, setting: Setting | None = None,
        multiply_adds: int | None = None,
    ) -> BenchCandidate:  # fmt: skip
        answer = prepared.answer
        device = self.options.device if form is Form.PLAIN and backend == "onnxruntime" else "cpu"
        return BenchCandidate(
            _name(form, setting), backend, prepared.precision, WHOLE,
            lambda: answer(self.inputs.image, self.inputs.prompt),
            {"threads": self.options.threads, **prepared.facts}, role="baseline", form=form, setting=setting,
            device=device, includes_prompt_encoding=True, multiply_adds=multiply_adds, answer=answer,
        )  # fmt: skip

    def _attempt(
        self, form: Form, backend: str, prepare: Callable[[], Prepared], setting: Setting | None = None,
        multiply_adds: int | None = None,
    ) -> list[BenchCandidate]:  # fmt: skip
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a third-party tool about its own internals
                prepared = prepare()
                prepared.answer(self.inputs.image, self.inputs.prompt)
        except Exception as error:  # whatever keeps a third-party tool from working is a fact to report
            said = " ".join(str(error).split())[:REASON_LENGTH]
            reason = f"does not work here: {type(error).__name__}: {said}"
            self.left_out.append({"name": _name(form, setting), "reason": reason})
            return []
        return [self._candidate(form, backend, prepared, setting, multiply_adds)]

    def _in_torch(self, compute: Callable[..., torch.Tensor], setting: Setting | None = None) -> Prepared:
        import torch

        set_torch_threads(self.options.threads)
        layout = torch.channels_last if setting is Setting.CHANNELS_LAST else torch.contiguous_format

        def answer(image: Floats, tokens: Tokens) -> Floats:
            with torch.inference_mode():
                pixels = torch.from_numpy(np.ascontiguousarray(image)).contiguous(memory_format=layout)
                logits: Floats = compute(pixels, torch.from_numpy(np.ascontiguousarray(tokens))).numpy()
                return logits

        return Prepared(answer)

    def _plain(self, plain: Bundle) -> Prepared:
        device = self.options.device
        cache = self.options.choice_of("onnxruntime").engine_cache
        backend = open_backend(BackendConfig("onnxruntime", device, self.options.threads, engine_cache=cache), plain)
        return Prepared(lambda image, tokens: backend.run("plain", {"image": image, "tokens": tokens})["logits"])

    def _slimmed(self, plain: Bundle) -> Prepared:
        import onnxslim

        model = onnxslim.slim(load_model(plain, "plain"))
        session = make_session(load_onnxruntime("cpu"), model.SerializeToString(), "cpu", self.options.threads)
        return Prepared(lambda image, tokens: session.run(["logits"], {"image": image, "tokens": tokens})[0])

    def _plain_in_openvino(self, plain: Bundle) -> Prepared:
        backend = OpenVinoBackend(plain, "fp32", self.options.threads)
        backend.load("plain")
        return Prepared(
            lambda image, tokens: backend.run("plain", {"image": image, "tokens": tokens})["logits"],
            facts=backend.read_back["plain"].facts(),
        )

    def _with_defaults(self, read: Callable[[Any], Any]) -> Prepared:
        """A model compiled as OpenVINO's documentation shows: nothing is set but the number of threads."""
        core = load_openvino().Core()
        return self._in_openvino(core.compile_model(read(core), "CPU", {"INFERENCE_NUM_THREADS": self.options.threads}))

    def _in_openvino(self, runs: Any) -> Prepared:
        ran = arithmetic_of(runs)

        def answer(image: Floats, tokens: Tokens) -> Floats:
            logits: Floats = runs([np.ascontiguousarray(image), tokens], share_inputs=True)[0]
            return logits

        return Prepared(answer, ran.lowest, ran.facts())

    def _converted(self, model: CausalCLIPSeg) -> Any:
        import torch

        arrays = (self.inputs.image, self.inputs.prompt)
        pair = tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)
        with torch.no_grad():
            return load_openvino().convert_model(
                causal_path(model), example_input=pair, input=[tuple(array.shape) for array in arrays]
            )


def _name(form: Form, setting: Setting | None) -> str:
    return str(form) if setting is None else f"{form}, {setting}"


def whole_network(model: CausalCLIPSeg) -> Callable[..., torch.Tensor]:
    """The published network with both of its branches; its causal logits."""

    def compute(image: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = model(image, tokens).causal
        return logits

    return compute


def load_network(bundle: Bundle, options: BenchOptions) -> CausalCLIPSeg:
    """The network that the bundle was exported from.

    Raises:
        UsageError: another checkpoint.
        EnvironmentIssue: torch is not installed.
    """
    from cclip_deploy.environment.packages import require_export_packages

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
        from cclip_deploy.export.export import ExportOptions, export_bundle

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
