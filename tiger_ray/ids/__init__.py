"""Text to Semantic IDs: encoders, quantizers, disambiguation, and how good the IDs are."""
