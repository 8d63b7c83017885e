"""Metrics with intervals, and the counts that metrics are made of."""
