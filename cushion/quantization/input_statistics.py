"""What the parts of a quantizer need to know of the linears' inputs as they find them, gathered in one pass.

Rotation and smoothing are in place, and nothing is rounded yet. The prefix stands before each text through the cache,
so its own positions are in no statistic.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor

from cushion.activations import ChannelRanges, observe_inputs
from cushion.artifacts import Workspace, read_json, write_json
from cushion.code import version_at
from cushion.hashing import tensor_digest
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.calibration import Calibration, calibrate
from cushion.quantization.fitted import FittedQuantizer, rotation_under
from cushion.quantization.identity import quantizer_identity, rotation_of
from cushion.quantization.parts.base import Needed
from cushion.quantization.parts.registry import PARTS, without_rounding
from cushion.quantization.parts.rotation_sites import LEFT_ALONE, rotated_nowhere
from cushion.quantization.parts.smoothing_search import SEARCHED
from cushion.quantization.quantizer import QuantizerConfig
from cushion.quantization.rotation import rotated
from cushion.quantization.rotation_sites import SiteErrors, better_alone
from cushion.quantization.smoothing_search import search_smoothing
from cushion.quantization.statistics.gathered import GatheredStatistics, read_statistics
from cushion.quantization.statistics.observer import InputObserver
from cushion.registry import located
from cushion.step import Context, Step

FOUND_FIRST = frozenset({SEARCHED, LEFT_ALONE})
"""What steps of their own find, in this order, before everything else is gathered behind it."""

NO_INPUTS: Mapping[Needed, Any] = {}


@torch.no_grad()
def observe_fitted(
    lm: LanguageModel,
    behind: Prefix,
    texts: Tensor,
    fitted: FittedQuantizer,
    observers: Sequence[Callable[[str, Tensor], None]],
) -> Iterator[int]:
    """Run `texts` through the model as the quantizer finds it, without any rounding, and let `observers` collect.

    Args:
        texts: token ids, (texts, tokens). Each text is run alone, behind the prefix.
        fitted: its rotation and smoothing are in place while the inputs are seen.
        observers: filled in place, with all linears of the decoder blocks.

    Yields:
        The number of texts done. Between two texts the smoothing is still on the model: close the generator before
        using the model for anything else.

    """
    with replace(fitted, config=without_rounding(fitted.config)).on(lm):
        for observer in observers:
            if isinstance(observer, GatheredStatistics):
                observer.by_linear.rotation = lm.rotation
        for done, text in enumerate(texts, start=1):
            cache = behind.cache(lm.model)
            with ExitStack() as hooks:
                for observer in observers:
                    hooks.enter_context(observe_inputs(lm.linears(), observer))
                    if isinstance(observer, InputObserver):
                        observer.watch(cache)
                lm.body(text[None], past_key_values=cache, use_cache=True)
            yield done


def observe_sites(
    lm: LanguageModel,
    behind: Prefix,
    texts: Tensor,
    quantizer: QuantizerConfig,
    ranges: ChannelRanges | None,
    inputs: Mapping[Needed, Any] = NO_INPUTS,
) -> Iterator[tuple[int, SiteErrors]]:
    """Run `texts` through the model with no site rotated, and collect the errors that a rotation of each would lower.

    Args:
        texts: token ids, (texts, tokens). Each text is run alone, behind the prefix.
        quantizer: its errors are collected.
        ranges: with which it smooths.
        inputs: what was found before, such as scales with which it smooths.

    Yields:
        The number of texts done, and the errors so far. Close the generator before using the model for anything else.

    """
    plain = FittedQuantizer(without_rounding(rotated_nowhere(quantizer)), ranges, inputs=inputs)
    with plain.on(lm):
        errors = SiteErrors(lm, quantizer)
    for done in observe_fitted(lm, behind, texts, plain, [errors]):
        yield done, errors


@dataclass(frozen=True)
class InputStatistics:
    """What was gathered, by what was needed; the artifact's key, and the seconds it took."""

    found: dict[Needed, Any]
    key: str
    seconds: float


