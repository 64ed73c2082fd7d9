"""Measure the agreement of quantized masks with FP32's against the number of calibration images (docs/precision.md).

python engines/calibration_curve.py BUNDLE DATA_SET --counts 1 2 4 8 16 32 64 --json curve.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.cli.entry import run_script
from cclip_deploy.common.json_file import write_json
from cclip_deploy.environment.packages import require_packages
from cclip_deploy.quantization.calibrate import CalibrationOptions
from cclip_deploy.quantization.curve import measure_curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("data", type=Path, help="data set: training split for calibration, test split for evaluation")
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--precision", choices=["int8", "fp8"], default="int8")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, help="file for all results")
    given = parser.parse_args()

    require_packages("Calibration", ("onnx",), "export")
    options = CalibrationOptions((given.data,), evaluation_set=(given.data,))
    points = measure_curve(
        Bundle.open(given.bundle), options, given.counts, given.precision, threads=given.threads, on_progress=print
    )
    print("| method | images | mean Dice to FP32 | worst image |\n|---|---:|---:|---:|")
    for point in points:
        print(f"| {point.method} | {point.pictures} | {point.agreement.mean:.4f} | {point.agreement.worst:.4f} |")
    if given.json:
        write_json(given.json, [point.to_dict() for point in points])


if __name__ == "__main__":
    run_script(main)
