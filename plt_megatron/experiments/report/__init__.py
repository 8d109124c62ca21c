"""The report of a sweep: what its runs say, what they do not, and how sure that is.

`results` reads the runs, `rows` sums them up, `verdict` puts the answer into words, `decode` measures; `figures` and
`writing` make files of it.
"""
