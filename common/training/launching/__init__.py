"""The start of a run's processes: its nodes, their ranks, and what ends them."""
