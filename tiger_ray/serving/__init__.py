"""The optional endpoint on Ray Serve."""
