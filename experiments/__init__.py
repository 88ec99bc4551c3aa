"""The experiments: one file each, on the harness of `options`, `training`, `running`, `records` and `report`.

`python -m experiments.NAME --tiny` ends in seconds, `--help` lists the options. A run writes one JSON record per
cell below experiments/results; `python -m experiments.report` makes RESULTS.md and the plots from all of them.
"""