@dataclass(frozen=True, eq=False)
class InputStatisticsStep(Step[InputStatistics]):
    """Statistics of the inputs of all linears behind a prefix.

    Args:
        behind: the prefix.
        quantizer: its smoothing and rotation are in place.
        calibration: statistics behind the same prefix, where the quantizer smooths, and the sites that it leaves alone.
        texts: token ids, (texts, tokens).
        title: how progress calls the prefix.

    """

    name = "inputs"
    """Files: `inputs.json`, and files of each statistic, such as QFeM's ratios or histograms
    Key: `prefix`, `quantizer`, `gathered`, `texts`
    Of that: of the quantizer what it does before it rounds, smoothing with its calibration; what is gathered, with
        the code for it
    """
    behind: Prefix
    quantizer: QuantizerConfig
    calibration: Calibration | None
    texts: Tensor
    title: str

    def key(self, context: Context) -> dict[str, Any]:
        """Prefix, what the quantizer does before it rounds, what is gathered and its code, and texts."""
        return {
            "prefix": self.behind.fingerprint,
            "quantizer": quantizer_identity(without_rounding(self.quantizer), self.calibration),
            "gathered": [[*needed, version_at(needed.place)] for needed in self._needed()],
            "texts": tensor_digest([self.texts]),
        }

    def make(self, context: Context, workspace: Workspace) -> None:
        """Run the texts once for everything that is gathered."""
        started = time.perf_counter()
        observers = [_observer(needed) for needed in self._needed()]
        fitted = FittedQuantizer.of(self.quantizer, self.calibration)
        seen = observe_fitted(context.lm, self.behind, self.texts, fitted, observers)
        for done in seen if observers else ():
            context.progress(f"statistics, {self.title}", done, len(self.texts), "text")
        _write(observers, workspace.folder)
        write_json(workspace.folder / "inputs.json", {"seconds": time.perf_counter() - started})

    def read(self, context: Context, folder: Path) -> InputStatistics:
        """Everything that was gathered, on the model's device."""
        seconds = float(read_json(folder / "inputs.json")["seconds"])
        known = {} if self.calibration is None else self.calibration.inputs
        found = {**known, **_read_all(self._needed(), folder, context.lm, self.quantizer)}
        return InputStatistics(found, folder.name, seconds)

    def _needed(self) -> list[Needed]:
        return sorted(self.quantizer.gathered - FOUND_FIRST)


def fitted_behind(
    lm: LanguageModel, behind: Prefix, quantizer: QuantizerConfig, texts: Tensor, keep: frozenset[str] | None = None
) -> FittedQuantizer:
    """A quantizer with all that the cached steps measure for it behind a prefix, measured now and not cached.

    Args:
        lm: in full precision.
        texts: token ids, (texts, tokens): the calibration texts of the run.
        keep: the linears that QFeM keeps; they are not chosen anew.

    Raises:
        CalibrationError: an activation is not finite.

    """
    ranges = None
    if quantizer.needs_calibration:
        ranges = ChannelRanges()
        rotation, seed = rotation_of(quantizer)
        with rotated(lm, rotation, seed):
            deque(calibrate(lm, behind, texts, ranges), maxlen=0)
    first: dict[Needed, Any] = {}
    if SEARCHED in quantizer.gathered:
        *_, (_, found) = search_smoothing(lm, behind, texts, quantizer)
        first[SEARCHED] = found.folds
    if LEFT_ALONE in quantizer.gathered:
        *_, (_, errors) = observe_sites(lm, behind, texts, quantizer, ranges, first)
        first[LEFT_ALONE] = better_alone(errors.errors)
    fitted = FittedQuantizer(quantizer, ranges, keep, first)
    needed = sorted(PARTS["qfem"].off(quantizer).gathered - FOUND_FIRST)
    if not needed:
        return fitted
    observers = [_observer(one) for one in needed]
    deque(observe_fitted(lm, behind, texts, fitted, observers), maxlen=0)
    with TemporaryDirectory() as folder:  # through files, as the cached step has it
        _write(observers, Path(folder))
        return replace(fitted, inputs={**fitted.inputs, **_read_all(needed, Path(folder), lm, quantizer)})


def _write(observers: Sequence[InputObserver | GatheredStatistics], into: Path) -> None:
    for number, observer in enumerate(observers):
        folder = into / str(number)
        folder.mkdir(exist_ok=True)
        observer.write(folder)


def _read_all(
    needed: Sequence[Needed], folder: Path, lm: LanguageModel, quantizer: QuantizerConfig
) -> dict[Needed, Any]:
    """What `_write` kept of the model under a quantizer."""
    found: dict[Needed, Any] = {}
    for number, one in enumerate(needed):
        kind, own = located(one.place), folder / str(number)
        if issubclass(kind, InputObserver):
            found[one] = kind.read(own, lm.device)
        else:
            found[one] = read_statistics(kind, own, rotation_under(lm, quantizer))
    return found


def _observer(needed: Needed) -> InputObserver | GatheredStatistics:
    kind = located(needed.place)
    if issubclass(kind, InputObserver):
        return cast(InputObserver, kind(**dict(needed.options)))
    return GatheredStatistics(partial(kind, **dict(needed.options)))
