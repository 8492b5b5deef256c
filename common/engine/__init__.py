"""The versions of Megatron-Core and Transformer Engine that the kit supports, and their differences."""
