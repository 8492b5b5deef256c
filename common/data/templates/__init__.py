"""Fine-tuning rows to messages, and the chat template that renders them."""
