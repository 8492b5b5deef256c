"""Saving and loading of checkpoints."""
