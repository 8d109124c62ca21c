"""Experiments with runs: sweeps, studies (sweeps in rounds), and diagnoses of one model.

A file (`files`) becomes a plan (`sweep_plan`, with budgets equalized by `matching`; a study's by `study.grid`); `sweep`
runs it, here or on Slurm, and `records` reads the results of its runs. `verdicts` answers a sweep's questions, `study`
chooses further runs. `law` and `intervals` quantify the uncertainty; `pages` and `figures` present the results.
"""
