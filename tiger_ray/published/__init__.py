"""Artifacts of a night, read without Ray."""
