"""A planted world with a known best ranking, for demos and tests."""
