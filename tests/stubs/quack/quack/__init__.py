"""A stub of QuACK on the CPU."""
