"""Weights and training state on disk, and the way between Hugging Face's names and Megatron's."""
