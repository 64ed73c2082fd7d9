"""The backend that was asked for, and no other."""

from __future__ import annotations

import pytest

from cclip_deploy.bundle import Bundle
from cclip_deploy.errors import UsageError
from cclip_deploy.runtime.choice import open_backend


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_name_gives_its_backend(tiny_bundle: Bundle, name: str) -> None:
    backend = open_backend(name, tiny_bundle, threads=1)  # type: ignore[arg-type]
    assert (backend.name, backend.precision) == (name, "fp32")


def test_what_cannot_be_is_refused(tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="'abacus' is none of onnxruntime, openvino"):
        open_backend("abacus", tiny_bundle)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="OpenVINO runs on the CPU, not on cuda"):
        open_backend("openvino", tiny_bundle, device="cuda")
