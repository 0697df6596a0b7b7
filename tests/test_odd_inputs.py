"""Models as people have them, mixed: merged to what they say, or refused."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from checkpoints import Tensors, decode, encode, random_model, read
from hypothesis import event, given, settings
from hypothesis import strategies as st
from test_torch_file import pickled_tensors

import m3jax
from m3jax.checkpoints.errors import CheckpointError
from m3jax.engine.verify import verify

SHAPES = {
    "model.embed_tokens.weight": (5, 3),
    "model.layers.0.w.weight": (4, 3),
    "model.norm.weight": (3,),
}
BASE, A, B = (random_model(seed, SHAPES) for seed in range(3))
PLAIN = m3jax.Recipe(mixup=m3jax.Mixup(alpha=None))
NAMES = sorted(SHAPES)
HALVES = (NAMES[:2], NAMES[2:])


def pickle_of(tensors: Tensors) -> bytes:
    strides = {1: (1,), 2: (3, 1)}
    return pickled_tensors(
        {n: (t.reshape(-1), 0, t.shape, strides[t.ndim]) for n, t in tensors.items()}
    )


def in_shards(stem: str, suffix: str, encoder: Callable[[Tensors], bytes]):
    def build(folder: Path, tensors: Tensors) -> None:
        weight_map = {}
        for i, names in enumerate(HALVES, start=1):
            file = f"{stem}-0000{i}-of-00002.{suffix}"
            (folder / file).write_bytes(encoder({n: tensors[n] for n in names}))
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))

    return build


def whole(name: str, encoder: Callable[[Tensors], bytes]):
    return lambda folder, tensors: (folder / name).write_bytes(encoder(tensors))


LAYOUTS = {
    "safetensors": whole("model.safetensors", encode),
    "any name": whole("weights.safetensors", encode),
    "shards": in_shards("model", "safetensors", encode),
    "pickle": whole("pytorch_model.bin", pickle_of),
    "pth": whole("final.pth", pickle_of),
    "pickled shards": in_shards("pytorch_model", "bin", pickle_of),
}


def without_index(folder: Path) -> bool:
    for index in folder.glob("*.index.json"):
        index.unlink()
    return True


def beside(folder: Path) -> bool:
    """What trainers and hubs leave; nothing of it is a model's."""
    for name in (
        "training_args.bin",
        "optimizer.pt",
        "rng_state.pth",
        ".gitattributes",
    ):
        (folder / name).write_bytes(b"\x80\x02.")
    (folder / "adapter_model.safetensors").write_bytes(encode({"x": np.ones(2)}))
    return True


def stale(folder: Path) -> bool:
    """Another shard still holds an old copy; the index says which one counts."""
    if not (folder / "model.safetensors.index.json").exists():
        return True
    path = folder / "model-00002-of-00002.safetensors"
    old = {NAMES[0]: np.zeros((5, 3), np.float32), "gone": np.zeros(2, np.float32)}
    rest = {n: read(folder)[n] for n in HALVES[1]}
    path.write_bytes(encode({**rest, **old}))
    return True


def marked(folder: Path) -> bool:
    config = folder / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    return True


def as_links(folder: Path) -> bool:
    blobs = folder.parent / "models--o--n" / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    for path in list(folder.iterdir()):
        path.rename(blobs / f"{folder.name}-{path.name}")
        path.symlink_to(blobs / f"{folder.name}-{path.name}")
    return True


def of_the_model(folder: Path) -> list[Path]:
    """The files that hold its tensors."""
    others = ("adapter", "optimizer", "rng", "training")
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix in (".safetensors", ".bin", ".pth")
        and not path.name.startswith(others)
    )


def lost(folder: Path) -> bool:
    """One file of the tensors' is not there any more."""
    of_the_model(folder)[0].unlink()
    return False


def cut_off(folder: Path) -> bool:
    path = max(of_the_model(folder), key=lambda path: path.stat().st_size)
    os.truncate(path, path.stat().st_size - 5)
    return False


def quantised(folder: Path) -> bool:
    """Scales beside codes, whatever else is there."""
    path = folder / "model.safetensors"
    if not path.exists() or path.is_symlink():
        return True
    codes = {"q.weight": np.ones((2, 2), np.int8), "q.weight_scale": np.ones(2)}
    path.write_bytes(encode({**decode(path.read_bytes()), **codes}))
    return False


# In this order, whichever are drawn.
ODDITIES = (quantised, stale, without_index, beside, marked, cut_off, lost, as_links)


@settings(max_examples=40)
@given(data=st.data())
def test_a_merge_is_what_the_models_say_or_one_line(data) -> None:
    """Whatever is mixed: exit 0 means the mean of the two, to the last tensor."""
    with tempfile.TemporaryDirectory() as scratch:
        root, sound = Path(scratch), True
        for name, tensors in (("base", BASE), ("a", A), ("b", B)):
            folder = root / name
            folder.mkdir()
            LAYOUTS[data.draw(st.sampled_from(sorted(LAYOUTS)))](folder, tensors)
            (folder / "config.json").write_text('{"model_type": "llama"}')
            chosen = data.draw(
                st.lists(st.sampled_from(range(len(ODDITIES))), max_size=3, unique=True)
            )
            for place in sorted(chosen):
                sound &= ODDITIES[place](folder)
        try:
            m3jax.merge(root / "base", [root / "a", root / "b"], root / "out", PLAIN)
        except CheckpointError as error:
            event("refused")
            assert not sound, error
            assert "\n" not in str(error)
            assert not (root / "out").exists()
            return
        event("merged")
        assert sound, "merged what is damaged"
        assert verify(root / "out") == []
        made = read(root / "out")
        assert made.keys() == SHAPES.keys()
        for name in SHAPES:
            np.testing.assert_allclose(made[name], (A[name] + B[name]) / 2, rtol=1e-6)
        assert (root / "out" / "config.json").read_bytes().startswith(b"{")
