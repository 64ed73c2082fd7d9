"""Simulate the coverage of 95 % intervals, write it as JSON and print tables in Markdown."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.tables.coverage import (
    CASES,
    PATIENTS,
    ROUND_CASES,
    ROUNDS,
    SEED_CASES,
    SEEDS,
    coverage_tables,
    patient_coverage,
    round_coverage,
    seed_coverage,
)
from cclip_deploy.cli.entry import run_script
from cclip_deploy.common.json_file import read_json, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/measurements/interval_coverage.json"))
    parser.add_argument("--data-sets", type=int, default=2000, help="data sets for each metric and number of patients")
    parser.add_argument("--tables-only", action="store_true", help="print the tables of an existing JSON file")
    arguments = parser.parse_args()

    if not arguments.tables_only:
        write_json(arguments.output, simulate(arguments.data_sets))
    print(coverage_tables(read_json(arguments.output)), end="")


def simulate(data_sets: int) -> dict[str, object]:
    found = []
    for case in CASES:
        for patients in PATIENTS:
            found += patient_coverage(case, patients, data_sets)
            print(f"{case.name}, {patients} patients: {found[-1]['coverage']} %", flush=True)
    return {
        "data_sets": data_sets,
        "patients": found,
        "rounds": [round_coverage(name, rounds, data_sets) for name in ROUND_CASES for rounds in ROUNDS],
        "seeds": [seed_coverage(name, seeds, data_sets) for name in SEED_CASES for seeds in SEEDS],
    }


if __name__ == "__main__":
    run_script(main)
