"""Every random number of a merge, as a function of the seed and of what is drawn.

    root                  key(seed)
    ratios                fold_in(root, 0), then the words of the group's name
    DARE mask of model i  fold_in(root, 1), then i, then the words of the tensor's name
    seed of trial i       fold_in(root, 2), then i; the second word of that key
    step t of RMM's walk i  fold_in(root, 3), then i, then t

The generator is JAX's own, threefry2x32, with its 20 rounds written out: on CPU
`jax.random` runs them as a rolled loop, eight to nine times slower. The functions
here accept NumPy arrays (keys are derived on the host, all tensors at once) and
JAX arrays (mask bits are made inside the merging kernel), and agree with
`jax.random` bit for bit.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from m3jax.lazy import jax, jnp
from m3jax.traced import is_traced

RATIOS, MASKS, TRIALS, WALKS = 0, 1, 2, 3  # the first value folded into the root key
LANES = 4  # 16-bit mask lanes that one threefry call gives
RATE_STEPS = 1 << 16  # drop rates are multiples of 1/65536

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


class SeedError(ValueError):
    """The seed is not an integer from 0 to 2**32 − 1."""


def check_seed(seed: int) -> int:
    """Returns the seed, or raises SeedError if it is out of range."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise SeedError(f"seed={seed!r} needs an integer")
    if not 0 <= seed < 2**32:
        raise SeedError(f"seed={seed} needs 0 <= seed < 2**32")
    return int(seed)


def threefry2x32(key: tuple[Any, Any], counter: tuple[Any, Any]) -> tuple[Any, Any]:
    """The 64-bit block cipher threefry2x32 with 20 rounds, elementwise.

    Args:
      key: two uint32 arrays.
      counter: two uint32 arrays that broadcast against the key's.

    Returns:
      Two uint32 arrays, the high and the low word.
    """
    schedule = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    high, low = counter[0] + schedule[0], counter[1] + schedule[1]
    for block in range(5):
        for rotation in _ROTATIONS[block % 2]:
            high = high + low
            low = (low << np.uint32(rotation)) | (low >> np.uint32(32 - rotation))
            low = high ^ low
        high = high + schedule[(block + 1) % 3]
        low = low + schedule[(block + 2) % 3] + np.uint32(block + 1)
    return high, low


def root_key(seed: int | jax.Array) -> Any:
    """`jax.random.key(seed)` as raw data, shape (2,) uint32.

    Args:
      seed: 0 <= seed < 2**32, or in its place a key that `jax.random` made. Under
        `jax.jit` and `jax.vmap` also an argument of theirs.

    Raises:
      SeedError: it is neither.
    """
    if not hasattr(seed, "aval"):
        return np.array([0, check_seed(seed)], np.uint32)
    key: Any = seed
    if jnp.issubdtype(key.dtype, jnp.integer) and key.shape == ():
        if not is_traced(key):
            return root_key(int(key))
        return jnp.stack([jnp.zeros((), jnp.uint32), key.astype(jnp.uint32)])
    if jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key):
        if str(jax.random.key_impl(key)) != "threefry2x32":
            raise SeedError(
                f"a key of {jax.random.key_impl(key)} needs to be one of threefry2x32: "
                'jax.random.key(seed, impl="threefry2x32")'
            )
        key = jax.random.key_data(key)
    if key.dtype != jnp.uint32 or key.shape != (2,):
        raise SeedError(
            f"an array of {key.dtype}, shape {list(key.shape)}, needs to be one key, "
            "as jax.random.key makes it"
        )
    return key if is_traced(key) else np.asarray(key)


def fold_in(key: Any, data: np.ndarray | int) -> Any:
    """`jax.random.fold_in` on raw keys, elementwise over leading axes.

    Args:
      key: (..., 2) uint32.
      data: uint32 array that broadcasts against the leading axes.

    Returns:
      (..., 2) uint32.
    """
    data = np.asarray(data, np.uint32)
    xp: Any = jnp if is_traced(key) else np
    with np.errstate(over="ignore"):  # NumPy warns where a scalar wraps around
        shape = np.broadcast_shapes(key.shape[:-1], data.shape)
        words = [xp.broadcast_to(key[..., i], shape) for i in (0, 1)]
        counters = [np.broadcast_to(c, shape) for c in (np.zeros_like(data), data)]
        mixed = threefry2x32((words[0], words[1]), (counters[0], counters[1]))
    return xp.stack(mixed, axis=-1)


def name_words(names: list[str]) -> np.ndarray:
    """The first two little-endian uint32 of SHA-256(name): (len(names), 2)."""
    digests = b"".join(hashlib.sha256(name.encode()).digest()[:8] for name in names)
    return np.frombuffer(digests, "<u4").reshape(-1, 2).astype(np.uint32)


