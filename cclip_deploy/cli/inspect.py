"""The command `cclip-deploy inspect`."""

from __future__ import annotations

from typing import Any

from cclip_deploy.cli import options
from cclip_deploy.cli.console import print_json, progress, reports_errors, stdout, table
from cclip_deploy.common.numbers import si


@reports_errors
def inspect(bundle: options.Bundle, json: options.Json = False) -> None:
    """Show the contents of a bundle and verify every [bold]checksum[/]."""
    from cclip_deploy.verify.inspect import describe_bundle

    with progress(quiet=json) as on_progress:
        on_progress("Verifying checksums")
        facts = describe_bundle(bundle)
    if json:
        print_json(facts, "inspect")
        return
    shown = table(f"{bundle}: {facts['summary']}", "graph", "inputs", "outputs", "multiply-adds ", "size ", "SHA-256")
    for name, graph in facts["graphs"].items():
        sides = ("\n".join(_tensor(t) for t in graph[key]) for key in ("inputs", "outputs"))
        shown.add_row(name, *sides, si(graph["multiply_adds"]), si(graph["bytes"], "B"), graph["sha256"][:12])
    engines = table("Engines", "graph", "precision", "product layers", "built with", "size ", "SHA-256")
    for e in facts["engines"]:
        layers = ", ".join(f"{count} {kind}" for kind, count in e["product_layers"].items())
        built = f"{e['backend']} {e['backend_version']}"
        engines.add_row(e["graph"], e["precision"], layers, built, si(e["bytes"], "B"), e["sha256"][:12])
    stdout.print(shown)
    if facts["engines"]:
        stdout.print(engines)
    stdout.print(f"All {facts['files_checked']} checksums match. Exported by: {facts['command']}", markup=False)


def _tensor(tensor: dict[str, Any]) -> str:
    return f"{tensor['name']} ({', '.join(str(side) for side in tensor['shape'])})"
