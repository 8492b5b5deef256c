"""The training state of a rank: the wrapped model, optimizer and schedule."""
