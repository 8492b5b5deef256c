"""A model's config, read from its config.json, and how it is run."""
