"""The command `cclip-deploy prompt`."""

from __future__ import annotations

from typing import Annotated

import typer

from cclip_deploy.cli import options
from cclip_deploy.cli.console import print_json, reports_errors, stdout, table


@reports_errors
@options.expand_groups
def prompt(
    text: Annotated[str, typer.Argument(help="Prompt, in quotes.", show_default=False)],
    tokenizer: options.Tokenizer = options.TOKENIZER,
    repair: options.Repair = True,
    json: options.Json = False,
) -> None:
    """Show how a [bold]prompt[/] is read: corrected typing errors, lung zones and sides, and tokens."""
    from cclip_deploy.inference.describe_prompt import describe_prompt

    facts = describe_prompt(text, *tokenizer.open(), repair)
    if json:
        print_json(facts, "prompt")
        return
    shown = table("Prompt", "", "value")
    shown.add_row("text", facts["text"])
    for made in facts["repairs"]:
        shown.add_row("repaired", f"{made['found']!r} to {made['put']!r}")
    for side, zones in (facts["zones"] or {}).items():
        shown.add_row(f"{side} lung", ", ".join(zones) or "-")
    shown.add_row("side", facts["side"] or "none named")
    if facts["count"] is not None:
        shown.add_row("regions stated", str(facts["count"]))
    if facts["not_understood"]:
        shown.add_row("not understood", ", ".join(facts["not_understood"]))
    shown.add_row("tokens", f"{facts['token_count']} of {facts['prompt_length']}{', cut' if facts['cut'] else ''}")
    stdout.print(shown)
