"""Prompts disturbed on purpose, and how much of its score a model keeps."""
