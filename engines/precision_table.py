"""Build a bundle's engines in every low precision and print what each costs and does to the masks: docs/precision.md.

python engines/precision_table.py BUNDLE --calibration DATA_SET --evaluation-set DATA_SET
"""

from __future__ import annotations

import argparse
import json
import resource
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

from cclip_deploy.bundle import Bundle
from cclip_deploy.pipeline.build import BuildOptions, build_engines
from cclip_deploy.pipeline.calibrate import CalibrationOptions, choose_pictures, default_cache
from cclip_deploy.pipeline.mask_agreement import evaluation_images, measure_masks
from cclip_deploy.pipeline.verify import VerifyOptions, verify_bundle
from cclip_deploy.precisions import PRECISIONS, Precision, is_quantised
from cclip_deploy.runtime.layer_table import LayerTable


def measure(path: Path, precision: Precision, options: CalibrationOptions, threads: int) -> str:
    """The end of a row; in a process of its own, whose peak memory is that of this one precision's build."""
    # The build knows no evaluation set: it would refuse a precision whose masks are poor, and this table shows them.
    chosen = replace(options, evaluation_set=()) if is_quantised(precision) else None
    engines = build_engines(Bundle.open(path), BuildOptions(precision, threads=threads, calibration=chosen), print)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    layers = LayerTable.from_dict(json.loads((path / engines[0].layers).read_bytes()))
    products = ", ".join(f"{count} {kind}" for kind, count in layers.product_summary().items())
    sizes = " + ".join(f"{(path / engine.file).stat().st_size / 1e6:.1f}" for engine in engines[:2])
    seconds = " + ".join(f"{engine.build_seconds:.1f}" for engine in engines[:2])
    masks = measure_masks(Bundle.open(path), precision, evaluation_images(options), threads)
    return f"| {products} | {sizes} | {seconds} | {peak_gb:.1f} | {masks.mean:.4f} / {masks.worst:.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--calibration", type=Path, required=True, help="images, or a data set's training split")
    parser.add_argument("--evaluation-set", type=Path, required=True, help="images, or a data set's test split")
    parser.add_argument("--precision", action="append", choices=PRECISIONS, help="may be repeated; all but fp32")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    options = CalibrationOptions((given.calibration,), evaluation_set=(given.evaluation_set,), cache=default_cache())
    print("\n".join(choose_pictures(options).describe()))  # and no image or patient is in both
    kinds: list[Precision] = given.precision or list(PRECISIONS[1:])
    with ProcessPoolExecutor(1, max_tasks_per_child=1) as alone:
        rows = [alone.submit(measure, given.bundle, kind, options, given.threads).result() for kind in kinds]
    checks = verify_bundle(Bundle.open(given.bundle), VerifyOptions(threads=given.threads)).checks
    print("| precision | verify | products | image + prompt, MB | build, s | peak, GB | Dice, mean / worst |")
    print("|---|---|---" + "|---:" * 4 + "|")
    for kind, row in zip(kinds, rows, strict=True):
        failed = sum(not check.passed for check in checks if check.precision == kind)
        print(f"| {kind} | {f'{failed} failed' if failed else 'ok'} {row}")


if __name__ == "__main__":
    main()
