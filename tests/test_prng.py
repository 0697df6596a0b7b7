"""Keys and masks: m3jax.prng against plain jax.random, and the masks of real merges."""

from __future__ import annotations

import hashlib
from pathlib import Path

import checkpoints
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from grids import thin

import m3jax
from m3jax import prng

SEEDS = (0, 1, 2**31, 2**32 - 1)
SIZES = (0, 1, 3, 4, 5, 1023, 1024, 1025, 4099)
MASKED = 60_000  # elements of a mask in the statistical tests
SIGMAS = 4.5  # a fair coin passes each bound 149999 times of 150000


def threefry_by_hand(key: tuple[int, int], counter: tuple[int, int]) -> tuple[int, int]:
    """One block in Python's integers, as the paper's table of rotations has it."""
    mask = 2**32 - 1
    schedule = [*key, key[0] ^ key[1] ^ 0x1BD11BDA]
    x, y = (counter[0] + key[0]) & mask, (counter[1] + key[1]) & mask
    for i in range(20):
        rotation = (13, 15, 26, 6, 17, 29, 16, 24)[i % 8]
        x = (x + y) & mask
        y = ((y << rotation) | (y >> (32 - rotation))) & mask ^ x
        if i % 4 == 3:
            step = i // 4 + 1
            x = (x + schedule[step % 3]) & mask
            y = (y + schedule[(step + 1) % 3] + step) & mask
    return x, y


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers of the Random123 library
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((2**32 - 1,) * 2, (2**32 - 1,) * 2, (0x1CB996FC, 0xBB002BE7)),
        (
            (0x243F6A88, 0x85A308D3),
            (0x13198A2E, 0x03707344),
            (0xC4923A9C, 0x483DF7A0),
        ),
    ],
)
def test_threefry(counter, key, expected):
    assert threefry_by_hand(key, counter) == expected
    words = prng.threefry2x32(
        tuple(np.array([word], np.uint32) for word in key),
        tuple(np.array([word], np.uint32) for word in counter),
    )
    assert tuple(int(word[0]) for word in words) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_keys(seed: int):
    root = jax.random.key(seed)
    np.testing.assert_array_equal(prng.root_key(seed), jax.random.key_data(root))
    for data in (0, 1, 2**32 - 1):
        np.testing.assert_array_equal(
            prng.fold_in(prng.root_key(seed), data),
            jax.random.key_data(jax.random.fold_in(root, np.uint32(data))),
        )


def test_name_words():
    digest = hashlib.sha256(b"model.norm.weight").digest()
    words = prng.name_words(["lm_head.weight", "model.norm.weight"])
    assert words.dtype == np.uint32
    assert words[1].tolist() == [
        int.from_bytes(digest[:4], "little"),
        int.from_bytes(digest[4:8], "little"),
    ]
    assert prng.name_words([]).shape == (0, 2)


@pytest.mark.parametrize("seed", [-1, 2**32, 1.0, "1", True, None])
def test_bad_seed(seed):
    with pytest.raises(prng.SeedError, match=r"seed=.* needs"):
        prng.check_seed(seed)


def test_numpy_seed():
    assert prng.check_seed(np.uint32(7)) == 7


@pytest.mark.parametrize(("drop_rate", "size"), thin([0.0, 0.2, 0.9, 1.0], SIZES))
def test_mask(size: int, drop_rate: float):
    made = prng.mask(5, 1, "model.norm.weight", size, drop_rate)
    expected = reference.plain_jax_mask(5, 1, "model.norm.weight", (size,), drop_rate)
    np.testing.assert_array_equal(made, expected)


def test_rates_are_multiples_of_2_to_the_minus_16():
    rates = (0.0, 0.2, 1.0, 1e-9, 1 - 1e-9, 1 / 65536)
    assert prng.drop_thresholds(rates).tolist() == [0, 13107, 65536, 0, 65536, 1]
    # A rate of 1 drops the largest lane, and 0 keeps the smallest.
    assert prng.mask(0, 0, "a", 300_000, 1.0).all()
    assert not prng.mask(0, 0, "a", 300_000, 0.0).any()


@pytest.mark.parametrize(
    "block", [0, 2**32 - 256, 2**32, 5 * 2**32 + 512, 2**62 + 2**31]
)
def test_offsets_beyond_32_bits(block: int):
    key = (0x13198A2E, 0x03707344)
    words = [block >> 32, block % 2**32]
    lanes = prng.mask_lanes(
        jnp.array([key], jnp.uint32), jnp.array([words], jnp.uint32), 1024
    )
    expected = []
    for i in range(block, block + 256):
        high, low = threefry_by_hand(key, (i >> 32, i % 2**32))
        expected += [low % 2**16, low >> 16, high % 2**16, high >> 16]
    assert lanes.dtype == jnp.uint16
    assert lanes[0].tolist() == expected


