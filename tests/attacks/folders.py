"""Checkpoints that try something; each is refused with one line.

Each builder makes files in an empty folder and returns what the user is to type. Its
key says what it tries; the text beside it is what the message has to say.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import encode

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SECRET = b"a private file of the user's"

Builder = Callable[[Path], Path]


def tensors(*names: str) -> bytes:
    """A safetensors file of small tensors."""
    return encode({name: np.arange(4, dtype=np.float32) for name in names})


def files(**contents: bytes | str) -> Builder:
    """Files by name; `__` stands for a dot."""

    def build(folder: Path) -> Path:
        for name, content in contents.items():
            path = folder / name.replace("__", ".")
            path.write_bytes(
                content if isinstance(content, bytes) else content.encode()
            )
        return folder

    return build


def _index(weight_map: Any, **more: Any) -> Builder:
    """Two shards, of tensors a and b, and an index that says something else."""

    def build(folder: Path) -> Path:
        (folder / "one.safetensors").write_bytes(tensors("a"))
        (folder / "two.safetensors").write_bytes(tensors("b"))
        text = json.dumps({"weight_map": weight_map, **more})
        (folder / INDEX).write_text(text)
        return folder

    return build


def _index_text(text: bytes | str) -> Builder:
    return files(**{INDEX.replace(".", "__"): text})


def _config(text: bytes | str) -> Builder:
    return files(model__safetensors=tensors("a"), config__json=text)


def _in_place_of(name: str, make: Callable[[Path], object]) -> Builder:
    """A sound checkpoint but for one file."""

    def build(folder: Path) -> Path:
        if name != WEIGHTS:
            (folder / WEIGHTS).write_bytes(tensors("a"))
        if name == INDEX:
            (folder / WEIGHTS).rename(folder / "one.safetensors")
        make(folder / name)
        return folder

    return build


def _typed(name: str, make: Callable[[Path], object]) -> Builder:
    """Something that the user names itself."""

    def build(folder: Path) -> Path:
        make(folder / name)
        return folder / name

    return build


def _socket(path: Path) -> None:
    # A socket's path is short; the file stays when the socket is closed.
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as endpoint:
            endpoint.bind(path.name)
    finally:
        os.chdir(here)


def _sparse(size: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.write_bytes(b"{")
        os.truncate(path, size)

    return make


def link_to_secret(path: Path) -> None:
    """A link to a file beside the checkpoint's folder."""
    secret = path.parent.parent / "secret"
    secret.write_bytes(SECRET)
    path.symlink_to(secret)


def _snapshot_with_false_blobs(folder: Path) -> Path:
    """The layout of the hub's cache, in which blobs leads to another place."""
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "blob").write_bytes(tensors("a"))
    snapshot = folder / "cache" / "snapshots" / "commit"
    snapshot.mkdir(parents=True)
    (folder / "cache" / "blobs").symlink_to(folder / "elsewhere")
    (snapshot / WEIGHTS).symlink_to("../../blobs/blob")
    return snapshot


def _blobs_without_a_snapshot(folder: Path) -> Path:
    """Something beside that happens to be called blobs."""
    (folder / "blobs").mkdir()
    (folder / "blobs" / "blob").write_bytes(tensors("a"))
    model = folder / "models" / "mine"
    model.mkdir(parents=True)
    (model / WEIGHTS).symlink_to("../../blobs/blob")
    return model


def _snapshot_of_another_model(folder: Path) -> Path:
    (folder / "other" / "blobs").mkdir(parents=True)
    (folder / "other" / "blobs" / "blob").write_bytes(tensors("a"))
    snapshot = folder / "cache" / "snapshots" / "commit"
    snapshot.mkdir(parents=True)
    (snapshot / WEIGHTS).symlink_to("../../../other/blobs/blob")
    return snapshot


_BOTH = {"a": "one.safetensors", "b": "two.safetensors"}
_IN_THE_SAME_FOLDER = "needs the plain name of a file in the same folder"
_NOT_REGULAR = "needs to be a regular file"

