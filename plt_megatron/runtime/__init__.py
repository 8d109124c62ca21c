"""Devices, process groups, the CPU runtime, and what this machine can run."""
