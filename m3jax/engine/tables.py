"""Numbers per tensor, from which the numbers of a chunk's tiles are made."""

from __future__ import annotations

import numpy as np

from m3jax import prng
from m3jax.engine import kernels
from m3jax.engine.plan import TILE, Chunk


class TileTables:
    """What DARE has to know of each tensor; K models, N tensors.

    Attributes:
      keys: (K, N, 2) uint32 or None.
      drop: (K,) uint32 lane thresholds for random DARE; (K, N) float32 magnitudes.
      scales: (K,) float32 or None.
    """

    def __init__(
        self,
        keys: np.ndarray | None = None,
        drop: np.ndarray | None = None,
        scales: np.ndarray | None = None,
    ):
        self.keys = keys
        self.drop = drop
        self.scales = scales

    def tiles(
        self,
        chunk: Chunk,
        rows: int,
        transform: kernels.Transform,
        coefficients: np.ndarray | None = None,
    ) -> kernels.Tiles:
        """The numbers of each tile of a chunk; `coefficients` is (K, N) float32."""
        item = np.zeros(rows, np.int64)
        tile = np.zeros(rows, np.uint64)  # number of the tile within its tensor
        counts = np.zeros((rows, 1), np.int32)
        for run in chunk.runs:
            last = run.row + run.rows
            item[run.row : last] = run.item
            tile[run.row : last] = np.arange(run.rows) + run.start // TILE
            counts[run.row : last] = TILE
            counts[last - 1] = run.count - (run.rows - 1) * TILE
        tiles = kernels.Tiles(counts, None)
        if coefficients is not None:
            tiles = tiles._replace(coefficients=coefficients[:, item, None])
        if transform.strategy is None or self.drop is None or self.scales is None:
            return tiles
        scales = self.scales[:, None, None]
        if transform.strategy == "magnitude":
            return tiles._replace(drop=self.drop[:, item, None], scales=scales)
        block = tile * np.uint64(TILE // prng.LANES)
        words = np.stack([block >> np.uint64(32), block & np.uint64(0xFFFFFFFF)], -1)
        assert self.keys is not None
        return tiles._replace(
            keys=self.keys[:, item],
            blocks=words.astype(np.uint32),
            drop=self.drop[:, None, None],
            scales=scales,
        )
