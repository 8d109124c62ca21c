"""Experiments with runs: sweeps, studies (sweeps in rounds), diagnoses of one model, and the demo.

A sweep's file (`sweep_file`) becomes a plan (`sweep_plan`, with what is held equal by `matching`); `running` runs it,
here or on Slurm, and `sweep_status` says how far it is. `report` answers from its runs, `study` chooses further ones.
`law` and `intervals` say how sure that is; `pages`, `figures` and `plots` show it.
"""
