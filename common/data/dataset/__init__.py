"""Megatron's datasets on disk, and the samples and micro-batches that training reads from them."""
