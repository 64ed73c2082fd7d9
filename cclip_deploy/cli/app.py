"""Entry point of the console script."""

from __future__ import annotations

from cclip_deploy.cli.entry import start


def main() -> None:
    """Run the command line; SIGTERM and SIGHUP end it as Ctrl-C does, with nothing left half-written."""
    start(_run)


def _run() -> None:
    from cclip_deploy.cli.commands import app

    app()