ATTACKS: dict[str, tuple[Builder, str]] = {
    # What is no file.
    "FIFO as weights": (_in_place_of(WEIGHTS, os.mkfifo), f"is a FIFO, {_NOT_REGULAR}"),
    "FIFO as index": (_in_place_of(INDEX, os.mkfifo), "is a FIFO"),
    "FIFO as config": (_in_place_of("config.json", os.mkfifo), "is a FIFO"),
    "FIFO typed": (_typed("x.safetensors", os.mkfifo), "is a FIFO"),
    "socket as weights": (_in_place_of(WEIGHTS, _socket), "is a socket"),
    "folder as weights": (_in_place_of(WEIGHTS, Path.mkdir), "is a folder"),
    "folder as index": (_in_place_of(INDEX, Path.mkdir), "is a folder"),
    "folder as config": (_in_place_of("config.json", Path.mkdir), "is a folder"),
    "device typed": (lambda folder: Path("/dev/zero"), "is a device"),
    "device as weights": (
        _in_place_of(WEIGHTS, lambda path: path.symlink_to("/dev/zero")),
        "a link that leads out of the folder, to '/dev/zero'",
    ),
    # Links.
    "weights elsewhere": (_in_place_of(WEIGHTS, link_to_secret), "leads out of the"),
    "index elsewhere": (_in_place_of(INDEX, link_to_secret), "leads out of the folder"),
    "config elsewhere": (
        _in_place_of("config.json", link_to_secret),
        "copy the file into the folder",
    ),
    "link to nothing": (
        _in_place_of(WEIGHTS, lambda path: path.symlink_to("nothing")),
        "is a link to nothing; copy or download it again",
    ),
    "config a link to nothing": (
        _in_place_of("config.json", lambda path: path.symlink_to("nothing")),
        "is a link to nothing",
    ),
    "link to itself": (
        _in_place_of(WEIGHTS, lambda path: path.symlink_to(path.name)),
        "is a link to nothing",
    ),
    "cache whose blobs are elsewhere": (_snapshot_with_false_blobs, "leads out of the"),
    "blobs of no cache": (_blobs_without_a_snapshot, "leads out of the folder"),
    "blob of another model": (_snapshot_of_another_model, "leads out of the folder"),
    # Paths in an index.
    "index leads up": (
        _index({**_BOTH, "b": "../two.safetensors"}),
        f"tensor 'b' is said to be in '../two.safetensors'; {_IN_THE_SAME_FOLDER}",
    ),
    "index leads to the root": (_index({"a": "/etc/passwd"}), _IN_THE_SAME_FOLDER),
    "index leads down": (_index({"a": "sub/one.safetensors"}), _IN_THE_SAME_FOLDER),
    "index with a backslash": (_index({"a": "..\\x.safetensors"}), _IN_THE_SAME_FOLDER),
    "index names the folder": (_index({"a": "."}), _IN_THE_SAME_FOLDER),
    "index names the parent": (_index({"a": ".."}), _IN_THE_SAME_FOLDER),
    "index names nothing": (_index({"a": ""}), _IN_THE_SAME_FOLDER),
    "index with NUL": (_index({"a": "one.safetensors\0"}), _IN_THE_SAME_FOLDER),
    "index with a newline": (_index({"a": "one\n.safetensors"}), _IN_THE_SAME_FOLDER),
    "index with a long name": (_index({"a": "n" * 300}), _IN_THE_SAME_FOLDER),
    "index with a name of 600 bytes": (_index({"a": "é" * 255}), "is missing"),
    "shard elsewhere": (
        lambda folder: (
            link_to_secret(folder / "three.safetensors"),
            _index({**_BOTH, "c": "three.safetensors"})(folder),
        )[1],
        "leads out of the folder",
    ),
    "shard is a folder": (
        lambda folder: (
            (folder / "three.safetensors").mkdir(),
            _index({**_BOTH, "c": "three.safetensors"})(folder),
        )[1],
        "three.safetensors: is a folder",
    ),
    # An index that is wrong.
    "shard missing": (
        _index({**_BOTH, "c": "three.safetensors"}),
        "file 'three.safetensors' is missing; copy or download it again",
    ),
    "tensor in the wrong shard": (
        _index({"a": "two.safetensors", "b": "one.safetensors"}),
        "tensor 'a' and 1 more is said to be in 'two.safetensors', which does not hold "
        "it; 'one.safetensors' does; fetch the index and the files again, or mend",
    ),
    "tensor in no shard": (
        _index({**_BOTH, "c": "one.safetensors"}),
        "tensor 'c' is said to be in 'one.safetensors', which does not hold it; fetch",
    ),
    "index of texts": (_index(["one.safetensors"]), "needs an object"),
    "index of numbers": (_index({"a": 1}), "needs a string"),
    "index without a map": (_index_text('{"metadata":{}}'), "has no weight_map"),
    "index with an empty map": (_index({}), "has no weight_map"),
    "index is a list": (_index_text("[]"), "needs an object at character 0"),
    "index is empty": (_index_text(""), "needs an object at character 0"),
    "index is cut off": (_index_text('{"weight_map":{"a":"one'), "not valid JSON"),
    "index is not UTF-8": (_index_text(b'{"\xff"'), "not valid JSON"),
    "index goes on": (_index_text('{"weight_map":{"a":"b"}} {}'), "needs its end"),
    "index with two maps": (
        _index_text('{"weight_map":{"a":"b"},"weight_map":{"a":"c"}}'),
        "has 'weight_map' twice; fetch it again, or mend it",
    ),
    "index with a tensor twice": (
        _index_text('{"weight_map":{"a":"b","a":"c"}}'),
        "has tensor 'a' twice",
    ),
    "index with a deep part": (
        _index_text('{"metadata":' + "[" * 60_000 + '],"weight_map":{}}'),
        "nested too deeply|not valid JSON",
    ),
    "index with a long part": (
        _index_text('{"metadata":"' + "x" * 70_000 + '","weight_map":{"a":"b"}}'),
        "a part is longer than 65536 characters",
    ),
    "index of 100 MB": (
        _in_place_of(INDEX, _sparse(100_000_001)),
        "has 100000001 bytes, at most 100000000 are read",
    ),
    # Folders that hold no checkpoint.
    "empty folder": (files(), "neither model.safetensors nor model.safetensors.index"),
    "several files without an index": (
        files(x__safetensors=tensors("a"), y__safetensors=tensors("b")),
        "2 safetensors files ('x.safetensors', 'y.safetensors') and neither",
    ),
    "many files without an index": (
        files(**{f"{i}__safetensors": tensors("a") for i in range(5)}),
        "5 safetensors files ('0.safetensors', '1.safetensors', '2.safetensors', …)",
    ),
    "shards of which one is missing": (
        files(**{"pytorch_model-00001-of-00002__bin": b"\x80\x02"}),
        "shard 'pytorch_model-00002-of-00002.bin' is missing, 1 of 2 are there",
    ),
    "two sets of shards": (
        files(
            **{
                f"model-00001-of-0000{n}__safetensors": tensors("a", f"b{n}")
                for n in (3, 4)
            }
        ),
        "holds 2 sets of shards and no index",
    ),
    "a shard of 10**9": (
        files(**{"model-00001-of-999999999__safetensors": tensors("a")}),
        "shard 'model-00002-of-999999999.safetensors' is missing",
    ),
    "checkpoint of PyTorch Lightning, cut off": (files(last__ckpt=b""), "last.ckpt: s"),
    "GGUF, cut off": (files(**{"llama-q4__gguf": b"GGUF"}), "in the middle|gguf_file"),
    "adapter without its config": (
        files(adapter_model__safetensors=tensors("a")),
        "holds an adapter (LoRA) and has no adapter_config.json; fetch it again",
    ),
    "pickle typed": (
        _typed("pytorch_model.bin", lambda path: path.write_bytes(b"\x80\x02}q\0.")),
        "is a pickle, but not one of torch.save, so it holds no tensors",
    ),
    "GGUF typed": (
        _typed("x.gguf", lambda path: path.write_bytes(b"")),
        "in the middle of its header; fetch it again, or convert it",
    ),
    "something else typed": (
        _typed(
            "x.png", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99))
        ),
        "this is no safetensors file, or it is damaged",
    ),
    "name with an escape sequence": (
        lambda folder: (
            files(x__safetensors=tensors("a"))(folder),
            (folder / "\x1b[2J.safetensors").write_bytes(tensors("b")),
        )[0],
        r"'\x1b[2J.safetensors'",
    ),
    # config.json that is not what it says.
    "config is a list": (
        _config("[]"),
        "is not a JSON object; fetch it again, or mend",
    ),
    "config is a number": (_config("1"), "config.json is not a JSON object"),
    "config is empty": (_config(""), "not valid JSON"),
    "config is not UTF-8": (_config(b'{"a":"\xff"}'), "not valid JSON"),
    "config with a key twice": (
        _config('{"vocab_size":1,"vocab_size":2}'),
        "the key 'vocab_size' stands there twice",
    ),
    "config is deep": (_config('{"a":' + "[" * 100_000 + "1"), "nested too deeply"),
    "config with a number of 5000 digits": (
        _config('{"a":' + "9" * 5000 + "}"),
        "not valid JSON",
    ),
    "config of 8 MB": (
        _in_place_of("config.json", _sparse(8_000_001)),
        "has 8000001 bytes, at most 8000000 are read",
    ),
    # What the user may mistype.
    "no such folder": (
        lambda folder: folder / "nothing",
        "no such file or folder; give",
    ),
    "no such user": (
        lambda folder: Path("~nobody-of-this-name/x/y"),
        "no such file or",
    ),
    "a long name": (lambda folder: folder / ("n" * 5000), "no such file or folder"),
    "a name with NUL": (lambda folder: folder / "\0", "no such file or folder"),
}