def ratio_keys(root: np.ndarray, groups: list[str] | None) -> np.ndarray:
    """Keys of the ratio draws, (G, 2): one per group, or a single one for None."""
    key = fold_in(root[None], RATIOS)
    if groups is None:
        return key
    words = name_words(groups)
    return fold_in(fold_in(key, words[:, 0]), words[:, 1])


def mask_keys(root: np.ndarray, num_models: int, names: list[str]) -> np.ndarray:
    """Keys of the DARE masks, (K, N, 2) uint32, for K models and N tensors."""
    words = name_words(names)
    key = fold_in(root[None], MASKS)
    key = fold_in(key, np.arange(num_models))[:, None]
    return fold_in(fold_in(key, words[:, 0]), words[:, 1])


def drop_thresholds(rates: Any, xp: Any = np) -> Any:
    """round(p · 65536) of each rate: element j is dropped iff lane[j] is below it.

    Args:
      rates: of any shape, from 0 to 1.
      xp: `numpy`, or `jax.numpy` for rates that are traced.
    """
    return xp.round(xp.asarray(rates) * RATE_STEPS).astype(xp.uint32)


def mask_lanes(
    keys: jax.Array, blocks: jax.Array, width: int, *, wraps: bool = False
) -> jax.Array:
    """The 16-bit lanes that decide which elements DARE drops.

    Row t holds lanes [4b, 4b + width) of the stream
    ``jax.random.bits(key, ..., uint64)`` read as little-endian uint16, where b is
    the 64-bit block number of that row.

    Args:
      keys: (T, 2) uint32, the mask key of each row.
      blocks: (T, 2) uint32, high and low word of each row's first block.
      width: lanes in a row, a multiple of 4.
      wraps: the low word of the block number may wrap within a row. It does not where
        rows start at multiples of `width`, which is a power of two.

    Returns:
      (T, width) uint16.
    """
    words = _mask_words(keys, blocks, width, wraps)
    # A block is 64 bits, high word first, and its lanes are little-endian: the two
    # lanes of the low word come first. Bitcast, then concatenate: XLA's CPU
    # backend vectorises this, and not a stack of the words before the bitcast.
    pairs = [jax.lax.bitcast_convert_type(word, jnp.uint16) for word in words[::-1]]
    return jnp.concatenate(pairs, axis=-1).reshape(keys.shape[0], width)


def packed_mask(
    keys: jax.Array,
    blocks: jax.Array,
    threshold: jax.Array,
    width: int,
    *,
    wraps: bool = False,
) -> jax.Array:
    """Which elements DARE drops, four to a word: ``mask_lanes(...) < threshold``.

    The four bytes of a word, in memory order, are 1 where an element is dropped and 0
    where it is kept, so that the array viewed as bool is the mask. One output word
    per threefry call is what XLA's CPU backend vectorises best: twice as fast as the
    lanes, which it makes from two outputs by calling the cipher for each.

    Args:
      keys, blocks, width: as for `mask_lanes`.
      threshold: uint32 scalar, 0 to 65536.
      wraps: as for `mask_lanes`. Costs a tenth.

    Returns:
      (T, width / 4) uint32.
    """
    high, low = _mask_words(keys, blocks, width, wraps)
    half = np.uint32(0xFFFF)
    lanes = (low & half, low >> np.uint32(16), high & half, high >> np.uint32(16))
    packed = jnp.zeros_like(low)
    for i, lane in enumerate(lanes):
        packed |= (lane < threshold).astype(jnp.uint32) << np.uint32(8 * i)
    return packed


def _mask_words(
    keys: jax.Array, blocks: jax.Array, width: int, wraps: bool = False
) -> tuple[jax.Array, jax.Array]:
    low = blocks[:, 1:] + jnp.arange(width // LANES, dtype=jnp.uint32)[None]
    high = jnp.broadcast_to(blocks[:, :1], low.shape)
    if wraps:
        high = high + (low < blocks[:, 1:]).astype(jnp.uint32)
    return threefry2x32((keys[:, :1], keys[:, 1:]), (high, low))


def mask(seed: int, model: int, name: str, size: int, drop_rate: float) -> np.ndarray:
    """The DARE mask of a whole tensor, for inspection and tests.

    Returns:
      (size,) bool in row-major order, True where the element is dropped.
    """
    key = mask_keys(root_key(seed), model + 1, [name])[model, 0]
    blocks = -(-size // LANES)
    starts = np.arange(0, max(blocks, 1), 256, dtype=np.uint64)
    counters = np.stack([starts >> np.uint64(32), starts & np.uint64(0xFFFFFFFF)], -1)
    lanes = mask_lanes(
        jnp.broadcast_to(jnp.asarray(key), (len(starts), 2)),
        jnp.asarray(counters.astype(np.uint32)),
        256 * LANES,
    )
    return np.asarray(lanes).reshape(-1)[:size] < drop_thresholds((drop_rate,))[0]
