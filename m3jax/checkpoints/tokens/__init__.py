"""Tokenizers of checkpoints: their vocabularies, a union of them, chat templates."""
