"""Quantization-aware prefix tuning (CushionCache, section 4): the prefix's keys and values learn, the model does not.

`L = L_pred + lambda * L_q`, with lambda = 0.01. L_pred is the next-token cross entropy behind the prefix; L_q is the
quantization error of the following tokens, summed over sites. What the paper leaves open is a key of the configuration:

- `gradient`: with scale and offset held constant, a straight-through round makes the gradient of L_q exactly zero
  (`straight_through`), and no straight-through only pulls X to the nearest grid point (`nearest_grid_point`). The
  default (`range`) lets the gradient through the scale instead: L_q = s^2 * sum(e^2) with the rounding error e in units
  of s held constant, so that lowering L_q means lowering the range, which is what outliers decide.
- `reduction`: the mean over elements (default) makes L_q comparable between models and lambda = 0.01 a small weight;
  the sum is larger by about the number of elements.
- `prediction_model`: L_pred on the quantized model (default), with weights quantized, activations quantized with
  dynamic ranges (static ones would need calibrating after every step), rounding straight-through; or in full precision.
- `error_site`: X is the output of every block (as in the search, default) or the input of every linear.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import get_scheduler

from cushion.activations import observe_inputs, observe_outputs
from cushion.config import QuantizerConfig, SearchConfig, TuningConfig
from cushion.errors import TuningError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.numerics import Grid, fake_quantize
from cushion.quantization.parts.registry import turned_off

HALF_PRECISION_SCALING = 2.0**10
"""Factor on the loss of a float16 model during the backward pass, taken out of the gradients again."""

_IGNORED = -100


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
    """How far the tuning is, and the best prefix so far: what a killed tuning goes on from."""

    prefix: Prefix
    best: Prefix
    best_step: int
    best_loss: float
    initial_loss: float
    steps: list[TuningStep] = field(default_factory=list)
    optimizer: dict[str, Tensor] = field(default_factory=dict)

    def to_checkpoint(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The state as plain data and tensors."""
        scalars = {
            "token_ids": list(self.prefix.token_ids),
            "best_step": self.best_step,
            "best_loss": self.best_loss,
            "initial_loss": self.initial_loss,
            "best_tuned": self.best.tuned,
            "steps": [asdict(step) for step in self.steps],
        }
        tensors = {f"optimizer.{key}": value for key, value in self.optimizer.items()}
        for name, prefix in (("prefix", self.prefix), ("best", self.best)):
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

        optimizer = {k.removeprefix("optimizer."): v for k, v in tensors.items() if k.startswith("optimizer.")}
        return cls(
            prefix("prefix", True),
            prefix("best", scalars["best_tuned"]),
            scalars["best_step"],
            scalars["best_loss"],
            scalars["initial_loss"],
            [TuningStep(**step) for step in scalars["steps"]],
            optimizer,
        )


def differentiable_error(values: Tensor, grid: Grid, gradient: str) -> Tensor:
    """`||X - q(X)||^2` of each text as the search measures it, with one of three gradients towards X.

    Args:
        values: X, shape (texts, tokens, features).
        gradient: `range`, `nearest_grid_point` or `straight_through`, as explained at the head of this file.

    Returns:
        float32, shape (texts,). The value does not depend on `gradient`.

    """
    flat = values.flatten(1).float()
    low, high = torch.aminmax(flat, dim=1, keepdim=True)
    scale, offset = grid.parameters(low, high)
    constant, fixed_scale = flat.detach(), scale.detach()
    rounded = fake_quantize(constant, fixed_scale, offset.detach(), grid)
    if gradient == "range":
        unit_error = (rounded - constant).div_(fixed_scale).square_().sum(1)
        return scale[:, 0].square() * unit_error
    if gradient == "nearest_grid_point":
        return (flat - rounded).square().sum(1)
    assert gradient == "straight_through"
    return (flat - (flat + (rounded - constant))).square().sum(1)


