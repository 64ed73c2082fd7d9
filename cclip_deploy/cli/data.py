"""The command `cclip-deploy data`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cclip_deploy.cli import options
from cclip_deploy.cli.console import print_json, progress, report_every, reports_errors, stdout, table
from cclip_deploy.errors import ImageError


@reports_errors
@options.expand_groups
def data(
    folder: Annotated[Path, typer.Argument(help="Data-set folder.", show_default=False)],
    data_sets: options.DataSets = options.DATA_SETS,
    tokenizer: options.Tokenizer = options.TOKENIZER,
    json: options.Json = False,
) -> None:
    """Check a [bold]data set[/]: count images, masks, prompts and patients, and find overlap between the splits."""
    from cclip_deploy.datasets.reading import read_data_set
    from cclip_deploy.datasets.report import report_data_set

    with progress(quiet=json) as on_progress:
        on_progress(f"Reading {folder}")
        data_set = read_data_set(folder, data_sets.options())
        report = report_data_set(data_set, *tokenizer.open(), report_every(on_progress, "Mask"))
    if json:
        print_json(report.to_dict(), "data")
    else:
        shown = table(f"{folder}, layout {report.layout}", "", *(f"{split} " for split in report.splits))
        for name, values in report.table_rows():
            shown.add_row(name, *values)
        stdout.print(shown)
        for remark in report.remarks():
            stdout.print(remark, markup=False)
    if report.failed:
        raise ImageError(f"{len(report.failed)} images or masks cannot be read. The first error: {report.failed[0][1]}")
