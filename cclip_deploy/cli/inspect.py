"""`cclip-deploy inspect`"""

from __future__ import annotations

from cclip_deploy.cli import options
from cclip_deploy.cli.console import print_json, progress, reports_errors, stdout, table


@reports_errors
def inspect(bundle: options.Bundle, json: options.Json = False) -> None:
    """Show what a bundle holds, every [bold]checksum[/] verified."""
    from cclip_deploy.pipeline.inspect import describe_bundle

    with progress(quiet=json) as tell:
        tell("Checking checksums")
        facts = describe_bundle(bundle)
    if json:
        print_json(facts)
        return
    shown = table(f"{bundle}: {facts['summary']}", "graph", "inputs", "outputs", "multiply-adds ", "SHA-256")
    for name, graph in facts["graphs"].items():
        sides = ("\n".join(f"{t['name']} {t['shape']}" for t in graph[key]) for key in ("inputs", "outputs"))
        shown.add_row(name, *sides, f"{graph['multiply_adds'] / 1e9:.2f} G", graph["sha256"][:12])
    engines = table("Engines", "engine", "precision", "layers", "built with", "size ", "SHA-256")
    for e in facts["engines"]:
        layers = ", ".join(f"{count} {kind}" for kind, count in e["product_layers"].items())
        built = f"{e['backend']} {e['backend_version']}"
        engines.add_row(e["file"], e["precision"], layers, built, f"{e['bytes'] / 1e6:.1f} MB", e["sha256"][:12])
    stdout.print(shown)
    if facts["engines"]:
        stdout.print(engines)
    stdout.print(f"All {facts['files_checked']} checksums hold. Made by: {facts['command']}", markup=False)
