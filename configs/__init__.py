"""Recipes, one file each; `--config=NAME` finds them wherever m3jax is installed."""
