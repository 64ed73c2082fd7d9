"""Tables and quoted numbers of README.md and docs/, rendered from the measurements in docs/measurements.

`python -m benchmarks.tables` rewrites the pages, `--check` compares them. One module per page names its tables.
"""
