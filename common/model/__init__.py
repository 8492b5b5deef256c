"""The model: Qwen's config, its layers, and this pipeline stage's part of it."""
