"""What proves a checkpoint whole, and what it is."""
