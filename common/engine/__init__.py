"""What the kit needs of Megatron-Core and Transformer Engine, and how their versions differ."""
