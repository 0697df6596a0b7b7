"""LiNeS: the merged task vector, scaled by depth."""

from __future__ import annotations

from typing import Any

from m3jax.methods.fields import Gradient, Rules, number, share
from m3jax.methods.step import Numbers, Operands, Transform, register, rounded_product

_IN_BLOCKS = r"(^|\.)\d+(\.|$)"  # a name with the number of a block


@register("lines")
class Lines(Transform):
    """After any method: θ0 + (a + b d) τ, τ the merged task vector, d its depth.

    Block l of L has d = l / (L − 1), tensors outside the blocks have d = 0. For one
    task the authors take a = λ, b = 1 − λ; for several a = (Σ_k ‖τ_k‖ / ‖τ‖) / K, norms
    of the whole model (`m3jax measure similarity` tells them), and b from 0 to 1 by
    validation. That a is not measured here: it has to be given. `depth` may be another
    function of layers and names: a gradient, or rules.

    Source: arXiv 2410.17146; wang-kee/LiNeS.
    """

    first: Any = number(
        default=None,
        help="a, the factor of the first block and outside the blocks; None: off",
        optional=True,
        search=(0.1, 1.0),
    )
    slope: Any = number(
        default=0.0,
        help="b, how much larger the last block's factor is",
        search=(0.0, 1.0),
    )
    depth: Any = share(
        default=Rules(((_IN_BLOCKS, Gradient((0.0, 1.0))),), 0.0),
        help="d, where a tensor stands",
    )
    after = True

    def finish(self, x: Operands, merged: Any, p: Numbers, info: Numbers) -> Any:
        factor = p["first"] + rounded_product(p["slope"], p["depth"])
        return x.base + rounded_product(merged - x.base, factor)
