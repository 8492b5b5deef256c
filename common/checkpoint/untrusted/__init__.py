"""Readers of files that anybody may have written: no code of theirs runs."""
