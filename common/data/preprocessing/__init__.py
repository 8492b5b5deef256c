"""Step 1 as a job: its parts, workers, and their merging."""
