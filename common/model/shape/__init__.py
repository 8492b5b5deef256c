"""A model's shape, by its config.json."""
