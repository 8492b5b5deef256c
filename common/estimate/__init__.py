"""Estimates before a run: memory of a GPU, layouts that fit, tokens/s."""
