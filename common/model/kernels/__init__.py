"""Fused kernels, and which of them a run takes."""
