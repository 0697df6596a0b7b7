"""Decoders on a checkpoint's own parameter names: forward pass, scores, generation."""
