"""Hugging Face side of PLT: the model that travels with every export, and its conversion tables."""
