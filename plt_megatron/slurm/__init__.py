"""Slurm: checks and run folders before a job is submitted, job scripts, and the status of runs."""
