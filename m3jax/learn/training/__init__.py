"""Descends an objective on batches of tasks."""
