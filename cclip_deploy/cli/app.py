"""Entry point of the console script `cclip-deploy`."""

from __future__ import annotations

from cclip_deploy.cli.entry import start


def main() -> None:
    """Run the command line; SIGINT, SIGTERM and SIGHUP end it without leaving partial files."""
    start(_run)


def _run() -> None:
    from cclip_deploy.cli.commands import app

    app()
