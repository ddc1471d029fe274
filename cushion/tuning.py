"""Quantization-aware prefix tuning (CushionCache, section 4.2): keys and values of the prefix learn alone.

## Prefix tuning

Section 4.2 of the paper. The keys and values of every layer become parameters; the model is frozen.

    L = L_pred + lambda * L_q,    lambda = 0.01

L_pred is the mean next-token cross entropy over t behind the prefix. L_q is the quantization error at the tokens of
t, summed over sites (outputs of the blocks) and averaged over the texts of the batch. With E the sum of squares of a
text at a site, of n tokens and d features:

| `tuning.reduction` | a site's part of L_q | unit |
|---|---|---|
| `mean` (default) | E / (n d) | X squared |
| `token` | E / n: the error per token, as L_pred is a loss per token (equation 6) | X squared |
| `sum` | E | X squared |
| `relative` | E; L_q is then divided by its value behind the found prefix, over the held-out texts | none |

lambda = 0.01 is comparable between models with `relative` alone. `tuning=paper` has `token`.

The paper stops the gradient at s and z. With e = (q(X) - X) / s, the rounding error in units of s:

| `tuning.gradient` | L_q, as differentiated | gradient |
|---|---|---|
| `range` (default) | s(X)^2 * sum(e^2), e constant | through s to the minimum and maximum of X |
| `nearest_grid_point` | sum((X - q)^2), q constant | 2 (X - q): to the nearest grid point |
| `straight_through` | straight-through round, s and z constant | exactly zero |

The second and third follow the paper's words and leave the range, and with it the outliers, unmoved. The default is
our choice.

L_pred is computed on the quantized model by default, with straight-through rounding; L_q comes from the same pass.
With `loss: kl` it is the mean over tokens of KL(p || q), p from the full-precision model behind the found prefix, and
q from the quantized one behind the prefix that learns. Optimizer: Adam with warm-up, a schedule and a clipped
gradient. Kept is the prefix with the lowest L on held-out sequences, the untuned one included.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import get_scheduler

from cushion.config import SearchConfig, TuningConfig
from cushion.errors import CalibrationError, TuningError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.learned import HALF_PRECISION_SCALING, adam_group
from cushion.tuning_loss import TuningLoss
from cushion.tuning_ranges import TunedUnder
from cushion.tuning_state import TuningState, TuningStep, optimizer_tensors, restore_optimizer

_MEND = "lower tuning.learning_rate or tuning.gradient_clip, or set model.dtype=bfloat16 where it is float16"


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
    calibration_texts: Tensor | None = None,
) -> Iterator[TuningState]:
    """Tune the keys and values of `found`.

    Args:
        fitted: the run's quantizer, fitted behind `found`; L_pred is computed under it (see `tuning_quantizer`).
        texts: training token ids, (sequences, tokens).
        held_out: token ids that decide which step was best, (sequences, tokens).
        state: go on from here instead of from the start.
        calibration_texts: token ids that static ranges are estimated on anew, (texts, tokens); with `ranges: static`.

    Yields:
        The state after every step, the same object each time; its `best` is the prefix to keep. Between two steps the
        quantizer is still on the model: close the generator before using the model for anything else.

    Raises:
        TuningError: the loss is not finite any more. The state yielded last is still good.

    """
    under = TunedUnder(lm, config, fitted, calibration_texts)
    loss_of = TuningLoss(lm, config, objective, found, under.without_quantizer)
    with under:
        if state is None:
            state = _initial_state(under, loss_of, found, held_out, config)
        else:
            _restore(under, state)
        loss_of.error_unit = state.error_unit
        parameters = [t.detach().float().clone().requires_grad_() for t in (*state.prefix.keys, *state.prefix.values)]
        ranges = under.parameters()
        # taken out of the gradients again
        scaling = HALF_PRECISION_SCALING if lm.model.dtype == torch.float16 else 1.0
        optimizer = _optimizer(config, parameters, ranges)
        restore_optimizer(optimizer, state.optimizer)
        schedule = learning_rate_schedule(config, optimizer)
        while len(state.steps) < config.total_steps:
            step = len(state.steps)
            started = time.perf_counter()
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step)
            optimizer.zero_grad()
            with torch.enable_grad():
                loss, prediction, error = loss_of(
                    _with(found, parameters), texts[batch_indices(config, len(texts), step, seed)]
                )
                (loss * scaling).backward()
            assert all(parameter.grad is not None for parameter in parameters)
            for parameter in (*parameters, *ranges):
                if parameter.grad is not None:  # a range of an expert that no token has reached has none
                    parameter.grad.div_(scaling)
            norm = torch.nn.utils.clip_grad_norm_(parameters, config.gradient_clip or math.inf)
            if not (math.isfinite(loss.item()) and math.isfinite(norm.item())):
                raise TuningError(
                    f"tuning stopped at step {step}: the loss is {loss.item()} and the gradient norm {norm.item()}; "
                    f"{_MEND}"
                )
            optimizer.step()
            current = _with(found, [p.detach().clone() for p in parameters])
            done, held_out_loss = step + 1, None
            is_measured = done % config.evaluate_every == 0 or done == config.total_steps
            if under.is_estimated and (is_measured or done % config.ranges_every == 0):
                _estimate(under, current, step)
                state.fitted_behind = current
            if is_measured:
                held_out_loss = _held_out_loss(loss_of, current, held_out, config)
                if not math.isfinite(held_out_loss):
                    raise TuningError(f"tuning stopped at step {step}: the held-out loss is {held_out_loss}; {_MEND}")
                if held_out_loss < state.best_loss:
                    state.best, state.best_loss, state.best_step = current, held_out_loss, done
                    state.best_learned = under.learned()
            state.prefix, state.optimizer = current, optimizer_tensors(optimizer)
            state.learned = [parameter.detach().clone() for parameter in ranges]
            state.steps.append(
                TuningStep(
                    step, loss.item(), prediction.item(), error.item(), config.learning_rate * schedule(step),
                    norm.item(), held_out_loss, time.perf_counter() - started,
                )
            )  # fmt: skip
            yield state


def _initial_state(
    under: TunedUnder, loss_of: TuningLoss, found: Prefix, held_out: Tensor, config: TuningConfig
) -> TuningState:
    """The state before the first step: the found prefix is the best one so far."""
    unit = 1.0
    if config.reduction == "relative" and config.lambda_q:
        unit = _mean_over(loss_of, 2, found, held_out, config)
        _check_start("L_q", unit)
        if unit == 0:
            raise TuningError(
                f"L_q before tuning is {unit}, and tuning.reduction=relative divides by it: use another reduction"
            )
    loss_of.error_unit = unit
    initial = _held_out_loss(loss_of, found, held_out, config)
    _check_start("the loss", initial)
    state = TuningState(replace(found, tuned=True), found, 0, initial, initial)
    state.best_learned, state.error_unit = under.learned(), unit
    return state


def _check_start(what: str, value: float) -> None:
    if not math.isfinite(value):
        raise TuningError(
            f"{what} before tuning is {value}: the activations overflow (use model.dtype=bfloat16 or float32), or the "
            "quantizer destroys the model"
        )


def _restore(under: TunedUnder, state: TuningState) -> None:
    """The ranges as they were when the state was kept."""
    if state.fitted_behind is not None:
        under.estimate(state.fitted_behind)
    if under.learns and state.steps:
        under.set_learned(state.learned)


def _estimate(under: TunedUnder, behind: Prefix, step: int) -> None:
    try:
        under.estimate(behind)
    except CalibrationError as error:
        raise TuningError(f"tuning stopped at step {step}: {error}; {_MEND}") from error


def _optimizer(config: TuningConfig, parameters: list[Tensor], ranges: list[Tensor]) -> torch.optim.Optimizer:
    """Adam over keys and values, and over learned ranges at their own rate; `peak` is a group's rate after warm-up."""
    groups: list[dict[str, Any]] = [{"params": parameters, "peak": config.learning_rate}]
    if ranges:
        groups.append({**adam_group(ranges, config.scale_learning_rate), "peak": config.scale_learning_rate})
    return torch.optim.Adam(groups, lr=config.learning_rate)


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


def _held_out_loss(loss_of: TuningLoss, prefix: Prefix, held_out: Tensor, config: TuningConfig) -> float:
    return _mean_over(loss_of, 0, prefix, held_out, config)


@torch.no_grad()
def _mean_over(loss_of: TuningLoss, part: int, prefix: Prefix, texts: Tensor, config: TuningConfig) -> float:
    """The mean over texts of the loss (part 0), its prediction part (1) or its error part (2)."""
    total = sum(loss_of(prefix, batch)[part].item() * len(batch) for batch in texts.split(config.batch_size))
    return total / len(texts)
