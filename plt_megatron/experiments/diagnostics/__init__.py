"""What the loops of one trained model do to held-out text: the diagnostics of LoopCoder-v2.

arXiv 2606.18023, section 3.2; docs/diagnostics.md has the definitions.
"""
