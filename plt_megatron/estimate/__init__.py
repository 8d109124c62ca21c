"""Figures on paper, without torch: parameters, FLOPs, hardware peaks."""
