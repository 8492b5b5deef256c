"""The training loop of a rank: data, steps, evaluation and logging."""
