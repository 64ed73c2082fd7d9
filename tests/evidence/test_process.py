"""What a command costs: time and memory of that command alone."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from cclip_deploy.errors import EnvironmentProblem
from cclip_deploy.evidence.process import measure_command

MIB = 2**20


def python(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", code]


def test_time_and_peak_are_those_of_the_command() -> None:
    cost = measure_command(python("import time; x = bytearray(120 * 2**20); time.sleep(0.3)"), runs=2)
    assert 0.3 <= cost.seconds < 5
    assert 120 * MIB <= cost.peak_bytes < 200 * MIB
    assert cost.to_dict() == {"seconds": cost.seconds, "peak_bytes": cost.peak_bytes, "n": 2}


def test_the_peak_of_the_process_that_measures_is_not_counted() -> None:
    ballast = np.ones(400 * MIB, np.uint8)
    assert measure_command(python("pass"), runs=1).peak_bytes < 100 * MIB
    del ballast


def test_a_command_that_fails_is_told_with_what_it_said() -> None:
    with pytest.raises(EnvironmentProblem, match=r"ended with code 3: no such film"):
        measure_command(python("import sys; print('no such film', file=sys.stderr); sys.exit(3)"))
