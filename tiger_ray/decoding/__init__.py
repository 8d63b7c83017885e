"""Constrained beam search: histories in, valid items out."""
