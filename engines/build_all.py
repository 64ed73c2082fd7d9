"""Build a bundle's engines in every precision, the quantized ones if there are images to calibrate with."""

from __future__ import annotations

import argparse
from pathlib import Path

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.bundle.precision import Precision
from cclip_deploy.cli.entry import run_script
from cclip_deploy.engines.build import SERVED, BuildOptions, build_engines
from cclip_deploy.quantization.calibrate import CalibrationOptions, default_cache
from cclip_deploy.verify.inspect import describe_bundle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--backend", choices=("tensorrt-rtx", "tensorrt"), default="tensorrt-rtx")
    parser.add_argument("--graph", action="append", help="may be repeated; the three that serve unless given")
    parser.add_argument("--calibration", type=Path, help="images, or a data set: for the quantized precisions")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()

    pictures = arguments.calibration
    calibration = CalibrationOptions((pictures,), cache=default_cache()) if pictures else None
    for precision in Precision:
        if precision.is_quantized and not pictures:
            continue
        options = BuildOptions(
            precision, arguments.backend, tuple(arguments.graph or SERVED), threads=arguments.threads,
            calibration=calibration if precision.is_quantized else None,
        )  # fmt: skip
        build_engines(Bundle.open(arguments.bundle), options, print)
    for engine in describe_bundle(arguments.bundle)["engines"]:
        layers = ", ".join(f"{count} {precision}" for precision, count in engine["product_layers"].items())
        print(f"{engine['file']}: {engine['bytes'] / 1e6:.1f} MB, products: {layers}, {engine['build_seconds']:.1f} s")


if __name__ == "__main__":
    run_script(main)
