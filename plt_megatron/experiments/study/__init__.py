"""The study "which loop count should I train?": a law over sizes, loops and tokens, and the runs that determine it.

`knowledge` holds what is known from runs, `design` chooses further ones, `grid` and `rounds` turn the choice into runs,
`decision` answers, and `report` writes the report.
"""
