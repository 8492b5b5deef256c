"""What is trained: Qwen's shape, its layer, this pipeline stage's model."""
