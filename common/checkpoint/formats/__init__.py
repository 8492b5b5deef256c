"""The formats of weights on disk."""
