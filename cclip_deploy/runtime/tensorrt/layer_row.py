"""One layer of an engine: its tensors, and whether it computes a convolution or matrix product.

The kinds of TensorRT-RTX, and the operators in the names of its generated kernels, were collected from real builds
(1.7); those of plain TensorRT from published engine reports. Any other kind has the role `unknown`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Literal

Role = Literal["product", "other", "unknown"]

FLAT_WEIGHTS = "weights"
"""Name of weights of which the table shows only type and count, as with plain TensorRT."""

COMPUTE_TYPES = frozenset({"fp32", "fp16", "bf16", "fp8", "fp4", "int8", "uint8", "int4"})
PRODUCT_KINDS = frozenset({
    "correlation", "deconv", "gemm", "convolution", "caskconvolution", "caskgemmconvolution",
    "caskflattenconvolution", "caskjitconv", "caskconvactpool", "fusedconvactconvolution", "cudnnconvolution",
    "deconvolution", "caskdeconvolution", "caskdeconvolutionv2", "gemmdeconvolution", "matrixmultiply",
    "caskgemmmatrixmultiply", "caskgemm",
})  # fmt: skip
"""Kinds of layers that are convolutions or matrix products, in lower case."""
OTHER_KINDS = frozenset({
    "avgpool", "maxpool", "cast", "reshape", "shape_call", "signal", "wait", "reformat", "noop", "identity",
    "constant", "shuffle", "slice", "concatenation", "concat", "pointwise", "pointwisev2", "elementwise",
    "activation", "unary", "scale", "select", "pooling", "caskpooling", "tiledpooling", "cudnnpooling", "resize",
    "reduce", "softmax", "casksoftmaxv2", "topk", "gather", "fill", "onehot", "nonzero",
})  # fmt: skip
"""Kinds of layers that are neither."""
_GENERATED_KINDS = frozenset({"kgen", "runtime_function"})
_FUSION_KINDS = frozenset({"fusion", "runtime_fusion"})
_GENERATED_NAME = re.compile(r"__myl_(\w+?)_myl\d+_\d+")
_GENERATED_PRODUCT = re.compile(r"_gem[mv](?:_\w+)?_myl\d+_\d+")
_OPERATOR = re.compile(r"[A-Z][a-z0-9]*")
_PRODUCT_OPERATORS = frozenset({"Corr", "Fc"})
SMALL_PRODUCT = ("Mul", "Sum")
"""Operators of a product with a single row in a generated kernel."""
_OTHER_OPERATORS = frozenset({
    "Abs", "Add", "And", "Asin", "Atan", "Cast", "Ceil", "Conc", "Cos", "Cums", "Div", "Elu", "Eql", "Erf", "Etc",
    "Exp", "Floo", "Gath", "Grid", "Gtr", "Inor", "Iota", "Isin", "Isna", "Log", "Log1", "Lt", "Max", "Maxr", "Mean",
    "Min", "Minr", "Move", "Mul", "Neg", "One", "Or", "Pow", "Prod", "Relu", "Repl", "Res", "Resh", "Resi", "Roun",
    "Scat", "Sele", "Sigm", "Sign", "Silu", "Sin", "Sinh", "Slic", "Sqrt", "Sub", "Sum", "Tan", "Tanh", "Topk",
    "Tran", "Xor",
})  # fmt: skip


@dataclass(frozen=True)
class LayerTensor:
    """A tensor that a layer reads or writes; -1 is a dynamic size."""

    name: str
    dims: tuple[int, ...]
    type: str

    @property
    def elements(self) -> int:
        """Number of elements, with every dynamic size taken as 2, so that only certain single elements count as one."""
        return math.prod(2 if size < 0 else size for size in self.dims)

    @property
    def is_vector(self) -> bool:
        """Whether at most one size differs from 1, as in a bias or in scales per channel."""
        return sum(size != 1 for size in self.dims) <= 1


@dataclass(frozen=True)
class LayerRow:
    """One layer of an engine: a kernel, with the names of the ONNX nodes that it computes at least partly."""

    name: str
    kind: str
    inputs: tuple[LayerTensor, ...]
    constants: tuple[LayerTensor, ...]
    outputs: tuple[LayerTensor, ...]
    origins: tuple[str, ...]

    @property
    def role(self) -> Role:
        """`product` for a convolution or matrix product, `other` for a kind known to be neither, else `unknown`."""
        kind = self.kind.lower()
        if kind in PRODUCT_KINDS:
            return "product"
        if kind in OTHER_KINDS:
            return "other"
        if kind not in _GENERATED_KINDS | _FUSION_KINDS:
            return "unknown"
        if kind == "kgen" and _GENERATED_PRODUCT.fullmatch(self.name):
            return "product"
        return _role_of(self._operators(), is_fusion=kind in _FUSION_KINDS)

    @property
    def is_product(self) -> bool:
        """Whether the layer is known to be a convolution or matrix product."""
        return self.role == "product"

    @property
    def is_unrolled_product(self) -> bool:
        """Whether a generated kernel may be a small unrolled product: n multiplications and n - 1 additions.

        Elementwise code can look the same, so this counts only for a kernel that names a product's node.
        """
        runs = [(operator, len(list(run))) for operator, run in groupby(self._operators())]
        return any(
            (first, second) == ("Mul", "Add") and 2 <= terms <= sums + 1
            for (first, terms), (second, sums) in pairwise(runs)
        )

    @property
    def types(self) -> frozenset[str]:
        """Compute types of all tensors except single elements (a product's alpha and beta are always FP32)."""
        return frozenset(tensor.type for tensor in _computing((*self.inputs, *self.constants, *self.outputs)))

    @property
    def operands(self) -> tuple[LayerTensor, ...]:
        """Operands of a product: activations and weights, without single elements, biases and scales.

        A vector among the constants is a bias or a scale unless nothing else can be the weights.
        """
        activations, constants = _computing(self.inputs), _computing(self.constants)
        weights = [tensor for tensor in constants if tensor.name == FLAT_WEIGHTS or not tensor.is_vector]
        return (*activations, *(weights or (constants if len(activations) < 2 else ())))

    @property
    def precision(self) -> str:
        """The type of the layer: `mixed` if it has several, `none` if it only handles indices and shapes.

        For a product it is the type of its operands, without bias, scales and output; `unknown` if the table shows
        fewer than two operands.
        """
        if not self.is_product:
            return _one_of(self.types)
        if len(self.operands) < 2:
            return "unknown"
        operators = self._operators()
        products = _product_places(operators)
        if products and "Cast" in operators[: products[-1]]:
            return self._type_after_casts(operators[products[0] :])
        return _one_of(tensor.type for tensor in self.operands)

    def _type_after_casts(self, operators: tuple[str, ...]) -> str:
        """Return the type of a product in a generated kernel that casts its own inputs, otherwise `mixed`.

        A product's result has the type of its operands. If nothing is cast after the product, the outputs show that
        type, and the weights must have it, too. `operators` are those from the product on.
        """
        weights = [tensor for tensor in _computing(self.constants) if not tensor.is_vector]
        if not weights or not {"Cast", "Etc"}.isdisjoint(operators):
            return "mixed"
        return _one_of(tensor.type for tensor in (*weights, *_computing(self.outputs)))

    def _operators(self) -> tuple[str, ...]:
        """Return the operators in a generated kernel's name, abbreviated to four letters: ("Cast", "Mul", "Relu")."""
        found = _GENERATED_NAME.fullmatch(self.name)
        return tuple(_OPERATOR.findall(found[1])) if found else ()


def _product_places(operators: tuple[str, ...]) -> list[int]:
    """Return the indices of products among a generated kernel's operators."""
    pairs = pairwise((*operators, ""))
    return [place for place, pair in enumerate(pairs) if pair[0] in _PRODUCT_OPERATORS or pair == SMALL_PRODUCT]


def _role_of(operators: tuple[str, ...], is_fusion: bool) -> Role:
    """Return the role of a generated kernel; a fusion is always built around a product."""
    if _product_places(operators):
        return "product"
    is_known = bool(operators) and not is_fusion and _OTHER_OPERATORS.issuperset(operators)
    return "other" if is_known else "unknown"


def _computing(tensors: Iterable[LayerTensor]) -> list[LayerTensor]:
    return [tensor for tensor in tensors if tensor.elements > 1 and tensor.type in COMPUTE_TYPES]


def _one_of(types: Iterable[str]) -> str:
    """Return the common type, `mixed`, or `none`."""
    distinct = set(types)
    return "none" if not distinct else distinct.pop() if len(distinct) == 1 else "mixed"
