"""How far a tuning is, and what it found so far: what a killed tuning goes on from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

from cushion.prefix import Prefix
from cushion.quantization.learned import Learned


@dataclass(frozen=True)
class TuningStep:
    """One optimizer step. Losses in nats per token (`prediction_loss`) and in the unit of `reduction` (`error`).

    `held_out_loss` is the whole loss on the held-out texts after this step, where it was measured.
    """

    step: int
    loss: float
    prediction_loss: float
    error: float
    learning_rate: float
    gradient_norm: float
    held_out_loss: float | None
    seconds: float


@dataclass
class TuningState:
    """How far the tuning is, and the best prefix so far: what a killed tuning goes on from.

    Args:
        prefix: after the last step.
        best: the prefix with the lowest held-out loss, that of `best_step`; 0 is the found one.
        best_learned: the ranges that were learned up to then, with `tuning.ranges=learned`.
        error_unit: L_q of the found prefix, with `tuning.reduction=relative`.
        learned: what the learned ranges are made of, after the last step (`LearnableQuantizer.learned` of each).
        fitted_behind: the prefix behind which static ranges were estimated last; None for the found one.
        optimizer: its state, as plain tensors.

    """

    prefix: Prefix
    best: Prefix
    best_step: int
    best_loss: float
    initial_loss: float
    steps: list[TuningStep] = field(default_factory=list)
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    best_learned: Learned | None = None
    error_unit: float = 1.0
    learned: list[Tensor] = field(default_factory=list)
    fitted_behind: Prefix | None = None

    def to_checkpoint(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The state as plain data and tensors."""
        scalars = {
            "token_ids": list(self.prefix.token_ids),
            "best_step": self.best_step,
            "best_loss": self.best_loss,
            "initial_loss": self.initial_loss,
            "best_tuned": self.best.tuned,
            "error_unit": self.error_unit,
            "learns": self.best_learned is not None,
            "is_fitted_anew": self.fitted_behind is not None,
            "steps": [asdict(step) for step in self.steps],
        }
        tensors = {f"optimizer.{key}": value for key, value in self.optimizer.items()}
        tensors |= {f"learned.{i}": value for i, value in enumerate(self.learned)}
        if self.best_learned is not None:
            tensors |= {f"best_learned.{key}": value for key, value in self.best_learned.tensors().items()}
        for name, prefix in (("prefix", self.prefix), ("best", self.best), ("fitted", self.fitted_behind)):
            if prefix is not None:
                tensors |= {f"{name}.keys.{i}": key for i, key in enumerate(prefix.keys)}
                tensors |= {f"{name}.values.{i}": value for i, value in enumerate(prefix.values)}
        return scalars, tensors

    @classmethod
    def from_checkpoint(cls, scalars: dict[str, Any], tensors: dict[str, Tensor], found: Prefix) -> TuningState:
        """The state that `to_checkpoint` described; `found` gives the metadata."""

        def prefix(name: str, tuned: bool) -> Prefix:
            layers = range(len(found.keys))
            keys = tuple(tensors[f"{name}.keys.{i}"] for i in layers)
            values = tuple(tensors[f"{name}.values.{i}"] for i in layers)
            return replace(found, keys=keys, values=values, tuned=tuned)

        def below(name: str) -> dict[str, Tensor]:
            return {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}

        learned = below("learned")
        return cls(
            prefix("prefix", True),
            prefix("best", scalars["best_tuned"]),
            scalars["best_step"],
            scalars["best_loss"],
            scalars["initial_loss"],
            [TuningStep(**step) for step in scalars["steps"]],
            below("optimizer"),
            Learned.of(below("best_learned")) if scalars["learns"] else None,
            scalars["error_unit"],
            [learned[str(i)] for i in range(len(learned))],
            prefix("fitted", True) if scalars["is_fitted_anew"] else None,
        )


def optimizer_tensors(optimizer: Any) -> dict[str, Tensor]:
    """The state of a torch optimizer as tensors by `<parameter>.<name>`, copied."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value.clone() for index, entry in state.items() for name, value in entry.items()}


def restore_optimizer(optimizer: Any, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; nothing where there is nothing."""
    if not tensors:
        return
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
