"""Layouts of checkpoint files: what bytes mean."""
