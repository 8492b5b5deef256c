"""Bytes to and from the disk."""
