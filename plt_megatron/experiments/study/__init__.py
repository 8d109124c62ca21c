"""The study "which loop count should I train?": a law over sizes, loops and tokens, and the runs that determine it.

`knowledge` holds what runs say, `design` chooses further ones, `decision` answers, `grid` and `rounds` make runs of it,
and `report` shows it.
"""
