"""Stands in for QuACK on the CPU."""
