"""Optimizer steps: what is trained, in which order, with which guards."""
