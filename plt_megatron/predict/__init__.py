"""Estimates without torch: parameters, FLOPs, memory, time."""
