"""Run one rank of each kind of a large job on a machine without a GPU, and check that the ranks fit together."""
