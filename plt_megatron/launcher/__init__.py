"""Keeps a run's processes running inside a job: `interface` is what the rest of the code uses."""
