"""Devices, process groups and the CPU runtime."""
