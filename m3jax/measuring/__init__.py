"""What is measured of models, on data or of the weights alone, for methods and people.

Fisher information and Gram matrices are checkpoints beside the model, which `m3jax
merge --statistics` reads; similarity is a table.
"""
