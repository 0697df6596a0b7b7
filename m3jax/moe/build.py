"""A mixture as a checkpoint: the base's tensors, the experts' layers under new names.

Nothing is computed but the gates; the rest is read where it lies, so that the engine
streams a mixture as it streams any model.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from m3jax import prng
from m3jax.checkpoints import naming
from m3jax.checkpoints.errors import CheckpointError, shown
from m3jax.checkpoints.folder import Checkpoint, open_checkpoint
from m3jax.checkpoints.formats.dtypes import FLOAT32, Dtype
from m3jax.checkpoints.source import Array, Derived, Source, read
from m3jax.moe.document import Mixture
from m3jax.recipe import RecipeError

_LAYER = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.(weight|bias)")
_NOISE, _NOISE_KEY = 1 << 16, 5  # elements of a block; folded into the root key
_FAMILIES = {
    "llama": "mixtral",
    "mistral": "mixtral",
    "qwen2": "qwen2_moe",
    "qwen3": "qwen3_moe",
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How an architecture names the parts of its mixtures.

    Attributes:
      families: of dense models whose attention it has.
      experts: name of a projection of an expert, behind "model.layers.N.".
      gate: of the gates.
      projections: its words for gate, up and down.
      shared: of a projection of the shared expert; "": it has none.
      shared_gate: of the gate of the shared expert; "": it has none.
      shared_needed: it is not without one.
      config: (config.json of the base, experts, shared experts, experts per token) ->
        fields to change, None to remove.
    """

    families: tuple[str, ...]
    experts: str
    gate: str
    config: Callable[[Mapping[str, Any], int, int, int], dict[str, Any]]
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = ""
    shared_gate: str = ""
    shared_needed: bool = False


def _mixtral(
    config: Mapping[str, Any], experts: int, shared: int, per_token: int
) -> dict[str, Any]:
    dropped = ("attention_bias", "mlp_bias", "pretraining_tp")
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": experts,
        "num_experts_per_tok": per_token,
        "sliding_window": config.get("sliding_window"),
        **{field: None for field in dropped if field in config},
    }


