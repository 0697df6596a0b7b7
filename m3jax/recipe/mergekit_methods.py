"""mergekit's methods by name: which step each is, and where its parameters go."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from m3jax.methods import METHODS as OURS
from m3jax.methods.fields import Choice, Number, Weights
from m3jax.recipe.problems import RecipeError, nearest
from m3jax.recipe.values import mapped

Entries = dict[str, dict[str, Any]]  # parameters by model
Fields = Mapping[str, Any]
Steps = dict[str, dict[str, Any]]  # fields by the name of a step


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter of a mergekit method.

    Attributes:
      name: in the YAML.
      default: None: it is required, unless it is optional.
      per_model: it may stand with a model.
      word: the same for all tensors: one of `options`.
      weight: M3 takes its place.
      optional: it may be missing, and has no default then.
      options: of a word.
    """

    name: str
    default: Any = None
    per_model: bool = False
    word: bool = False
    weight: bool = False
    optional: bool = False
    options: tuple[Any, ...] = (True, False)

    @property
    def required(self) -> bool:
        return self.default is None and not self.optional


@dataclasses.dataclass(frozen=True)
class MergekitMethod:
    """A method of mergekit.

    Attributes:
      native: ours.
      parameters: that it has.
      steps: (parameters by name, whether there is a base) -> fields of our steps.
      base: what the base is. ``model``: one of the models, put behind the others where
        it is not among them; ``first``: the first of them, needed; ``task``: what the
        task vectors are taken from, needed; ``origin``: the same, not needed.
      others: how many models there are beside the base; the least and the most.
    """

    native: str
    parameters: tuple[Parameter, ...]
    steps: Callable[[Fields, bool], Steps]
    base: str = "task"
    others: tuple[int, float] = (0, float("inf"))

    @property
    def takes_weight_0(self) -> bool:
        """Whether a model of weight 0 is as good as none."""
        return self.native in ("linear", "generalized_task_arithmetic")

    def arranged(
        self, name: str, base: str | None, entries: Entries, sliced: bool = False
    ) -> tuple[str | None, Entries]:
        """The base and the models as our method takes them.

        Args:
          name: of the method.
          base: of the document or slice.
          entries: its models.
          sliced: in a slice a model is merged only if it stands there.

        Raises:
          RecipeError: there is no base, or there are too many models or too few.
        """
        if base is None and self.base in ("first", "task"):
            raise RecipeError(f"merge_method {name} needs base_model")
        others = {model: own for model, own in entries.items() if model != base}
        low, high = self.others
        if not low <= len(others) <= high:
            wanted = f"{low}" if low == high else f"{low} or more"
            beside = " beside base_model" if base else ""
            raise RecipeError(
                f"merge_method {name} takes {wanted} models{beside}, not {len(others)}"
            )
        if base is None or self.base == "origin":
            return base, others
        if self.base == "task":
            # The base alone is merged with itself: its task vector is 0.
            return base, others or {base: {"weight": 0.0}}
        own = {base: entries.get(base, {})}
        if self.base == "first":
            return base, {**own, **others}
        if sliced or base in entries:
            return base if base in entries else None, entries
        return base, {**entries, **own}


def _one(native: str, **renamed: str) -> Callable[[Fields, bool], Steps]:
    """Fields of one step, under other names."""
    return lambda fields, has_base: {
        native: {renamed.get(name, name): own for name, own in fields.items()}
    }


def _slerp(fields: Fields, has_base: bool) -> Steps:
    if "t" not in fields:
        return {"slerp": {}}
    return {"slerp": {"weights": (mapped(fields["t"], lambda t: 1 - t), fields["t"])}}


def _nuslerp(fields: Fields, has_base: bool) -> Steps:
    along = "columns" if fields["nuslerp_row_wise"] else "rows"
    own = {
        "along": "whole" if fields["nuslerp_flatten"] else along,
        "task_vectors": has_base,
    }
    return {"nuslerp": _with_weights(own, fields)}


def _multislerp(fields: Fields, has_base: bool) -> Steps:
    own = {
        "normalize": fields["normalize_weights"],
        "eps": fields["eps"],
        "task_vectors": has_base,
    }
    return {"multislerp": _with_weights(own, fields)}


def _with_weights(own: dict[str, Any], fields: Fields) -> dict[str, Any]:
    return {**own, "weights": fields["weight"]} if "weight" in fields else own


