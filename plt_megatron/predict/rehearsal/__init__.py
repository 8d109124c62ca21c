"""Runs one rank of each kind of a large job on a machine without a GPU, and checks what the ranks would do together."""
