"""What every room may use: hashing, arrays, precision, memory."""
