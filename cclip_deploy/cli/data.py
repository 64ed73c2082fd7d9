"""`cclip-deploy data`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cclip_deploy.cli import options
from cclip_deploy.cli.console import print_json, progress, reports_errors, stdout, table, tell_every
from cclip_deploy.errors import ImageError


@reports_errors
def data(
    folder: Annotated[Path, typer.Argument(help="The data set's folder.", show_default=False)],
    layout: options.DataLayout = None,
    subject: options.Subject = None,
    allow_outside: options.AllowOutside = False,
    bundle: options.TokenizerBundle = None,
    prompt_length: options.PromptLength = None,
    json: options.Json = False,
) -> None:
    """Check a [bold]data set[/] and report it: images, masks, prompts, patients, and what the splits share."""
    from cclip_deploy.datasets.reading import read_data_set
    from cclip_deploy.datasets.report import report_data_set
    from cclip_deploy.inference.describe_prompt import open_tokenizer

    with progress(quiet=json) as tell:
        tell(f"Reading {folder}")
        data_set = read_data_set(folder, layout, subject, allow_outside)
        report = report_data_set(data_set, *open_tokenizer(bundle, prompt_length), tell_every(tell, "Mask"))
    if json:
        print_json(report.to_dict())
    else:
        shown = table(f"{folder}, layout {report.layout}", "", *(f"{split} " for split in report.splits))
        for name, values in report.table_rows():
            shown.add_row(name, *values)
        stdout.print(shown)
        for remark in report.remarks():
            stdout.print(remark, markup=False)
    if report.failed:
        raise ImageError(f"{len(report.failed)} images or masks cannot be used; first: {report.failed[0][1]}")
