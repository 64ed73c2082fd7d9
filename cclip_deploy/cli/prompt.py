"""`cclip-deploy prompt`"""

from __future__ import annotations

from typing import Annotated

import typer

from cclip_deploy.cli import options
from cclip_deploy.cli.console import print_json, reports_errors, stdout, table


@reports_errors
def prompt(
    text: Annotated[str, typer.Argument(help="The prompt, in quotes.", show_default=False)],
    bundle: options.TokenizerBundle = None,
    prompt_length: options.PromptLength = None,
    repair: options.Repair = True,
    json: options.Json = False,
) -> None:
    """Show what becomes of a [bold]prompt[/]: typing errors repaired, zones and sides, tokens, cut or not."""
    from cclip_deploy.inference.describe_prompt import describe_prompt, open_tokenizer

    facts = describe_prompt(text, *open_tokenizer(bundle, prompt_length), repair)
    if json:
        print_json(facts)
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
