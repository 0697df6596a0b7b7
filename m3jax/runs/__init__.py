"""What explorations and learning have in common: inputs, a folder, logs, intervals."""
