"""Datasets on disk, and the samples and batches that training reads of them."""
