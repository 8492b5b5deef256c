"""Rows to token ids and the loss mask."""
