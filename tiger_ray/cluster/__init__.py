"""Ray: connecting, shards over Ray Data, workers of Ray Train, reading inputs."""