def _qwen(
    config: Mapping[str, Any], experts: int, shared: int, per_token: int
) -> dict[str, Any]:
    inner, version = config["intermediate_size"], str(config["model_type"])[-1]
    found = {
        "architectures": [f"Qwen{version}MoeForCausalLM"],
        "model_type": f"qwen{version}_moe",
        "num_experts": experts,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": inner,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    }
    return found | ({"shared_expert_intermediate_size": inner} if shared else {})


def _deepseek(
    config: Mapping[str, Any], experts: int, shared: int, per_token: int
) -> dict[str, Any]:
    code = "deepseek-ai/deepseek-moe-16b-base--"
    return {
        "architectures": ["DeepseekForCausalLM"],
        "model_type": "deepseek",
        "auto_map": {
            "AutoConfig": f"{code}configuration_deepseek.DeepseekConfig",
            "AutoModel": f"{code}modeling_deepseek.DeepseekModel",
            "AutoModelForCausalLM": f"{code}modeling_deepseek.DeepseekForCausalLM",
        },
        "n_routed_experts": experts,
        "n_shared_experts": shared or None,
        "num_experts_per_tok": per_token,
        "moe_intermediate_size": config["intermediate_size"],
        "first_k_dense_replace": 0,
        "moe_layer_freq": 1,
        "norm_topk_prob": True,
        "scoring_func": "softmax",
        "sliding_window": None,
        "mlp_bias": None,
    }


LAYOUTS = {
    "mixtral": Layout(
        ("llama", "mistral"),
        "block_sparse_moe.experts.{expert}.{projection}.weight",
        "block_sparse_moe.gate.weight",
        _mixtral,
        ("w1", "w3", "w2"),
    ),
    "qwen2_moe": Layout(
        ("qwen2",),
        "mlp.experts.{expert}.{projection}.weight",
        "mlp.gate.weight",
        _qwen,
        shared="mlp.shared_expert.{projection}.weight",
        shared_gate="mlp.shared_expert_gate.weight",
        shared_needed=True,
    ),
    "qwen3_moe": Layout(
        ("qwen3",),
        "mlp.experts.{expert}.{projection}.weight",
        "mlp.gate.weight",
        _qwen,
    ),
    "deepseek": Layout(
        ("llama",),
        "mlp.experts.{expert}.{projection}.weight",
        "mlp.gate.weight",
        _deepseek,
        shared="mlp.shared_experts.{projection}.weight",
    ),
}


@dataclasses.dataclass(frozen=True)
class _Float32(Derived):
    """What is made of a tensor in float32, lying where that one does."""

    @property
    def dtype(self) -> Dtype:
        return FLOAT32

    @property
    def place(self) -> str:
        return str(getattr(self.source, "place", ""))


@dataclasses.dataclass(frozen=True)
class Scaled(_Float32):
    """A tensor times a number, rounded once to float32."""

    factor: float

    def read_into(self, out: np.ndarray, start: int) -> None:
        values = read(self.source, start, len(out))
        with np.errstate(over="ignore", invalid="ignore"):
            out[:] = values.astype(np.float64) * self.factor


@dataclasses.dataclass(frozen=True)
class Noisy(_Float32):
    """A tensor plus normal noise, float32: of each block of elements from the key
    fold_in(fold_in(key(seed), 5), the words of the name, the block)."""

    deviation: float
    seed: int
    name: str

    def read_into(self, out: np.ndarray, start: int) -> None:
        values = np.empty(len(out), self.source.dtype.numpy)
        self.source.read_into(values, start)
        for block in range(start // _NOISE, -(-(start + len(out)) // _NOISE)):
            first = max(block * _NOISE, start)
            stop = min((block + 1) * _NOISE, start + len(out))
            noise = self._noise(block)[first - block * _NOISE : stop - block * _NOISE]
            part = slice(first - start, stop - start)
            with np.errstate(over="ignore", invalid="ignore"):
                out[part] = values[part] + self.deviation * noise.astype(np.float64)

    def _noise(self, block: int) -> np.ndarray:
        import jax
        import jax.numpy as jnp

        key = prng.fold_in(prng.root_key(self.seed), _NOISE_KEY)
        for word in (*prng.name_words([self.name])[0], block):
            key = prng.fold_in(key, word)
        wrapped = jax.random.wrap_key_data(jnp.asarray(key))
        return np.asarray(jax.random.normal(wrapped, (_NOISE,), jnp.float32))


@dataclasses.dataclass(frozen=True)
class Gates(Derived):
    """Gates, written in the dtype of the base's tensors."""

    like: Source
    place: str

    @property
    def output_dtype(self) -> Dtype:
        return self.like.output_dtype


@contextlib.contextmanager
def opened(mixture: Mixture, seed: int) -> Any:
    """Opens the models of a mixture; yields the mixture as a `Checkpoint`.

    Raises:
      CheckpointError: a model does not fit the base; one line.
      RecipeError: the architecture does not fit.
    """
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(open_checkpoint(mixture.base))
        experts = [
            stack.enter_context(open_checkpoint(own.source, base=mixture.base))
            for own in (*mixture.experts, *mixture.shared)
        ]
        yield _built(mixture, *_named(base, experts), seed)


def _named(
    base: Checkpoint, experts: Sequence[Checkpoint]
) -> tuple[Checkpoint, list[Checkpoint]]:
    """The models with the base's names for their tensors."""
    named = naming.common([base, *experts])
    made = [
        dataclasses.replace(own, tensors=table)
        for own, table in zip((base, *experts), named.tables, strict=True)
    ]
    changes = {**base.changes, **named.config}
    notes = (*base.notes, *named.notes)
    first = dataclasses.replace(made[0], changes=changes, notes=notes)
    return first, made[1:]


def _built(
    mixture: Mixture, base: Checkpoint, experts: Sequence[Checkpoint], seed: int
) -> Checkpoint:
    from m3jax.moe.gates import gates

    architecture, layout = _layout(mixture, base)
    layers = _layers(base)
    for expert in experts:
        _check(expert, base, layers)
    tensors = {n: s for n, s in base.tensors.items() if not _LAYER.fullmatch(n)}
    routed = len(mixture.experts)
    for i, (own, expert) in enumerate(
        zip((*mixture.experts, *mixture.shared), experts, strict=True)
    ):
        form = layout.experts if i < routed else layout.shared
        for layer in range(layers):
            for kind, projection in zip(
                ("gate", "up", "down"), layout.projections, strict=True
            ):
                source = expert.tensors[f"model.layers.{layer}.mlp.{kind}_proj.weight"]
                new = form.format(expert=i, projection=projection)
                name = f"model.layers.{layer}.{new}"
                if own.noise:
                    source = Noisy(source, own.noise, seed, name)
                if kind == "down" and own.scale != 1.0:
                    source = Scaled(source, own.scale)
                tensors[name] = source
    like = base.tensors["model.layers.0.mlp.gate_proj.weight"]
    width = like.shape[1]
    rows = gates(
        mixture.gates, mixture.base, mixture.experts, layers, width, seed
    )  # (L, E, H)
    for layer in range(layers):
        array = Array(rows[layer], "gates")
        tensors[f"model.layers.{layer}.{layout.gate}"] = Gates(array, like, "gates")
    if layout.shared_gate:
        kind = mixture.gates if mixture.shared[0].positive else "cheap_embed"
        rows = _shared_gates(kind, mixture, layers, width, seed)
        for layer in range(layers):
            array = Array(rows[layer], "gates")
            new = f"model.layers.{layer}.{layout.shared_gate}"
            tensors[new] = Gates(array, like, "gates")
    config = base.config or {}
    changes = layout.config(config, routed, len(mixture.shared), mixture.per_token)
    fields = {**config, **changes}
    return dataclasses.replace(
        base,
        name=f"{architecture} of {', '.join(own.source for own in mixture.experts)}",
        revision=None,
        stored=dict(base.stored),
        tensors=dict(sorted(tensors.items())),
        files=tuple(dict.fromkeys(f for own in (base, *experts) for f in own.files)),
        config={field: own for field, own in fields.items() if own is not None},
        changes={**base.changes, **changes},
        notes=tuple(note for own in (base, *experts) for note in own.notes),
        built={"moe": mixture.to_dict()},
        parts=tuple(one for own in (base, *experts) for one in own.parents),
    )


def _shared_gates(
    kind: str, mixture: Mixture, layers: int, width: int, seed: int
) -> np.ndarray:
    """(layers, 1, width); 0, so that half of the expert is added, without prompts."""
    from m3jax.moe.gates import gates

    if not mixture.shared[0].positive:
        return np.zeros((layers, 1, width), np.float32)
    return gates(kind, mixture.base, mixture.shared, layers, width, seed)


def _layout(mixture: Mixture, base: Checkpoint) -> tuple[str, Layout]:
    config = base.config or {}
    family = config.get("model_type")
    name = mixture.architecture or _FAMILIES.get(str(family))
    if mixture.architecture is None and mixture.shared and name == "mixtral":
        name = "deepseek"
    known = ", ".join(_FAMILIES)
    if name is None:
        raise CheckpointError(
            f"{base.name}: model_type {shown(family)} makes no mixture; known: {known}"
        )
    layout = LAYOUTS[name]
    if family not in layout.families:
        raise RecipeError(
            f"architecture={name} takes {' and '.join(layout.families)} models, "
            f"{base.name} is {shown(family)}"
        )
    if config.get("attention_bias") or config.get("mlp_bias"):
        raise CheckpointError(f"{base.name}: has biases, which {name} has no place for")
    shared = len(mixture.shared)
    if shared > bool(layout.shared) or (layout.shared_needed and not shared):
        needed = "exactly one" if layout.shared_needed else "at most one"
        needed = needed if layout.shared else "none"
        raise RecipeError(f"shared_experts: {name} has {needed}, not {shared}")
    return name, layout


def _layers(base: Checkpoint) -> int:
    found = [m for name in base.tensors if (m := _LAYER.fullmatch(name))]
    layers = (base.config or {}).get("num_hidden_layers")
    if type(layers) is not int or len(found) != 3 * layers or not layers:
        raise CheckpointError(
            f"{base.name}: holds {len(found)} tensors of feed-forward layers, "
            f"num_hidden_layers = {shown(layers)} needs three each; give a dense model"
        )
    return layers


def _check(expert: Checkpoint, base: Checkpoint, layers: int) -> None:
    """Raises CheckpointError unless the expert's layers are as the base's."""
    for layer in range(layers):
        for kind in ("gate", "up", "down"):
            name = f"model.layers.{layer}.mlp.{kind}_proj.weight"
            own, wanted = expert.tensors.get(name), base.tensors[name]
            if own is None or own.shape != wanted.shape:
                found = "is missing" if own is None else f"has shape {list(own.shape)}"
                raise CheckpointError(
                    f"{expert.name}: tensor {shown(name)} {found}, {base.name} has "
                    f"{list(wanted.shape)}; experts are models of one architecture"
                )
    families = [(own.config or {}).get("model_type") for own in (base, expert)]
    if families[0] != families[1]:
        raise CheckpointError(
            f"{expert.name}: is {shown(families[1])}, {base.name} {shown(families[0])}"
        )
