"""The demo: a corpus that the machine has, a tokenizer, two small models, and a table that compares them.

`steps` makes the corpus and its data, for sweeps too; `run` is the whole demo.
"""