def _family(
    by: str | None,
    *,
    vote: bool = False,
    normalize: bool = False,
    rescale: bool = False,
) -> MergekitMethod:
    """A method of the task-vector family."""

    def steps(fields: Fields, has_base: bool) -> Steps:
        own = {
            "vote": vote,
            "normalize": fields["normalize"],
            "scaling": fields["lambda"],
        }
        made: Steps = {}
        if by is not None:
            names = ("density", "gamma", "epsilon")
            made["sparsify"] = {
                "by": by,
                **{n: fields[n] for n in names if n in fields},
            }
            made["rescale"] = {"norm": "l1" if fields["rescale"] else "none"}
        return {**made, "generalized_task_arithmetic": _with_weights(own, fields)}

    parameters = [_WEIGHT, Parameter("normalize", normalize), Parameter("lambda", 1.0)]
    if by is not None:
        parameters.append(Parameter("density", 1.0, per_model=True))
        parameters.append(Parameter("rescale", rescale, word=True))
    if by == "outliers":
        parameters.append(Parameter("gamma", 0.01, per_model=True))
    if by == "rank":
        parameters.append(Parameter("epsilon", 0.15, per_model=True))
    return MergekitMethod("generalized_task_arithmetic", tuple(parameters), steps)


_WEIGHT = Parameter("weight", per_model=True, weight=True)
_EPSILON = Parameter("epsilon", 1e-5)

METHODS = {
    "linear": MergekitMethod(
        "linear",
        (_WEIGHT, Parameter("normalize", True)),
        _one("linear", weight="weights"),
        base="model",
    ),
    "slerp": MergekitMethod(
        "slerp", (Parameter("t", weight=True),), _slerp, base="first", others=(1, 1)
    ),
    "nuslerp": MergekitMethod(
        "nuslerp",
        (
            _WEIGHT,
            Parameter("nuslerp_flatten", True, word=True),
            Parameter("nuslerp_row_wise", False, word=True),
        ),
        _nuslerp,
        base="origin",
        others=(2, 2),
    ),
    "multislerp": MergekitMethod(
        "multislerp",
        (_WEIGHT, Parameter("normalize_weights", True), Parameter("eps", 1e-8)),
        _multislerp,
        base="origin",
        others=(1, float("inf")),
    ),
    "karcher": MergekitMethod(
        "karcher",
        (Parameter("max_iter", 10), Parameter("tol", 1e-5)),
        _one("karcher", max_iter="max_steps", tol="tolerance"),
        base="model",
    ),
    "passthrough": MergekitMethod(
        "passthrough",
        (Parameter("scale", 1.0, per_model=True),),
        lambda fields, has_base: {"passthrough": {"scale": fields["scale"][0]}},
        base="model",
    ),
    "model_stock": MergekitMethod(
        "model_stock",
        (Parameter("filter_wise", False, word=True),),
        _one("model_stock", filter_wise="by_row"),
        others=(2, float("inf")),
    ),
    "arcee_fusion": MergekitMethod(
        "arcee_fusion", (), _one("arcee_fusion"), others=(1, 1)
    ),
    "nearswap": MergekitMethod(
        "nearswap", (Parameter("t"),), _one("nearswap"), others=(1, 1)
    ),
    "sce": MergekitMethod("sce", (Parameter("select_topk", 1.0),), _one("sce")),
    "ram": MergekitMethod("ram", (_EPSILON,), _one("ram")),
    "ramplus_tl": MergekitMethod(
        "ramplus_tl",
        (_EPSILON, Parameter("r", 0.1), Parameter("alpha", 0.2)),
        _one("ramplus_tl"),
    ),
    "task_arithmetic": _family(None),
    "ties": _family("magnitude", vote=True, normalize=True),
    "dare_linear": _family("random", rescale=True),
    "dare_ties": _family("random", vote=True, rescale=True),
    "breadcrumbs": _family("outliers"),
    "breadcrumbs_ties": _family("outliers", vote=True),
    "della": _family("rank", vote=True, normalize=True, rescale=True),
    "della_linear": _family("rank", rescale=True),
}


def method_of(name: Any) -> MergekitMethod:
    """The method of a `merge_method`: mergekit's, or one of ours by its own name.

    Ours have the parameters that they have natively, but for `weight`.

    Raises:
      RecipeError: there is none of that name.
    """
    if name in METHODS:
        return METHODS[name]
    if name not in OURS:
        raise RecipeError(f"merge_method={name!r}{nearest(name, [*METHODS, *OURS])}")
    ours = OURS[name]
    parameters = []
    for own, field in ours.fields().items():
        known = "weight" if isinstance(field, Weights) else own
        parameters.append(
            Parameter(
                known,
                field.default,
                per_model=isinstance(field, Number) and field.per_model,
                word=isinstance(field, Choice),
                weight=isinstance(field, Weights),
                optional=field.default is None,
                options=tuple(field.options) if isinstance(field, Choice) else (),
            )
        )

    def steps(fields: Fields, has_base: bool) -> Steps:
        given = {
            "weights" if own == "weight" else own: value
            for own, value in fields.items()
            if value is not None and value != (None,) * len(as_tuple(value))
        }
        return {ours.name: given}

    exactly = ours.num_models
    return MergekitMethod(
        ours.name,
        tuple(parameters),
        steps,
        base="task" if ours.needs_base else "origin",
        others=(1, float("inf")) if exactly is None else (exactly, exactly),
    )


def as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else ()
