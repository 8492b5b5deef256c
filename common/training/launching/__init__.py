"""How a run's processes start and end: launcher, preflight check, process group, signals and hang detector."""