class TuningLoss:
    """`L_pred + lambda * L_q` of a batch of texts behind a prefix.

    Args:
        objective: gives the grid of q, the same as in the search.

    """

    def __init__(self, lm: LanguageModel, config: TuningConfig, objective: SearchConfig) -> None:
        self._lm, self._config = lm, config
        self._grid = Grid(objective.bits, objective.symmetric, objective.levels)
        self._linear_names = list(lm.linears())  # taken while they are still plain linears

    def __call__(self, prefix: Prefix, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss, its prediction part and its error part, each a scalar. `texts`: token ids (texts, tokens)."""
        errors: list[Tensor] = []
        texts = texts.to(self._lm.device)

        def observe(_name: str, values: Tensor) -> None:
            # an expert sees the tokens that are routed to it, which no longer lie text by text
            groups = len(texts) if values.shape[:-1].numel() == texts.numel() else 1
            error = differentiable_error(values.reshape(groups, -1, values.shape[-1]), self._grid, config.gradient)
            elements = values.numel() / groups if config.reduction == "mean" else len(texts) / groups
            errors.append((error / elements).mean())

        config = self._config
        with self._observed(observe):
            cache = prefix.cache(self._lm.model, len(texts))
            logits = self._lm.model(input_ids=texts, past_key_values=cache, use_cache=True).logits
        # the last position predicts nothing: an ignored target, where slicing would copy logits and their gradient
        targets = functional.pad(texts[:, 1:], (0, 1), value=_IGNORED).flatten().to(logits.device)
        prediction = functional.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=_IGNORED)
        on_one_device = [error.to(logits.device) for error in errors]
        error = torch.stack(on_one_device).sum() if errors else prediction.new_zeros(())
        return prediction + config.lambda_q * error, prediction, error

    def _observed(self, observe: Any) -> AbstractContextManager[None]:
        if self._config.lambda_q == 0:
            return nullcontext()
        if self._config.error_site == "block_outputs":
            return observe_outputs(self._lm.named_blocks, observe)
        modules = {name: self._lm.model.get_submodule(name) for name in self._linear_names}
        return observe_inputs(modules, observe)


def tuning_quantizer(config: TuningConfig, quantizer: QuantizerConfig) -> QuantizerConfig:
    """The quantizer under which L_pred is computed: the run's own with dynamic ranges, or none."""
    if config.prediction_model == "full_precision":
        return turned_off(quantizer, lambda part: True)
    return replace(quantizer, activations=replace(quantizer.activations, range="dynamic"))


def tune_prefix(
    lm: LanguageModel,
    found: Prefix,
    config: TuningConfig,
    fitted: FittedQuantizer,
    objective: SearchConfig,
    texts: Tensor,
    held_out: Tensor,
    seed: int,
    state: TuningState | None = None,
) -> Iterator[TuningState]:
    """Tune the keys and values of `found`.

    Args:
        fitted: the run's quantizer, fitted behind `found`; L_pred is computed under it (see `tuning_quantizer`).
        texts: training token ids, (sequences, tokens).
        held_out: token ids that decide which step was best, (sequences, tokens).
        state: go on from here instead of from the start.

    Yields:
        The state after every step, the same object each time; its `best` is the prefix to keep. Between two steps the
        quantizer is still on the model: close the generator before using the model for anything else.

    Raises:
        TuningError: the loss is not finite any more. The state yielded last is still good.

    """
    loss_of = TuningLoss(lm, config, objective)
    under = replace(fitted, config=tuning_quantizer(config, fitted.config))
    with under.on(lm, straight_through=True):
        if state is None:
            initial = _held_out_loss(loss_of, found, held_out, config)
            if not math.isfinite(initial):
                raise TuningError(f"the loss before tuning is {initial}: the model or the quantizer is broken")
            state = TuningState(replace(found, tuned=True), found, 0, initial, initial)
        parameters = [t.detach().float().clone().requires_grad_() for t in (*state.prefix.keys, *state.prefix.values)]
        # gradients of half precision underflow unless the loss is scaled up before the backward pass
        scaling = HALF_PRECISION_SCALING if lm.model.dtype == torch.float16 else 1.0
        optimizer = torch.optim.Adam(parameters, lr=config.learning_rate)
        _restore_optimizer(optimizer, state.optimizer)
        schedule = learning_rate_schedule(config, optimizer)
        while len(state.steps) < config.total_steps:
            step = len(state.steps)
            started = time.perf_counter()
            rate = config.learning_rate * schedule(step)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.zero_grad()
            with torch.enable_grad():
                loss, prediction, error = loss_of(
                    _with(found, parameters), texts[batch_indices(config, len(texts), step, seed)]
                )
                (loss * scaling).backward()
            for parameter in parameters:
                assert parameter.grad is not None
                parameter.grad.div_(scaling)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.gradient_clip or math.inf)
            if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
                raise TuningError(
                    f"tuning stopped at step {step}: the loss is {loss.item()} and the gradient norm {norm.item()}; "
                    "lower tuning.learning_rate or set tuning.gradient_clip"
                )
            optimizer.step()
            current = _with(found, [p.detach().clone() for p in parameters])
            held_out_loss = None
            if (step + 1) % config.evaluate_every == 0 or step + 1 == config.total_steps:
                held_out_loss = _held_out_loss(loss_of, current, held_out, config)
                if not math.isfinite(held_out_loss):
                    raise TuningError(
                        f"tuning stopped at step {step}: the held-out loss is {held_out_loss}; "
                        "lower tuning.learning_rate or set tuning.gradient_clip"
                    )
                if held_out_loss < state.best_loss:
                    state.best, state.best_loss, state.best_step = current, held_out_loss, step + 1
            state.prefix, state.optimizer = current, _optimizer_tensors(optimizer)
            state.steps.append(
                TuningStep(
                    step, loss.item(), prediction.item(), error.item(), rate, norm.item(),
                    held_out_loss, time.perf_counter() - started,
                )
            )  # fmt: skip
            yield state


def learning_rate_schedule(config: TuningConfig, optimizer: torch.optim.Optimizer) -> Callable[[int], float]:
    """The factor on the learning rate by step: warm-up from 1/warmup_steps to 1, then constant or down towards 0."""
    name = "constant_with_warmup" if config.schedule == "constant" else config.schedule
    factor = get_scheduler(name, optimizer, config.warmup_steps, config.total_steps + 1).lr_lambdas[0]
    return lambda step: float(factor(step + 1))


def batch_indices(config: TuningConfig, sequences: int, step: int, seed: int) -> Tensor:
    """Which training sequences step `step` uses: passes over all of them, each in its own seeded order."""
    positions = range(step * config.batch_size, (step + 1) * config.batch_size)
    chosen = []
    for position in positions:
        generator = torch.Generator().manual_seed(seed * 100_003 + position // sequences)
        chosen.append(int(torch.randperm(sequences, generator=generator)[position % sequences]))
    return torch.tensor(chosen)


def _with(found: Prefix, tensors: list[Tensor]) -> Prefix:
    layers = len(tensors) // 2
    return replace(found, keys=tuple(tensors[:layers]), values=tuple(tensors[layers:]), tuned=True)


@torch.no_grad()
def _held_out_loss(loss_of: TuningLoss, prefix: Prefix, held_out: Tensor, config: TuningConfig) -> float:
    batches = held_out.split(config.batch_size)
    total = sum(loss_of(prefix, batch)[0].item() * len(batch) for batch in batches)
    return total / len(held_out)


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value.clone() for index, entry in state.items() for name, value in entry.items()}


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    if not tensors:
        return
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
