"""Tests of `cclip-deploy doctor`: output and exit codes."""

from __future__ import annotations

import json

import pytest
import typer
from typer.testing import CliRunner

from cclip_deploy.cli.console import stdout
from cclip_deploy.cli.doctor import doctor
from cclip_deploy.environment import doctor as machine
from cclip_deploy.environment.doctor import DoctorCheck

NUMPY = DoctorCheck("numpy", "ok", "2.4.6", None, ("run a bundle",))
TORCH = DoctorCheck("torch", "missing", "not installed", "pip install 'cclip-deploy[export]'", ("export",))
BROKEN = DoctorCheck(
    "onnxruntime", "broken", "ImportError: [bad] wheel", "pip install --force-reinstall x", ("run a bundle",)
)


@pytest.fixture
def app() -> typer.Typer:
    app = typer.Typer()
    app.command()(doctor)
    return app


def see(checks: list[DoctorCheck], monkeypatch: pytest.MonkeyPatch, width: int = 80) -> None:
    monkeypatch.setattr(machine, "diagnose", lambda deep: checks)
    monkeypatch.setattr(stdout, "width", width)


def test_json_lists_every_check_with_status_and_remedy(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    see([NUMPY, TORCH], monkeypatch)
    done = CliRunner().invoke(app, ["--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["checks"][1] == {
        "name": "torch",
        "status": "missing",
        "detail": "not installed",
        "remedy": "pip install 'cclip-deploy[export]'",
        "needed_for": ["export"],
    }


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_exit_code_is_3_if_no_bundle_can_run(
    arguments: list[str], app: typer.Typer, monkeypatch: pytest.MonkeyPatch
) -> None:
    see([NUMPY, BROKEN], monkeypatch)
    assert CliRunner().invoke(app, arguments).exit_code == 3


def test_remedies_stay_on_one_line_in_a_narrow_terminal(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    see([NUMPY, TORCH, BROKEN], monkeypatch, width=30)
    done = CliRunner().invoke(app, [])
    assert "\n    pip install 'cclip-deploy[export]'\n" in done.stdout
    assert "\n    pip install --force-reinstall x\n" in done.stdout


def test_brackets_in_a_message_are_printed_literally(app: typer.Typer, monkeypatch: pytest.MonkeyPatch) -> None:
    see([BROKEN], monkeypatch, width=200)
    assert "[bad] wheel" in CliRunner().invoke(app, []).stdout
