"""The mathematics of merging: pure functions on the arrays of one tensor.

A method is a `Method`; `METHODS` lists them by the name a recipe uses. To add one,
write its file and name it here.
"""

from m3jax.methods import linear, ties
from m3jax.methods.method import Method

METHODS: dict[str, Method] = {
    "average": linear.AVERAGE,
    "task_arithmetic": linear.TASK_ARITHMETIC,
    "ties": ties.TIES,
}
