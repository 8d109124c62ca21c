"""The study "which loop count should I train?": a law over sizes, loops and tokens, and the runs that determine it.

`questions` asks the law (`experiments.law`) what runs say, `design` chooses runs, `decision` answers. `study_file`,
`grid` and `rounds` make runs of it.
"""
