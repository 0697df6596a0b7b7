"""Mixtures of experts, built from dense models of one architecture."""
