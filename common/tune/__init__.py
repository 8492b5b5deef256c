"""Layouts tried on the user's own GPUs: the estimate's best, a few steps each, and the fastest as a settings file."""
