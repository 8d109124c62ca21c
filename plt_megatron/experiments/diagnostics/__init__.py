"""Diagnostics of the loops of one trained model on held-out text, as in LoopCoder-v2.

arXiv 2606.18023, section 3.2; docs/diagnostics.md has the definitions.
"""
