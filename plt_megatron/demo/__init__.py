"""The demo: a corpus of text on this machine, a tokenizer, two small models, and a table that compares them.

`steps` makes the corpus and its data, also for sweeps; `run` is the whole demo.
"""
