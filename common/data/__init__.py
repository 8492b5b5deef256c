"""Text to batches: jsonl to `.bin`/`.idx`, and those to this rank's micro-batches."""
