"""An optimiser of Optax, by its name, with a schedule of its learning rate."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from m3jax.recipe.problems import Problems

SCHEDULES = ("constant", "cosine", "linear")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """An optimiser.

    Attributes:
      name: of one of Optax that takes a ``learning_rate``: ``adam``, ``sgd``,
        ``adafactor``, …; or ``mofo_adamw``, ours.
      rate: the highest learning rate.
      schedule: ``constant``, or falling to 0 at the last step as a ``cosine`` or
        ``linear``.
      warmup: steps in which the rate rises from 0 before.
      clip: norm to which the gradient of all coefficients is cut; None: not.
      options: others of its arguments, by name.

    Raises:
      RecipeError: naming each wrong field, its value and what is allowed.
    """

    name: str = "adam"
    rate: float = 1e-3
    schedule: str = "constant"
    warmup: int = 0
    clip: float | None = None
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = Problems()
        problems.number("optimizer.rate", self.rate, 0.0)
        problems.choice("optimizer.schedule", self.schedule, SCHEDULES)
        if not isinstance(self.warmup, int) or self.warmup < 0:
            problems.add("optimizer.warmup", self.warmup, "an integer, 0 or more")
        if self.clip is not None:
            problems.number("optimizer.clip", self.clip, 0.0)
        problems.raise_if_any()

    def make(self, steps: int) -> Any:
        """The optax.GradientTransformation for so many steps.

        Raises:
          RecipeError: there is none of that name, or it has no such option.
        """
        import optax

        from m3jax.learn.mofo import mofo_adamw

        made = (
            mofo_adamw if self.name == "mofo_adamw" else getattr(optax, self.name, None)
        )
        problems = Problems()
        try:
            known = inspect.signature(made).parameters if callable(made) else {}
        except (TypeError, ValueError):
            known = {}
        if "learning_rate" not in known:
            problems.add(
                "optimizer.name",
                self.name,
                "an optimiser of Optax that takes a learning_rate, such as adam",
            )
            problems.raise_if_any()
        for name in self.options:
            problems.choice(f"optimizer.options of {self.name}", name, tuple(known))
        if self.warmup >= steps > 0 and self.warmup:
            problems.add("optimizer.warmup", self.warmup, f"less than {steps} steps")
        problems.raise_if_any()
        own = made(learning_rate=self.rates(steps), **self.options)  # type: ignore[misc]
        if self.clip is None:
            return own
        return optax.chain(optax.clip_by_global_norm(self.clip), own)

    def rates(self, steps: int) -> Any:
        """The learning rate, or a function of the step that gives it."""
        import optax

        left = max(steps - self.warmup, 1)
        main: Any = {
            "constant": lambda: optax.constant_schedule(self.rate),
            "cosine": lambda: optax.cosine_decay_schedule(self.rate, left),
            "linear": lambda: optax.linear_schedule(self.rate, 0.0, left),
        }[self.schedule]()
        if self.warmup:
            rising = optax.linear_schedule(0.0, self.rate, self.warmup)
            return optax.join_schedules([rising, main], [self.warmup])
        return self.rate if self.schedule == "constant" else main
