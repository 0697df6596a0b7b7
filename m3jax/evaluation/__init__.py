"""Tasks, and how well parameters do at them."""
