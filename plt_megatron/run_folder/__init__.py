"""A run's folder: where things lie in it, how they are written, and what they say. Imports no torch."""
