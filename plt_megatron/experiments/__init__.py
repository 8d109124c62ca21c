"""Experiments with runs: sweeps, studies (sweeps in rounds), diagnoses of one model, and the demo.

A file (`files`) becomes a plan (`sweep_plan`, with what is held equal by `matching`; a study's by `study.grid`);
`sweep` runs it, here or on Slurm, and `records` reads what its runs left. `verdicts` answers for a sweep, `study`
chooses further runs. `law` and `intervals` say how sure that is; `pages` and `figures` show it.
"""
