"""The recipe of a merge: what is done to the tensors, apart from which files.

A recipe is plain data. It holds no path and no seed, so one recipe serves any
set of models, and the pair (recipe, seed) fixes every number of a merge.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import InitVar
from typing import Any

from m3jax.methods import METHODS, TRANSFORMS, Method, Step, Transform
from m3jax.methods.fields import Weights
from m3jax.methods.step import Spec
from m3jax.recipe import fitting, values
from m3jax.recipe import slices as layers
from m3jax.recipe.groups import (
    as_groups,
    check_known,
    from_groups,
    group,
    parsed_rules,
)
from m3jax.recipe.mixup import Mixup
from m3jax.recipe.problems import Problems, RecipeError, plain
from m3jax.recipe.sizes import parse_size
from m3jax.recipe.tokenizer import VOCABULARIES, TokenizerConfig

UNMATCHED = ("error", "base", "skip")
COMPUTE = ("float32", "float64")
DTYPES = ("input", "float32", "float16", "bfloat16", "float64", "promote")
# Fields of methods that may stand in the recipe itself, as in version 0.1.
FLAT = {"scaling": 1.0, "trim_rate": 0.5}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides the merged numbers, apart from inputs and seed.

    Attributes:
      method: a method with its parameters, such as ``m3jax.Ties(trim_rate=0.5)``, or
        its name: then with its defaults.
      transforms: what is done to the models before, in this order.
      mixup: how the ratios are found; off by default where no method has any.
      exclude: regular expressions (``re.match``) of tensors taken from the base.
      vocabulary: what to do about different vocabularies. By rows: ``error``,
        ``mean`` (append mean rows) or ``truncate``; by tokens: ``union``, ``base``, or
        the name of the model whose vocabulary the output has.
      tokenizer: the rows of single tokens, padding, chat template.
      rename: rules ``REGEX=REPLACEMENT`` (`re.sub`), in this order, for names of the
        models that the base (the first model without one) does not have.
      unmatched: what to do about tensors that some checkpoints lack: ``error``,
        ``base`` (a model without one counts as having the base's; what the base lacks
        is passed over) or ``skip`` (leave them out).
      dtype: dtype of the output; ``input`` keeps each tensor's own, that of the base
        (of the first model without one); ``promote``: one that holds all models' own.
      compute: dtype of the arithmetic; it is float64 too where an input is.
      slices: which layers of which models make the output's; none: layer by layer.
      max_shard_size: of an output file, in bytes or as text such as ``5GB``.
      rules: (pattern, steps): the tensors in whose name the regular expression is found
        are merged by these transforms and this method instead; the first that fits
        counts. What is measured over the whole model is then measured over them.
      scaling, trim_rate: of the method, for a method that is given by its name.
      dare: a transform, put behind `transforms` if it is on.
      without_effect: fields that were given and that change nothing: the method does
        not have them, or what they belong to is off.

    Raises:
      RecipeError: naming each wrong field, its value and what is allowed.
    """

    method: Any = "average"
    transforms: tuple[Transform, ...] = ()
    mixup: Mixup = dataclasses.field(default_factory=Mixup)
    exclude: tuple[str, ...] = ()
    vocabulary: str = "error"
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    rename: tuple[str, ...] = ()
    unmatched: str = "error"
    dtype: str = "input"
    compute: str = "float32"
    slices: tuple[layers.Slice, ...] = ()
    max_shard_size: int | str = "5GB"
    rules: tuple[tuple[str, tuple[Step, ...]], ...] = ()
    scaling: InitVar[Any] = None
    trim_rate: InitVar[Any] = None
    dare: InitVar[Transform | None] = None
    without_effect: tuple[str, ...] = dataclasses.field(
        default=(), init=False, compare=False, repr=False
    )

    def __post_init__(self, scaling: Any, trim_rate: Any, dare: Any) -> None:
        problems = Problems()
        given = {"scaling": scaling, "trim_rate": trim_rate}
        flat = {name: own for name, own in given.items() if own is not None}
        self._set("method", self._method(problems, flat))
        steps: Any = (*self.transforms, *(() if dare is None else (dare,)))
        if all(isinstance(step, Transform) for step in steps):
            steps = tuple(map(_parsed, steps))
            self._note_idle(steps)
            self._set("transforms", tuple(step for step in steps if step.on))
        else:
            problems.add("transforms", steps, "transforms, such as m3jax.Dare()")
            steps = ()
            self._set("transforms", steps)
        self._set("exclude", plain(self.exclude))
        self._set("rename", renaming(self.rename))
        self._set("slices", layers.parse(self.slices))
        self._check_fields(problems, (*steps, self.method), flat)
        self._check_rules(problems)
        problems.raise_if_any()
        methods = [self.method, *(steps[-1] for _, steps in self.rules)]
        weighted = [isinstance(m.fields().get("weights"), Weights) for m in methods]
        if self.mixup == Mixup() and not any(weighted):
            self._set("mixup", Mixup(alpha=None))

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _method(self, problems: Problems, flat: dict[str, Any]) -> Any:
        """The method with the flat fields in it; notes those without effect."""
        method = self.method
        if isinstance(method, str):
            if method not in METHODS:
                problems.choice("method", method, tuple(METHODS))
                return method
            method = METHODS[method]()
        if not isinstance(method, Method):
            problems.add("method", method, "a method or its name")
            return method
        fields = method.fields()
        own = {name: value for name, value in flat.items() if name in fields}
        # Version 0.1 wrote all flat fields, for any method: defaults say nothing.
        idle = [n for n, v in flat.items() if n not in fields and v != FLAT[n]]
        self._set("without_effect", tuple(idle))
        return _parsed(dataclasses.replace(method, **own))

    def _note_idle(self, steps: tuple[Transform, ...]) -> None:
        """Notes the fields that were set of what is off."""
        idle = list(self.without_effect)
        for step in steps:
            if not step.on:
                plain_step = group(type(step)())
                own = group(step)
                idle += [f"{step.name}.{n}" for n in own if own[n] != plain_step[n]]
        mixup = self.mixup
        if isinstance(mixup, Mixup) and mixup.granularity != Mixup.granularity:
            drawn = mixup.alpha is not None and mixup.ratios is None
            idle += [] if drawn else ["mixup.granularity"]
        self._set("without_effect", tuple(idle))

    def idle_fields(self) -> dict[str, str]:
        """Why each field of `without_effect` changes nothing."""
        why = {}
        for field in self.without_effect:
            home = field.rpartition(".")[0]
            if home == "mixup":
                why[field] = "no ratio is drawn"
            elif home:
                why[field] = f"{home} is off"
            else:
                why[field] = f"method {self.method.name} has none"
        return why

    def _check_fields(
        self, problems: Problems, steps: tuple[Any, ...], flat: dict[str, Any]
    ) -> None:
        """Notes what is out of range, in steps that are off and without effect too."""
        if isinstance(self.mixup, Mixup):
            self.mixup.check(problems)
        else:
            problems.add("mixup", self.mixup, "an m3jax.Mixup")
        if isinstance(self.tokenizer, TokenizerConfig):
            self.tokenizer.check(problems, self.vocabulary)
        else:
            problems.add("tokenizer", self.tokenizer, "an m3jax.TokenizerConfig")
        problems.choice("unmatched", self.unmatched, UNMATCHED)
        problems.choice("dtype", self.dtype, DTYPES)
        problems.choice("compute", self.compute, COMPUTE)
        for step in steps:
            if not isinstance(step, Step):
                continue  # noted by `_method`, and nothing is known of its fields
            for name, field in step.fields().items():
                label = name if name in FLAT else f"{step.name}.{name}"
                values.check(label, getattr(step, name), field, problems)
        for name, value in flat.items():
            if not isinstance(self.method, Method) or name not in self.method.fields():
                field = METHODS["ties"].fields()[name]
                values.check(name, values.parse(value), field, problems)
        names = [step.name for step in self.transforms]
        if len(set(names)) < len(names):
            problems.add("transforms", names, "each transform once")
        if sum(bool(step.draws) for step in self.transforms) > 1:
            problems.add("transforms", names, "one transform that draws, at most")
        after = [step.name for step in self.transforms if step.after]
        if after and isinstance(self.method, Method):
            parts = self.method.outputs(Spec((1,)), 1)
            if set(parts) != {""}:
                allowed = f"none of {', '.join(after)}: they change one model, and "
                allowed += f"method {self.method.name} makes several tensors of each"
                problems.add("transforms", names, allowed)
        problems.patterns("exclude", self.exclude)
        problems.renaming("rename", self.rename)
        try:
            parse_size(self.max_shard_size)
        except ValueError:
            problems.add("max_shard_size", self.max_shard_size, "such as 5GB or 200MB")

    def _check_rules(self, problems: Problems) -> None:
        try:
            rules = [(pattern, tuple(steps)) for pattern, steps in self.rules]
        except (TypeError, ValueError):
            problems.add("rules", self.rules, "pairs of a pattern and a tuple of steps")
            return
        problems.patterns("rules", tuple(pattern for pattern, _ in rules))
        parsed = []
        for pattern, steps in rules:
            try:
                parsed.append((pattern, self._with_steps(steps).steps))
            except RecipeError as error:
                problems.line(f"rules[{pattern!r}]: {error}")
        self._set("rules", tuple(parsed))

    def _with_steps(self, steps: tuple[Step, ...]) -> Recipe:
        before: Any = steps[:-1]
        method = steps[-1] if steps else None
        return dataclasses.replace(self, method=method, transforms=before, rules=())

    @functools.cached_property
    def variants(self) -> tuple[Recipe, ...]:
        """A recipe without rules for each kind of tensor: first those without a rule,
        then those of each rule."""
        if not self.rules:
            return (self,)
        own = dataclasses.replace(self, rules=())
        return (own, *(self._with_steps(steps) for _, steps in self.rules))

    def variant_of(self, name: str) -> int:
        """The place, among the variants, of the one for tensor `name`."""
        fitting = (
            place
            for place, (pattern, _) in enumerate(self.rules, start=1)
            if re.search(pattern, name)
        )
        return next(fitting, 0)

    @property
    def steps(self) -> tuple[Step, ...]:
        """What is done to the models: the transforms, then the method."""
        return (*self.transforms, self.method)

    @property
    def needs_base(self) -> bool:
        return any(step.needs_base for own in self.variants for step in own.steps)

    def transform(self, name: str) -> Any:
        """The transform of that name; None without it."""
        return next((step for step in self.transforms if step.name == name), None)

    def with_number(self, step: str, field: str, value: Any) -> Recipe:
        """The recipe with another number in one of its steps.

        A transform that it does not have is put behind the others.
        """
        if step == self.method.name:
            method = dataclasses.replace(self.method, **{field: value})
            return dataclasses.replace(self, method=method)
        own = self.transform(step) or TRANSFORMS[step]()
        changed = dataclasses.replace(own, **{field: value})
        others = [changed if s is own else s for s in self.transforms]
        if own not in self.transforms:
            others.append(changed)
        return dataclasses.replace(self, transforms=tuple(others))

    def renamed(self, name: Callable[[str], str]) -> Recipe:
        """The recipe with other names for the models that it names."""
        known = self.vocabulary in VOCABULARIES
        return self.with_fields(
            vocabulary=self.vocabulary if known else name(self.vocabulary),
            tokenizer=self.tokenizer.renamed(name),
        )

    @property
    def keeps_config(self) -> bool:
        """Whether config.json stays where rows of the vocabulary are truncated."""
        return self.vocabulary == "truncate" and self.tokenizer.config == "keep"

    def with_fields(self, **changes: Any) -> Recipe:
        """The recipe with other fields than its steps; `without_effect` stays."""
        changed = dataclasses.replace(self, **changes)
        changed._set("without_effect", self.without_effect)
        return changed

    def check(self, *, num_models: int, has_base: bool) -> None:
        """Raises RecipeError where the recipe does not fit this set of models."""
        fitting.check_models(self, num_models, has_base)

    def num_inputs(self, num_models: int) -> int:
        """How many models the steps see, of that many checkpoints."""
        return len(self.slices[0].models) if self.slices else num_models

    def check_statistics(self, count: int, num_models: int) -> None:
        """Raises RecipeError unless there are as many as the methods read."""
        fitting.check_statistics(self, count, num_models)

    def excludes(self, name: str) -> bool:
        """Whether tensor `name` is taken from the base unmerged."""
        return any(re.match(pattern, name) for pattern in self.exclude)

    def to_dict(self) -> dict[str, Any]:
        """The recipe as nested dicts of JSON values, every field present.

        A step's parameters stand under its name.
        """
        return {
            **as_groups(self.steps),
            "mixup": dataclasses.asdict(self.mixup),
            "exclude": self.exclude,
            "vocabulary": self.vocabulary,
            "tokenizer": self.tokenizer.to_dict(),
            "rename": self.rename,
            "unmatched": self.unmatched,
            "dtype": self.dtype,
            "compute": self.compute,
            "slices": tuple(map(dataclasses.asdict, self.slices)),
            "max_shard_size": self.max_shard_size,
            "rules": tuple(
                {"tensors": pattern, **as_groups(steps)}
                for pattern, steps in self.rules
            ),
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Recipe:
        """A recipe from nested mappings, lists standing for tuples.

        Raises:
          RecipeError: for an unknown field (by its dotted name) or a bad value.
        """
        own = [field.name for field in dataclasses.fields(cls) if field.init]
        check_known("", fields, [*own, *FLAT, *TRANSFORMS, *METHODS])
        known = {*own, *FLAT} - {"method", "transforms", "mixup", "tokenizer", "rules"}
        mixup = fields.get("mixup", {})
        check_known("mixup.", mixup, [f.name for f in dataclasses.fields(Mixup)])
        tokenizer = fields.get("tokenizer", {})
        own = [field.name for field in dataclasses.fields(TokenizerConfig)]
        check_known("tokenizer.", tokenizer, own)
        *transforms, method = from_groups(fields)
        return cls(
            **{name: plain(given) for name, given in fields.items() if name in known}
            | {
                "method": method,
                "transforms": tuple(transforms),
                "mixup": Mixup(**mixup),
                "tokenizer": TokenizerConfig(**tokenizer),
                "rules": parsed_rules(fields.get("rules", ())),
            }
        )


def renaming(given: Any) -> Any:
    """Rules of renaming as a tuple; a text is one rule, a mapping has one each."""
    if isinstance(given, str):
        return (given,)
    if isinstance(given, Mapping):
        return tuple(f"{pattern}={new}" for pattern, new in given.items())
    return plain(given)


def _parsed(step: Any) -> Any:
    parsed = {name: values.parse(getattr(step, name)) for name in step.fields()}
    return dataclasses.replace(step, **parsed)
