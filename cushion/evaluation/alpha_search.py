"""The search for QFeM's alpha: the fewest linears in full precision that bring the perplexity to a target.

arXiv 2405.14428 chooses alpha by a target on the perplexity and leaves the procedure open. Here: among the thresholds
that keep different sets of linears, the largest whose perplexity on calibration text is within a factor of that of the
per-token dynamic quantizer with the same weights, behind the same prefix. Found by bisection, so under the assumption
that the perplexity falls with every linear that is kept; what was evaluated on the way is the trade-off curve.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cushion.config import EvalConfig, QuantizerConfig
from cushion.errors import NotFiniteError
from cushion.evaluation.perplexity import BlockLoss, block_losses, perplexity
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.parts.registry import PARTS
from cushion.quantization.qfem import ModuleRatios


@dataclass
class AlphaSearch:
    """How far a search is: what a killed one goes on from.

    `reference` is the per-token quantizer's perplexity. `points` has the perplexity of what was evaluated, by the
    number of the threshold (0 keeps no linear, the last one all), None where it was not finite. `found` is the number
    of the threshold that was found, and `reached` whether its perplexity is within the target.
    """

    reference: float | None = None
    points: dict[int, float | None] = field(default_factory=dict)
    found: int | None = None
    reached: bool = False

    def within(self, number: int, target: float) -> bool:
        """Whether an evaluated point is within `target` times the reference."""
        value = self.points[number]
        assert self.reference is not None
        return value is not None and value <= target * self.reference

    def contradictions(self, target: float) -> list[int]:
        """The points that contradict the assumption behind the bisection.

        They are within the target with fewer linears kept than were found to be needed, or outside it with more; where
        the target was not reached, all that are within it.
        """
        assert self.found is not None
        enough = self.found if self.reached else self.found + 1
        return [number for number in sorted(self.points) if self.within(number, target) != (number >= enough)]


def per_token(quantizer: QuantizerConfig) -> QuantizerConfig:
    """The quantizer that the target refers to: dynamic scales per token, everything else the same, no QFeM."""
    activations = replace(quantizer.activations, granularity="per_token", range="dynamic")
    return replace(_without_qfem(quantizer), activations=activations)


def _without_qfem(quantizer: QuantizerConfig) -> QuantizerConfig:
    return PARTS["qfem"].off(quantizer)


def curve_numbers(last: int, points: int) -> list[int]:
    """The thresholds that a curve of so many points has between none (0) and all (`last`), both included.

    They are spread evenly over the logarithm of their number, as most of what matters happens among the first. Those
    that fall on the same number count once.
    """
    inner = [round(last ** (step / (points + 1))) for step in range(1, points + 1)] if points else []
    return sorted({0, *inner, last}) if points else []


@torch.no_grad()
def search_alpha(
    lm: LanguageModel,
    behind: Prefix,
    fitted: FittedQuantizer,
    ratios: ModuleRatios,
    texts: Tensor,
    state: AlphaSearch,
) -> Iterator[tuple[int, int]]:
    """Find alpha for a quantizer behind a prefix.

    Args:
        fitted: the quantizer, fitted behind the same prefix, with the target in its `qfem`. What it keeps is what is
            looked for.
        ratios: of the linears that are quantized.
        texts: calibration token ids, (texts, tokens); each is run alone.
        state: filled in place; points that it has are not evaluated again.

    Yields:
        The number of texts run, and how many there will be at most. Between two the quantizer is still on the model:
        close the generator before using the model for anything else.

    Raises:
        NotFiniteError: the per-token quantizer has no finite perplexity on these texts.

    """
    settings, alphas = fitted.config.qfem, ratios.thresholds()
    last = len(alphas) - 1
    at_most = (1 + 2 + max(0, last - 1).bit_length() + len(curve_numbers(last, settings.curve))) * len(texts)
    under = _without_qfem(fitted.config)
    done = (len(state.points) + (state.reference is not None)) * len(texts)
    losses: list[BlockLoss] = []

    def run_under(config: QuantizerConfig, keep: frozenset[str]) -> Iterator[tuple[int, int]]:
        """Fill `losses`. The last text is for the caller to report, once the state has what came out."""
        nonlocal done
        losses.clear()
        with replace(fitted, config=config, keep=keep).on(lm):
            for loss in block_losses(lm, behind, texts, EvalConfig(batch_size=1)):
                losses.append(loss)
                done += 1
                if len(losses) < len(texts):
                    yield done, at_most

    def evaluate(number: int) -> Iterator[tuple[int, int]]:
        if number in state.points:
            return
        yield from run_under(under, frozenset(ratios.above(alphas[number])))
        try:
            state.points[number] = perplexity(losses)
        except NotFiniteError:  # a quantizer that destroys the model is outside every target
            state.points[number] = None
        yield done, at_most

    if state.reference is None:
        yield from run_under(per_token(fitted.config), frozenset())
        state.reference = perplexity(losses)
        yield done, at_most
    yield from evaluate(0)
    low = high = 0
    if not state.within(0, settings.target):
        yield from evaluate(last)
        low, high = 1, last
        if not state.within(last, settings.target):
            low = last
    while low < high:
        middle = (low + high) // 2
        yield from evaluate(middle)
        if state.within(middle, settings.target):
            high = middle
        else:
            low = middle + 1
    state.found, state.reached = high, state.within(high, settings.target)
    for number in curve_numbers(last, settings.curve):
        yield from evaluate(number)
    yield at_most, at_most
