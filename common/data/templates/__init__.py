"""Fine-tuning rows to messages, rendered by a chat template, and the mask of what is learned."""
