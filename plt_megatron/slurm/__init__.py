"""Slurm: checks and files before a job is submitted, its script, and the status of runs."""
