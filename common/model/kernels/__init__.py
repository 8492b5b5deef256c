"""Fused kernels, and the selection of those that a run uses."""
