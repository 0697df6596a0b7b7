"""Tensors that are computed as they are read: each a `Source` over stored ones."""
