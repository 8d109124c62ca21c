"""The commands: one module each, with its arguments and a `main` that returns the exit status.

pyproject.toml installs them as `plt-NAME`; the scripts of launch/ and tools/ start them from a checkout, and
`python -m plt_megatron.commands.NAME` works as well.
"""
