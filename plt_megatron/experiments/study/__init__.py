"""The study "which loop count should I train?": a law over sizes, loops and tokens, and the runs that determine it.

`observations` are what runs say, `law` is fitted to them by `solver`, with intervals by `resampling`; `questions` asks
it questions. `design` chooses runs, `decision` answers. `study_file`, `grid` and `rounds` make runs of it.
"""
