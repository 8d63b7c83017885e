"""What lies on disk, and how an artifact becomes true: stores, manifests, runs, publishing, lineage."""
