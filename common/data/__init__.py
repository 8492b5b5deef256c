"""Data: jsonl to `.bin`/`.idx`, and those to the micro-batches of a rank."""
