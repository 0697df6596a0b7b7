"""What an output says of itself: m3jax.json, the model card, the side files."""
