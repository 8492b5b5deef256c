"""Plans a run and checks it before any of its processes start."""
