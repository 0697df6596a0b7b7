"""Generation against transformers' greedy one, and its independence of the batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_models

from m3jax.models.decoder import forward
from m3jax.models.generation import Sampling, generate, restrict

NEW = 12
LENGTHS = (9, 4, 1)
FAMILIES = ("llama3", "mistral", "qwen2_window", "qwen3", "gpt2")


def _padded(side: str, slots: int = 12) -> tuple[jax.Array, jax.Array]:
    """Three prompts of LENGTHS, padded on one side or on both."""
    prompts = tiny_models.prompts(len(LENGTHS), max(LENGTHS))
    tokens = np.full((len(LENGTHS), slots), 7, np.int32)
    valid = np.zeros(tokens.shape, bool)
    for i, n in enumerate(LENGTHS):
        start = {"left": slots - n, "right": 0, "both": (slots - n) // 2}[side]
        tokens[i, start : start + n] = prompts[i, :n]
        valid[i, start : start + n] = True
    return jnp.asarray(tokens), jnp.asarray(valid)


def _greedy(family: str, side: str = "left", **options):
    return generate(
        tiny_models.parameters(family),
        *_padded(side),
        config=tiny_models.config(family),
        max_new_tokens=NEW,
        **options,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family):
    torch = pytest.importorskip("torch")
    found = _greedy(family)
    for i, n in enumerate(LENGTHS):
        prompt = torch.tensor(tiny_models.prompts(3, max(LENGTHS))[i : i + 1, :n])
        expected = tiny_models.reference(family).generate(
            prompt.long(),
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW,
            do_sample=False,
        )
        assert found.tokens[i].tolist() == expected[0, n:].tolist()
    assert found.lengths.tolist() == [NEW] * 3
    assert len(set(found.tokens[0].tolist())) > 2  # more than a repeated token


@pytest.mark.parametrize("family", ["llama3", "qwen2_window", "gpt2"])
def test_cached_steps_are_the_uncached_forward_pass(family):
    """Every token is the likeliest by a forward pass over all tokens before it."""
    found = _greedy(family)
    tokens, valid = _padded("left")
    whole = jnp.concatenate([tokens, found.tokens], axis=1)
    everything = jnp.concatenate([valid, jnp.ones((3, NEW), bool)], axis=1)
    logits = forward(
        tiny_models.parameters(family),
        whole,
        config=tiny_models.config(family),
        valid=everything,
    )
    start = tokens.shape[1]
    np.testing.assert_array_equal(logits[:, start - 1 : -1].argmax(-1), found.tokens)


@pytest.mark.parametrize("side", ["right", "both"])
def test_padding_changes_nothing(side):
    for options in ({}, {"sampling": Sampling(0.7), "key": jax.random.key(3)}):
        left, other = (_greedy("mistral", s, **options) for s in ("left", side))
        np.testing.assert_array_equal(left.tokens, other.tokens)


def test_batch_size_changes_nothing():
    config, parameters = tiny_models.config("qwen3"), tiny_models.parameters("qwen3")
    tokens, valid = _padded("left")
    keys = jax.random.split(jax.random.key(1), 3)
    sampling = Sampling(1.0, top_k=20, top_p=0.9)
    options = {"config": config, "max_new_tokens": 6, "sampling": sampling}
    together = generate(parameters, tokens, valid, key=keys, **options)
    for i in range(3):
        row = slice(i, i + 1)
        alone = generate(parameters, tokens[row], valid[row], key=keys[row], **options)
        np.testing.assert_array_equal(together.tokens[row], alone.tokens)


def test_stop_tokens_end_a_row():
    free = _greedy("llama3")
    row = free.tokens[0].tolist()
    stop = row[4]
    end = row.index(stop) + 1
    found = _greedy("llama3", stop_tokens=(stop, 60))
    assert found.lengths[0] == end
    assert found.tokens[0].tolist() == [*row[:end], *[0] * (NEW - end)]
    for i in range(3):
        n = int(found.lengths[i])
        assert found.tokens[i, :n].tolist() == free.tokens[i, :n].tolist()
    every = _greedy("llama3", stop_tokens=tuple(range(tiny_models.VOCABULARY)))
    assert every.lengths.tolist() == [1, 1, 1]


def test_a_row_of_padding_gives_nothing():
    tokens, valid = _padded("left")
    found = generate(
        tiny_models.parameters("llama3"),
        tokens,
        valid.at[1].set(False),
        config=tiny_models.config("llama3"),
        max_new_tokens=NEW,
    )
    assert found.lengths.tolist() == [NEW, 0, NEW]
    assert found.tokens[1].tolist() == [0] * NEW


def test_sampling_follows_the_probabilities_and_the_key():
    config, parameters = tiny_models.config("llama2"), tiny_models.parameters("llama2")
    count = 2000
    tokens = jnp.broadcast_to(jnp.asarray(tiny_models.prompts(1, 5)), (count, 5))
    options = {"config": config, "max_new_tokens": 1, "sampling": Sampling(1.5)}
    valid = jnp.ones(tokens.shape, bool)
    found, again, other = (
        generate(parameters, tokens, valid, key=jax.random.key(seed), **options).tokens
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(found, again)
    assert (found != other).mean() > 0.5
    logits = forward(parameters, tokens[:1], config=config)[0, -1] / 1.5
    expected = np.asarray(jax.nn.softmax(logits))
    shares = np.bincount(np.asarray(found).ravel(), minlength=len(expected)) / count
    assert np.abs(shares - expected).max() < 4 * np.sqrt(0.25 / count)


def test_top_k_and_top_p_keep_the_likeliest():
    shares = np.array([[0.1, 0.4, 0.2, 0.3]])
    logits = jnp.asarray(np.log(shares), jnp.float32)

    def kept(**options) -> list[int]:
        return np.flatnonzero(
            np.isfinite(restrict(logits, Sampling(1.0, **options)))[0]
        )

    assert list(kept()) == [0, 1, 2, 3]
    assert list(kept(top_k=2)) == [1, 3]
    assert list(kept(top_k=9)) == [0, 1, 2, 3]
    assert list(kept(top_p=0.39)) == [1]
    assert list(kept(top_p=0.69)) == [1, 3]
    assert list(kept(top_p=0.71)) == [1, 2, 3]
    assert list(kept(top_k=3, top_p=0.99)) == [1, 2, 3]
    assert list(kept(top_p=1.0)) == [0, 1, 2, 3]


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": 0}, {"top_p": 1.5}])
def test_wrong_sampling_is_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_sampling_without_a_key_is_refused():
    with pytest.raises(ValueError, match="needs a key"):
        _greedy("llama3", sampling=Sampling(0.5))


def test_one_compilation_serves_all_parameters():
    before = generate._cache_size()
    for seed in (5, 6, 7):
        tokens, valid = _padded("left", slots=11)
        generate(
            tiny_models.parameters("smollm2", seed),
            tokens,
            valid,
            config=tiny_models.config("smollm2"),
            max_new_tokens=3,
        )
    assert generate._cache_size() == before + 1
