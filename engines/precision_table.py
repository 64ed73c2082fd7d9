"""Build a bundle's engines in every low precision; write what each costs and does to the masks: docs/precision.md.

python engines/precision_table.py BUNDLE --calibration DATA_SET --evaluation-set DATA_SET --json precision.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cclip_deploy.benchmark.precision_table import measure_precisions
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.cli.console import write_json
from cclip_deploy.cli.entry import run_script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="images, or a data set's training split")
    parser.add_argument("--evaluation-set", type=Path, required=True, help="images, or a data set's test split")
    parser.add_argument("--precision", action="append", choices=[*Precision][1:], help="may be repeated; all but fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where to write every number")
    given = parser.parse_args()

    precisions = [Precision(name) for name in given.precision or [*Precision][1:]]
    result = measure_precisions(given.bundle, precisions, given.calibration, given.evaluation_set, given.threads)
    if given.json:
        write_json(given.json, result)
    for row in result["rows"]:
        failed, masks = row["failed_checks"], row["masks"]
        print(
            f"{row['precision']}: {f'{failed} checks failed' if failed else 'verified'}, "
            f"products {row['layers']}, {sum(row['engine_bytes'].values()) / 1e6:.1f} MB, "
            f"Dice to FP32 {masks['mean']:.4f}, worst image {masks['worst']:.4f}"
        )


if __name__ == "__main__":
    run_script(main)
