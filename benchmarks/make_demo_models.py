"""Trains the models of `m3jax demo`: a base and an expert in each of three skills.

    python benchmarks/make_demo_models.py

It writes m3jax/demo_data: four Llama checkpoints of 142,000 parameters with a tokenizer
of single characters, the tasks that they are scored on, and training.json, which
records settings, versions and scores. It takes a minute or two on two cores, and optax.

The seeds fix the first weights, the examples and their order. On another machine or
with other versions the weights differ, since sums round differently, and the scores
nearly agree.
"""

from __future__ import annotations

import functools
import itertools
import json
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import demo_skills
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from demo_skills import SKILLS
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel

import m3jax
from m3jax.checkpoints.formats import tree
from m3jax.models.config import Config
from m3jax.models.decoder import forward, parameter_shapes, read_config
from m3jax.models.layers import Parameters

_OUTPUT = flags.DEFINE_string(
    "output",
    str(Path(__file__).parent.parent / "m3jax" / "demo_data"),
    "The folder to make anew.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Of first weights, examples and their order.")
_BASE_STEPS = flags.DEFINE_integer("base_steps", 100, "On all skills alike.")
_EXPERT_STEPS = flags.DEFINE_integer("expert_steps", 250, "Mostly on one skill.")
_BASE_RATE = flags.DEFINE_float("base_rate", 3e-3, "Highest learning rate of the base.")
_EXPERT_RATE = flags.DEFINE_float("expert_rate", 1e-3, "Highest of an expert.")
_BASE_SHARE = flags.DEFINE_integer("base_share", 64, "Examples of a skill in a batch.")
_EXPERT_SHARE = flags.DEFINE_integer("expert_share", 96, "Those of the expert's own.")
# Without any, an expert forgets all else, and so does every merge that it is part of.
_REPLAYED = flags.DEFINE_integer("replayed", 6, "Those of each other skill.")

BEGIN, END, UNKNOWN = SPECIAL = ("<s>", "</s>", "<unk>")
VOCABULARY = {text: i for i, text in enumerate((*SPECIAL, *demo_skills.ALPHABET))}
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": len(VOCABULARY),
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": VOCABULARY[BEGIN],
    "eos_token_id": VOCABULARY[END],
    "dtype": "bfloat16",
}
POOL = 30_000  # examples of a skill that training draws from
# Of each skill; of the 10,000 sums about 500 are in each part.
# `train` is what `m3jax learn` learns from; the answers there need not be read.
ASKED = {"train": 256, "validation": 200, "test": 400}

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]


def encode(skill: str, pairs: Sequence[tuple[str, str]]) -> Batch:
    """Tokens (n, T) int32, which of them there are, and which are of the answer."""
    tokens = np.zeros((len(pairs), demo_skills.LONGEST), np.int32)
    valid, learnt = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    for row, (text, answer) in enumerate(pairs):
        prompt = [BEGIN, *SKILLS[skill].template.format(text=text)]
        whole = [VOCABULARY[part] for part in (*prompt, *answer, END)]
        tokens[row, : len(whole)] = whole
        valid[row, : len(whole)] = True
        learnt[row, len(prompt) : len(whole)] = True
    return tokens, valid, learnt


def questions(skill: str, part: str, count: int) -> list[tuple[str, str]]:
    found = demo_skills.examples(skill, part, _SEED.value)
    return list(itertools.islice(found, count))


def first_weights(config: Config) -> Parameters:
    """Normal, of deviation 1/√inputs; less where layers add to the residual stream."""
    rng = np.random.default_rng(_SEED.value)
    found = {}
    for name, shape in parameter_shapes(config).items():
        if "norm" in name:
            found[name] = jnp.ones(shape, jnp.float32)
            continue
        deviation = shape[1] ** -0.5
        if "o_proj" in name or "down_proj" in name:
            deviation *= (2 * config.num_layers) ** -0.5
        found[name] = jnp.asarray(rng.standard_normal(shape, np.float32) * deviation)
    return tree.nest(found)


def loss(parameters: Parameters, batch: Batch, config: Config) -> jax.Array:
    """Mean cross-entropy of the tokens of the answers, nats."""
    tokens, valid, learnt = batch
    logits = forward(parameters, tokens, config=config, valid=valid)[:, :-1]
    each = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.sum(each * learnt[:, 1:]) / jnp.sum(learnt[:, 1:])


@functools.partial(jax.jit, static_argnames="config")
def accuracy(parameters: Parameters, batch: Batch, config: Config) -> jax.Array:
    """Share of answers that greedy decoding gives, every token of them."""
    tokens, valid, learnt = batch
    logits = forward(parameters, tokens, config=config, valid=valid)[:, :-1]
    right = (jnp.argmax(logits, axis=-1) == tokens[:, 1:]) | ~learnt[:, 1:]
    return jnp.mean(jnp.all(right, axis=1))


