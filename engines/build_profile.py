"""Build the engines that a profile describes, and print the command that runs them.

python engines/build_profile.py engines/profiles/workstation.toml BUNDLE
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cclip_deploy.bundle.bundle import Bundle
from cclip_deploy.cli.entry import run_script
from cclip_deploy.engines.build import build_engines
from cclip_deploy.engines.profile import read_profile
from cclip_deploy.quantization.calibrate import CalibrationOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--calibration", type=Path, nargs="+", help="images or a data set, for a quantized precision")
    parser.add_argument("--graph", action="append", help="may be repeated; default: the profile's graphs")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()

    profile = read_profile(given.profile)
    print(f"{profile.name}: {profile.why}")
    calibration = CalibrationOptions(tuple(given.calibration)) if given.calibration else None
    options = profile.build_options(given.threads, calibration, tuple(given.graph or ()))
    for engine in build_engines(Bundle.open(given.bundle), options, print):
        size = (given.bundle / engine.file).stat().st_size
        print(f"{engine.file}: {size / 1e6:.1f} MB for {engine.target}, {engine.build_seconds:.1f} s")
    graphs = " --cuda-graphs" if profile.run.cuda_graphs else ""
    print(
        f"Run the engines: cclip-deploy predict {given.bundle} IMAGES --prompt TEXT --precision {profile.precision} "
        f"--backend {profile.backend} --gpu-interface {profile.run.gpu_interface}{graphs}"
    )


if __name__ == "__main__":
    run_script(main)
