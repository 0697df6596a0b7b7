"""Adapters made of models, and of other adapters."""
