"""Steps, evaluation, metrics."""