@pytest.mark.parametrize("block", [0, 4096, 2**32 - 100, 7 * 2**32 - 1])
@pytest.mark.parametrize("drop_rate", [0.0, 0.3, 1.0])
def test_packed_masks(block: int, drop_rate: float):
    """The same as lanes, also where the low word of the counter wraps around."""
    key = (0x13198A2E, 0x03707344)
    (threshold,) = prng.drop_thresholds((drop_rate,))
    packed = prng.packed_mask(
        jnp.array([key], jnp.uint32),
        jnp.array([[block >> 32, block % 2**32]], jnp.uint32),
        jnp.uint32(threshold),
        1024,
        wraps=True,
    )
    expected = []
    for i in range(block, block + 256):
        high, low = threefry_by_hand(key, (i >> 32, i % 2**32))
        expected += [low % 2**16, low >> 16, high % 2**16, high >> 16]
    mask = np.asarray(packed).view(np.bool_)[0]
    np.testing.assert_array_equal(mask, np.array(expected) < threshold)


def test_lanes_of_several_rows():
    """Each row has its own key and its own place in its tensor."""
    keys = np.array([[1, 2], [1, 2], [3, 4]], np.uint32)
    blocks = np.array([[0, 0], [0, 512], [0, 256]], np.uint32)
    lanes = np.asarray(prng.mask_lanes(jnp.asarray(keys), jnp.asarray(blocks), 1024))
    for row, key, block in zip(lanes, keys, blocks[:, 1], strict=True):
        wrapped = jax.random.wrap_key_data(jnp.asarray(key), impl="threefry2x32")
        with jax.enable_x64(True):
            bits = jax.random.bits(wrapped, (block + 256,), "uint64")
        stream = np.asarray(bits).astype("<u8").view("<u2")
        np.testing.assert_array_equal(row, stream[4 * block :])


@pytest.mark.parametrize("model", [0, 1, 2])
def test_masks_of_a_merge(model: int, tmp_path: Path):
    """Base 0, one model of ones, the others 0: the result is that model's mask."""
    seed, rate = 2**32 - 5, (0.3, 0.55, 0.8)
    zeros = checkpoints.random_model(0, dtype=np.float32)
    zeros = {name: np.zeros_like(tensor) for name, tensor in zeros.items()}
    ones = {name: np.ones_like(tensor) for name, tensor in zeros.items()}
    checkpoints.write(tmp_path / "base", zeros)
    checkpoints.write(tmp_path / "ones", ones)
    models = [tmp_path / "base"] * 3
    models[model] = tmp_path / "ones"
    recipe = m3jax.Recipe(
        method="task_arithmetic",
        mixup=m3jax.Mixup(alpha=None),
        dare=m3jax.Dare(drop_rate=rate),
    )
    m3jax.merge(tmp_path / "base", models, tmp_path / "merged", recipe, seed=seed)
    merged = checkpoints.read(tmp_path / "merged")
    rounded = round(rate[model] * 65536) / 65536
    for name, tensor in merged.items():
        mask = reference.plain_jax_mask(seed, model, name, tensor.shape, rate[model])
        assert mask.shape == tensor.shape
        np.testing.assert_array_equal(tensor == 0, mask)
        np.testing.assert_array_equal(tensor[~mask], np.float32(1 / (1 - rounded)))


@pytest.mark.parametrize("drop_rate", [0.1, 0.5, 0.9])
def test_dropped_share_and_expectation(drop_rate: float):
    dropped = prng.mask(11, 0, "model.embed_tokens.weight", MASKED, drop_rate)
    deviation = np.sqrt(drop_rate * (1 - drop_rate) / MASKED)
    assert abs(dropped.mean() - drop_rate) < SIGMAS * deviation
    # E[τ'] = τ: the rescaled task vector has the same sum up to chance.
    delta = np.random.default_rng(0).normal(0, 0.01, MASKED)
    kept = np.where(dropped, 0, delta / (1 - drop_rate))
    spread = np.sqrt((delta**2).sum() * drop_rate / (1 - drop_rate))
    assert abs(kept.sum() - delta.sum()) < SIGMAS * spread


def test_independence():
    """Masks of other models, tensors and seeds, and shifted ones, do not correlate."""
    first = prng.mask(0, 0, "a.weight", MASKED, 0.5)
    others = {
        "model": prng.mask(0, 1, "a.weight", MASKED, 0.5),
        "third model": prng.mask(0, 2, "a.weight", MASKED, 0.5),
        "tensor": prng.mask(0, 0, "b.weight", MASKED, 0.5),
        "seed": prng.mask(1, 0, "a.weight", MASKED, 0.5),
        **{f"shift {i}": np.roll(first, i) for i in (1, 2, 3, 4, 8, 1024)},
    }
    signs = {name: 1.0 - 2.0 * mask for name, mask in others.items()}
    names = list(signs)
    own = 1.0 - 2.0 * first
    bound = SIGMAS / np.sqrt(MASKED)
    for name in names:
        assert abs(np.mean(own * signs[name])) < bound, name
    for i, one in enumerate(names[:4]):
        for other in names[i + 1 : 4]:
            assert abs(np.mean(signs[one] * signs[other])) < bound, (one, other)


def test_a_lower_rate_drops_fewer_of_the_same():
    few = prng.mask(3, 0, "a", MASKED, 0.2)
    many = prng.mask(3, 0, "a", MASKED, 0.7)
    assert not (few & ~many).any()
