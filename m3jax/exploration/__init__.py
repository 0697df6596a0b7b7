"""Many draws of a merge, evaluated in device memory, and the best of them."""
