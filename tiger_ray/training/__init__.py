"""Examples, batches, the training loop, validation, checkpoints and logs."""
