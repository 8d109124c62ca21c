"""Copies of a run's exports and checkpoints elsewhere: buckets, folders and hubs."""
