"""The loop: settings, optimizer, step, metrics, resume."""
