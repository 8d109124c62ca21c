"""Uploads of a run's exports and checkpoints to buckets, folders and hubs, and downloads of checkpoints."""
