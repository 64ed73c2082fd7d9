"""Build a bundle's engines in every low precision; measure their size and their masks (docs/precision.md).

python engines/precision_table.py BUNDLE --calibration DATA_SET --evaluation-set DATA_SET --json precision.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cclip_deploy.benchmark.precision_table import measure_precisions
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.cli.entry import run_script
from cclip_deploy.common.json_file import write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="images, or a data set's training split")
    parser.add_argument("--evaluation-set", type=Path, required=True, help="images, or a data set's test split")
    parser.add_argument("--precision", action="append", choices=[*Precision][1:], help="may be repeated; all but fp32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for all results")
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
