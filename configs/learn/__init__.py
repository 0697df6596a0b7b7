"""What to learn, one file each; `m3jax learn --config=NAME` finds them."""
