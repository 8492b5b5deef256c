"""Qwen's layers as Megatron-Core's modules."""
