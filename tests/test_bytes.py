"""The tensors of version 0.1.0's recipes keep their bytes, in all executors.

`bytes/v0_1.json` holds the checksums that version 0.1.0 wrote, made by running this
file as a script with that version installed. Not float64 inputs: that version merged
them in float32.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import checkpoints
import jax
import numpy as np
import pytest
import xxhash

import m3jax

RECORD = Path(__file__).parent / "bytes" / "v0_1.json"
SEED = 20250215
MIXUPS: dict[str, dict[str, Any]] = {
    "plain": {"alpha": None},
    "m3": {"alpha": 0.4},
    "fixed": {"ratios": (0.6, 0.3, 0.1)},
    "layer": {"alpha": 1.0, "granularity": "layer"},
    "tensor": {"alpha": 0.5, "granularity": "tensor"},
}
DARES: dict[str, dict[str, Any]] = {
    "none": {},
    "random": {"drop_rate": 0.3},
    "each": {"drop_rate": (0.2, 0.7, 0.5), "rescale": False},
    "all": {"drop_rate": 1.0},
    "weights": {"drop_rate": 0.2, "target": "weights"},
    "magnitude": {"drop_rate": 0.4, "strategy": "magnitude"},
    "magnitude_weights": {
        "drop_rate": 0.4,
        "strategy": "magnitude",
        "target": "weights",
    },
}
# Several tiles of 1024 elements, and shapes that eight devices share or do not.
SHAPES = {
    **checkpoints.ODD_SHAPES,
    "model.layers.2.mlp.down_proj.weight": (48, 96),
    "model.layers.2.mlp.gate_proj.weight": (8, 1000),
}


def cases() -> dict[str, dict[str, Any]]:
    """Recipe fields, dtype and number of models by name."""
    found = {}
    for method in ("average", "task_arithmetic", "ties"):
        for mixup in MIXUPS:
            for dare in DARES:
                if mixup not in ("plain", "m3") and dare not in ("none", "random"):
                    continue
                found[f"{method}-{mixup}-{dare}"] = {
                    "method": method,
                    "mixup": MIXUPS[mixup],
                    "dare": DARES[dare],
                    "scaling": 0.8,
                    "trim_rate": 0.6,
                }
    for method in ("average", "task_arithmetic", "ties"):
        own = {"method": method, "mixup": {"alpha": 0.4}, "dare": DARES["random"]}
        for dtype in ("bfloat16", "float16", "mixed"):
            found[f"{method}-{dtype}"] = {**own, "inputs": dtype}
        found[f"{method}-one"] = {**own, "number": 1}
        found[f"{method}-one-plain"] = {**own, "mixup": {"alpha": None}, "number": 1}
        found[f"{method}-two"] = {**own, "number": 2}
        found[f"{method}-first"] = {**own, "mixup": {"alpha": 0}}
        found[f"{method}-excluded"] = {**own, "exclude": (r"model\.layers\.1", "lm")}
        found[f"{method}-as-float32"] = {
            **own,
            "inputs": "bfloat16",
            "dtype": "float32",
        }
        for vocabulary in ("mean", "truncate"):
            found[f"{method}-{vocabulary}"] = {
                **own,
                "vocabulary": vocabulary,
                "rows": True,
            }
    found["ties-untrimmed"] = {"method": "ties", "trim_rate": 0.0}
    found["ties-trimmed"] = {"method": "ties", "trim_rate": 1.0}
    return found


def inputs(case: dict[str, Any]) -> tuple[Any, list[Any], m3jax.Recipe]:
    """Base, models and recipe of a case."""
    fields = dict(case)
    dtype = fields.pop("inputs", "float32")
    number = fields.pop("number", 3)
    rows = fields.pop("rows", False)
    wide = checkpoints.random_model(0, SHAPES)
    models = [checkpoints.random_model(i, SHAPES, base=wide) for i in range(1, 4)]
    trees = [wide, *models[:number]]
    for i, tree in enumerate(trees):
        for j, name in enumerate(tree):
            own = dtype
            if dtype == "mixed":
                own = ("float32", "bfloat16", "float16")[(i + j) % 3]
            kind = checkpoints.BFLOAT16 if own == "bfloat16" else np.dtype(own)
            tree[name] = tree[name].astype(kind)
            if rows and i == 2 and name in ("lm_head.weight", EMBEDDING):
                tree[name] = tree[name][:-3]
    return trees[0], trees[1:], m3jax.Recipe.from_dict(fields)


EMBEDDING = "model.embed_tokens.weight"


def checksum(values: Any) -> str:
    return xxhash.xxh3_128(np.ascontiguousarray(values).tobytes()).hexdigest()


def record(folder: Path) -> dict[str, dict[str, str]]:
    """The checksums of the installed version's merges."""
    found = {}
    for name, case in cases().items():
        base, models, recipe = inputs(case)
        paths = [
            checkpoints.write(folder / name / str(i), tree)
            for i, tree in enumerate([base, *models])
        ]
        output = folder / name / "out"
        execution = m3jax.Execution(fsync=False)
        m3jax.merge(paths[0], paths[1:], output, recipe, seed=SEED, execution=execution)
        merged = checkpoints.read(output)
        found[name] = {tensor: checksum(merged[tensor]) for tensor in sorted(merged)}
    return found


METHODS = ("average", "task_arithmetic", "ties")


def executions() -> list[Any]:
    """Each case streamed. In memory and over devices, which compile a program for every
    shape: in `make test` one method of every sixth, and twelfth, other choice."""
    found = []
    rest = list(dict.fromkeys(name.partition("-")[2] for name in cases()))
    for name in cases():
        method, _, own = name.partition("-")
        own, place = rest.index(own), METHODS.index(method)
        kept = {"in memory": own % 18 == 6 * place, "sharded": own % 36 == 12 * place}
        for how in ("streamed", "in memory", "sharded"):
            marks = () if kept.get(how, True) else pytest.mark.slow
            found.append(pytest.param(name, how, marks=marks))
    return found


@pytest.mark.parametrize(("name", "how"), executions())
def test_bytes_of_version_0_1(name: str, how: str, tmp_path: Path):
    expected = json.loads(RECORD.read_text())[name]
    base, models, recipe = inputs(cases()[name])
    if how == "in memory":
        merged = m3jax.merge_params(base, models, recipe, SEED)
    else:
        streamed = {"chunk_size": 1024, "threads": 3, "devices": jax.devices()[:1]}
        sharded = {"executor": "sharded", "mesh": {"rows": 4, "columns": 2}}
        settings: Any = streamed if how == "streamed" else sharded
        paths = [
            checkpoints.write(tmp_path / str(i), tree)
            for i, tree in enumerate([base, *models])
        ]
        output = tmp_path / "merged"
        execution = m3jax.Execution(fsync=False, **settings)
        m3jax.merge(paths[0], paths[1:], output, recipe, seed=SEED, execution=execution)
        merged = checkpoints.read(output)
    assert {t: checksum(merged[t]) for t in sorted(merged)} == expected


def test_the_record_is_broad():
    names = json.loads(RECORD.read_text())
    assert set(names) == set(cases())
    assert math.prod(map(len, (MIXUPS, DARES))) < len(names)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        text = json.dumps(record(Path(temporary)), indent=1, sort_keys=True)
    RECORD.write_text(text + "\n")
