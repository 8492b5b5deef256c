"""What a run records for people: log, metrics, its own description, TensorBoard and Weights & Biases."""
