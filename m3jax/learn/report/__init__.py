"""What is left of a run: curves, pictures and a table."""