def train(
    parameters: Parameters,
    pools: Mapping[str, Batch],
    shares: Mapping[str, int],
    config: Config,
    *,
    steps: int,
    rate: float,
    seed: Sequence[int],
) -> Parameters:
    """Adam with a warm-up and a cosine; every batch has `shares` of the pools."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, rate, warmup_steps=steps // 10, decay_steps=steps, end_value=rate / 20
    )
    optimiser = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98)
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(parameters: Parameters, state: Any, batch: Batch) -> tuple[Any, Any]:
        slope = jax.grad(loss)(parameters, batch, config)
        update, state = optimiser.update(slope, state, parameters)
        return optax.apply_updates(parameters, update), state

    rng = np.random.default_rng(seed)
    parameters = jax.tree.map(jnp.copy, parameters)  # the caller's are not donated
    state = optimiser.init(parameters)
    for _ in range(steps):
        parts = []
        for skill, share in shares.items():
            rows = rng.integers(POOL, size=share)
            parts.append([array[rows] for array in pools[skill]])
        batch = tuple(map(np.concatenate, zip(*parts, strict=True)))
        parameters, state = step(parameters, state, batch)
    return parameters


def write_tokenizer(folder: Path) -> None:
    """Every character is a token; a text begins with BEGIN."""
    tokenizer = Tokenizer(WordLevel(VOCABULARY, unk_token=UNKNOWN))
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", special_tokens=[(BEGIN, VOCABULARY[BEGIN])]
    )
    tokenizer.decoder = decoders.Fuse()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "unk_token": UNKNOWN,
    }
    write_json(folder / "tokenizer_config.json", settings)


def write_model(folder: Path, parameters: Parameters) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    small = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), parameters)
    m3jax.save(small, folder)
    write_json(folder / "config.json", CONFIG)
    write_tokenizer(folder)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")


def write_tasks(folder: Path) -> None:
    folder.mkdir()
    for part, count in ASKED.items():
        specs = []
        for skill, own in SKILLS.items():
            data = f"{skill}_{part}.jsonl"
            lines = [
                json.dumps({"text": text, "answer": answer}) + "\n"
                for text, answer in questions(skill, part, count)
            ]
            (folder / data).write_text("".join(lines))
            spec = {"name": skill, "kind": "exact_match", "data": data}
            spec |= {"prompt": own.template, "answer": "{answer}"}
            specs.append(spec | {"max_new_tokens": 9})
        write_json(folder / f"{part}.json", {"tasks": specs})


def main(argv: list[str]) -> None:
    del argv
    started = time.perf_counter(), time.process_time()
    config = read_config(CONFIG)
    pools = {skill: encode(skill, questions(skill, "train", POOL)) for skill in SKILLS}
    held_out = {
        skill: encode(skill, questions(skill, "validation", ASKED["validation"]))
        for skill in SKILLS
    }
    scores: dict[str, dict[str, float]] = {}

    def note(name: str, parameters: Parameters) -> None:
        scores[name] = {
            skill: round(float(accuracy(parameters, batch, config)), 4)
            for skill, batch in held_out.items()
        }
        seconds = time.perf_counter() - started[0]
        print(f"{name:8}{scores[name]}  after {seconds:.0f} s", flush=True)

    models = {
        "base": train(
            first_weights(config),
            pools,
            dict.fromkeys(SKILLS, _BASE_SHARE.value),
            config,
            steps=_BASE_STEPS.value,
            rate=_BASE_RATE.value,
            seed=(_SEED.value, 0),
        )
    }
    note("base", models["base"])
    for place, skill in enumerate(SKILLS, start=1):
        models[skill] = train(
            models["base"],
            pools,
            dict.fromkeys(SKILLS, _REPLAYED.value) | {skill: _EXPERT_SHARE.value},
            config,
            steps=_EXPERT_STEPS.value,
            rate=_EXPERT_RATE.value,
            seed=(_SEED.value, place),
        )
        note(skill, models[skill])

    output = Path(_OUTPUT.value)
    shutil.rmtree(output, ignore_errors=True)
    for name, parameters in models.items():
        write_model(output / name, parameters)
    write_tasks(output / "tasks")
    record = {
        "command": "python benchmarks/make_demo_models.py",
        "settings": {
            flag.name: flag.value
            for flag in (
                *(_SEED, _BASE_STEPS, _EXPERT_STEPS, _BASE_RATE, _EXPERT_RATE),
                *(_BASE_SHARE, _EXPERT_SHARE, _REPLAYED),
            )
        },
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(models["base"])),
        "validation_accuracy": scores,
        "seconds": round(time.perf_counter() - started[0]),
        "processor_seconds": round(time.process_time() - started[1]),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("jax", "jaxlib", "numpy", "optax")},
        },
    }
    write_json(output / "training.json", record)


if __name__ == "__main__":
    app.run(main)
