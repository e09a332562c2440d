"""What the operating system does: files, locks, signals, memory. Knows nothing of models."""
