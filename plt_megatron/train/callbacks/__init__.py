"""Callbacks, for everything a run does besides training: `base` has the interface, `registry` the list."""
