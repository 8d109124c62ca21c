"""Slurm: what is checked and written before a job is submitted, what runs in it, and how it stands."""
