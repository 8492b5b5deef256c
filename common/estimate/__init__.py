"""Estimates before a run: memory per GPU, layouts that fit, tokens/s."""
