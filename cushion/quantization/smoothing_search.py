"""The search of smoothing scales: for every norm, of a grid of scales those with the least error of what reads it.

## Searched smoothing

`quantizer.smoothing_search` chooses the scales of each norm from a grid, by the outputs of the linears that read it,
under the run's own quantizer:

    E(s) = sum over linears and calibration tokens of ||Q(X / s) Q(W diag(s))^T - X W^T||^2

X is the norm's output in the full-precision model, rotated as the quantizer says, behind the row's prefix. The least
E wins, of equal ones the first. The quantizer of the inputs has the very ranges that the run has, with its estimator;
weights are rounded to nearest, also where GPTQ rounds them in the run. Only ranges that are found by outputs
(`activations.estimator=block_output`, `weights.estimator=output`) come after it: it has min-max in their place.
Linears outside `targets` have no say.
`smoothing.json` of the step `smoothing` has the grid of each norm with its errors.

- `smoothquant`: [SmoothQuant](method.md#smoothquant)'s s, with alpha from 0 to 1 in `smoothing_steps` steps. alpha =
  0 is not the model as it was: it evens out the columns of the weights.
- `awq` (arXiv [2306.00978](https://arxiv.org/abs/2306.00978), section 3.2): s_j = (mean|X_j|)^alpha, at least 1e-4,
  divided by sqrt(max s * min s); alpha from 0 (nothing is changed) to 1 in `smoothing_steps` steps. The authors' code
  stops at 0.95, measures the output of attention and MLP where we take the linears' own, has asymmetric weights in
  groups of 128 (`quantizer=awq` has 64, which divides the widths of small models too), and scales between value and
  output and between up and down projection too.
- `os_plus` (Outlier Suppression+, arXiv [2304.09145](https://arxiv.org/abs/2304.09145), section 4): the linears read
  (X - z) / s, with z_j = (max X_j + min X_j) / 2 and s_j = max(1, max|X_j - z_j| / t); t from max|X - z| down to a
  `smoothing_steps`-th of it. Their bias becomes b + W z; a linear without one gets it. The norm's bias becomes (b -
  z) / s. A norm without a bias (LLaMA's RMSNorm) has z / s taken from its output while the model runs, which costs an
  addition for each value there and cannot be exported as a plain checkpoint. Where a router reads the norm, nothing
  is shifted. The authors' code has at least 100 steps and measures the output of attention. Static ranges of min-max
  move with z.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from cushion.activations import ChannelRanges, observe_inputs, observe_outputs
from cushion.artifacts import read_json, read_tensors, write_json
from cushion.blockwise import BlockRunner
from cushion.errors import CalibrationError, input_not_finite
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.awq import awq_scales
from cushion.quantization.effect import Effect, Site, Work
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.inputs import INPUTS
from cushion.quantization.numerics import QuantizedWeight
from cushion.quantization.os_plus import channel_shift, threshold_scales
from cushion.quantization.parts.activations import range_from
from cushion.quantization.parts.base import RANGES
from cushion.quantization.parts.registry import PARTS, turned_off, without_rounding
from cushion.quantization.parts.rotation_sites import rotated_nowhere
from cushion.quantization.parts.smoothing_search import SEARCHED
from cushion.quantization.quantizer import QuantizerConfig
from cushion.quantization.replacements import Replacements
from cushion.quantization.smoothing import check_smoothable, fold_scale, fold_shift, scaled_weight
from cushion.quantization.smoothquant import smoothing_scales
from cushion.quantization.weights import WEIGHTS
from cushion.registry import located

FILE_NAME = "scales.safetensors"


@dataclass(frozen=True)
class Fold:
    """What is taken from a norm's output, and what that is divided by then, with the number that gave it.

    Args:
        scale: float32, (channels,), all positive.
        value: of the searched number, alpha or a threshold.
        shift: float32, (channels,); None for none.

    """

    scale: Tensor
    value: float
    shift: Tensor | None = None

    def moved(self, values: Tensor) -> Tensor:
        """`(X - z) / s` for X of shape (..., channels), in its own dtype."""
        found = values.float()
        if self.shift is not None:
            found = found - self.shift.to(values.device)
        return (found / self.scale.to(values.device)).to(values.dtype)


@dataclass(frozen=True)
class Group:
    """A norm and the linears that read it, with what they read on the calibration texts.

    Args:
        norm: full name.
        outputs: of the norm, text by text, each (tokens, channels).
        linears: by full name, as the quantizer finds them.
        inputs: of each linear that is quantized, text by text; tensors that several linears read are the same objects.
            An expert has those of the tokens that were routed to it.
        takes_shift: whether all that reads the norm are linears, whose bias can take what a shift of it loses.

    """

    norm: str
    outputs: Sequence[Tensor]
    linears: Mapping[str, nn.Linear]
    inputs: Mapping[str, Sequence[Tensor]]
    takes_shift: bool


def awq_candidates(group: Group, steps: int) -> Iterator[Fold]:
    """AWQ's scales with alpha from 0 to 1 in `steps` steps."""
    magnitudes = torch.cat([one.float().abs() for one in group.outputs]).mean(0)
    for number in range(steps + 1):
        yield Fold(awq_scales(magnitudes, number / steps), number / steps)


def smoothquant_candidates(group: Group, steps: int) -> Iterator[Fold]:
    """SmoothQuant's scales with alpha from 0 to 1 in `steps` steps."""
    largest = torch.cat(list(group.outputs)).abs().amax(0)
    weights = [linear.weight.detach() for linear in group.linears.values()]
    for number in range(steps + 1):
        yield Fold(smoothing_scales(largest, weights, number / steps), number / steps)


def os_plus_candidates(group: Group, steps: int) -> Iterator[Fold]:
    """Outlier Suppression+'s shift, with thresholds from the largest magnitude downwards in `steps` steps."""
    values = torch.cat(list(group.outputs)).float()
    shift = channel_shift(values.amin(0), values.amax(0)) if group.takes_shift else None
    largest = (values if shift is None else values - shift).abs().amax(0)
    for number in range(steps, 0, -1):
        threshold = float(largest.max()) * number / steps
        yield Fold(threshold_scales(largest, threshold), threshold, shift)


CANDIDATES: dict[str, Callable[[Group, int], Iterator[Fold]]] = {
    "smoothquant": smoothquant_candidates,
    "awq": awq_candidates,
    "os_plus": os_plus_candidates,
}
"""By method, the grid of a group."""


def searched_under(quantizer: QuantizerConfig) -> QuantizerConfig:
    """What of a quantizer decides the search: weights, activations, what keeps the function, and the search itself."""
    plain = rotated_nowhere(quantizer) if quantizer.rotation_sites == "adaptive" else quantizer
    return turned_off(plain, lambda part: not (part.keeps_function or part.name in ("weights", "activations")))


@dataclass
class SmoothingSearch:
    """What was found so far.

    Args:
        folds: by the norm's full name.
        errors: by the norm's full name, the searched number and its error for every point of the grid.

    """

    folds: dict[str, Fold] = field(default_factory=dict)
    errors: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def add(self, group: Group, quantizer: QuantizerConfig, work: Work) -> None:
        """Choose from the grid of a group; of equally good points the first.

        Raises:
            CalibrationError: what the group reads is not finite, or no point has a finite error.

        """
        if not all(bool(values.isfinite().all()) for values in group.outputs):
            raise input_not_finite(group.norm)
        references = {
            name: [functional.linear(one, group.linears[name].weight) for one in own]
            for name, own in group.inputs.items()
        }
        least, points = math.inf, self.errors.setdefault(group.norm, [])
        for fold in CANDIDATES[quantizer.smoothing_search](group, quantizer.smoothing_steps):
            error = output_error(group, fold, quantizer, work, references)
            points.append((fold.value, error))
            if error < least:
                least, self.folds[group.norm] = error, fold
        if group.norm not in self.folds:
            raise CalibrationError(
                f"no smoothing of {group.norm} leaves a finite error on the calibration text: use "
                "model.dtype=float32 or bfloat16"
            )

    def write(self, folder: Path) -> None:
        """Keep the scales, and for every norm the grid with its errors, `smoothing.json`."""
        tensors = {f"scale {norm}": fold.scale for norm, fold in self.folds.items()}
        tensors |= {f"shift {norm}": fold.shift for norm, fold in self.folds.items() if fold.shift is not None}
        save_file({name: one.cpu().clone().contiguous() for name, one in tensors.items()}, folder / FILE_NAME)
        found = {norm: {"found": fold.value, "errors": self.errors[norm]} for norm, fold in self.folds.items()}
        write_json(folder / "smoothing.json", found)

    @classmethod
    def read(cls, folder: Path, device: torch.device) -> dict[str, Fold]:
        """What was found, by norm."""
        tensors, found = read_tensors(folder / FILE_NAME, str(device)), read_json(folder / "smoothing.json")
        return {
            norm: Fold(tensors[f"scale {norm}"], float(own["found"]), tensors.get(f"shift {norm}"))
            for norm, own in found.items()
        }


def output_error(
    group: Group,
    fold: Fold,
    quantizer: QuantizerConfig,
    work: Work,
    references: Mapping[str, Sequence[Tensor]],
) -> float:
    """The squared error of the outputs of a group's quantized linears, summed over tokens and outputs.

    Args:
        group: the linears, not smoothed.
        fold: with which they are smoothed.
        quantizer: of weights and inputs.
        work: the model that they are in.
        references: their outputs in full precision, without bias, as `group.inputs`.

    """
    error, known = 0.0, dict[tuple[int, ...], list[Tensor]]()
    for name, own in group.inputs.items():
        linear, module = group.linears[name], name.rpartition(".")[0]
        fused = {
            other: partial(scaled_weight, group.linears[other].weight.detach(), fold.scale)
            for other in group.inputs
            if other.rpartition(".")[0] == module
        }
        site = Site(name, linear, fused[name](), None, fused=fused)
        if quantizer.weights.bits is not None:
            WEIGHTS.at(work, site)
        weight = site.weight.dequantize() if isinstance(site.weight, QuantizedWeight) else site.weight
        same = tuple(id(one) for one in own)
        if same not in known:
            known[same] = _quantized([fold.moved(one) for one in own], name, linear, quantizer, work)
        bias = None
        if fold.shift is not None:
            bias = (linear.weight.float() @ fold.shift.to(linear.weight.device)).to(weight.dtype)
        for values, reference in zip(known[same], references[name], strict=True):
            error += float((functional.linear(values, weight, bias) - reference).float().square().sum())
    return error


def _quantized(
    texts: list[Tensor], name: str, linear: nn.Linear, quantizer: QuantizerConfig, work: Work
) -> list[Tensor]:
    """The inputs of a linear on the grid of the quantizer, whose static range follows from these very inputs."""
    if quantizer.activations.bits is None:
        return texts
    ranges, inputs = ChannelRanges(), {}
    if quantizer.activations.range == "static":
        needed = range_from(quantizer)
        observed = ranges if needed == RANGES else None
        if observed is None:
            statistic = located(needed.place)(**dict(needed.options))
            inputs[needed] = {name: statistic}
        for one in texts:
            if observed is None:
                statistic.update(one)
            elif one.numel():
                observed(name, one)
    site = Site(name, linear, linear.weight, None)
    INPUTS.at(Work(work.lm, quantizer, ranges, inputs), site)
    assert site.activation is not None
    return [site.activation(one) if one.numel() else one for one in texts]


@torch.no_grad()
def search_smoothing(
    lm: LanguageModel, behind: Prefix, texts: Tensor, quantizer: QuantizerConfig
) -> Iterator[tuple[int, SmoothingSearch]]:
    """Search the scales of every norm whose readers are quantized, block by block.

    Args:
        lm: in full precision.
        behind: the prefix; each text stands behind it alone.
        texts: token ids, (texts, tokens).
        quantizer: its errors decide.

    Yields:
        The number of blocks done, and what was found so far. Close the generator before using the model for anything
        else.

    """
    under, search, runner = searched_under(quantizer), SmoothingSearch(), BlockRunner(lm, behind)
    plain = without_rounding(PARTS["smoothing_search"].off(under))
    targets = lm.linears(quantizer.targets)
    with FittedQuantizer(plain).surroundings(lm):
        work = Work(lm, under)
        hidden = list(torch.cat([runner.inputs(text) for text in texts.split(1)]).split(1))
        for index in range(len(lm.blocks)):
            with _groups(lm, index, targets) as groups:
                hidden = [runner(index, text, one) for text, one in zip(texts.split(1), hidden, strict=True)]
            for group in groups:
                if group.inputs:
                    search.add(group, under, work)
            yield index + 1, search


@contextmanager
def _groups(lm: LanguageModel, index: int, targets: Mapping[str, nn.Linear]) -> Iterator[list[Group]]:
    """The groups of a block; while the `with` block lasts, they see what flows through it."""
    groups = []
    with ExitStack() as hooks:
        for norm, readers in lm.norm_readers(index):
            outputs: list[Tensor] = []
            inputs: dict[str, list[Tensor]] = {}
            linears = {name: cast(nn.Linear, reader) for name, reader in readers.items() if lm.is_quantized(name)}
            takes_shift = all(isinstance(reader, nn.Linear) for reader in readers.values())
            groups.append(Group(norm, outputs, linears, inputs, takes_shift))

            def see_output(_name: str, values: Tensor, seen: list[Tensor] = outputs) -> None:
                seen.append(values.detach().flatten(0, -2))

            def see_input(name: str, values: Tensor, seen: dict[str, list[Tensor]] = inputs) -> None:
                seen.setdefault(name, []).append(values)  # the very object: one for all that read it

            hooks.enter_context(observe_outputs({norm: lm.model.get_submodule(norm)}, see_output))
            hooks.enter_context(
                observe_inputs({name: linear for name, linear in linears.items() if name in targets}, see_input)
            )
        yield groups


class _SearchedSmoothing(Effect):
    def check(self, lm: LanguageModel, config: QuantizerConfig) -> None:
        """The norms stand before the linears, and have weights."""
        check_smoothable(lm, f"quantizer.smoothing_search={config.smoothing_search}", "quantizer.smoothing_search=none")

    @contextmanager
    def around(self, work: Work) -> Iterator[None]:
        """What was found folded into norms and all that read them; `divisors` and `shifts` have it by linear."""
        replacements, found = Replacements(), work.inputs[SEARCHED]
        with ExitStack() as stack:
            stack.callback(replacements.undo)
            for index in range(len(work.lm.blocks)):
                for norm, readers in work.lm.norm_readers(index):
                    if norm not in found:
                        continue
                    fold: Fold = found[norm]
                    fold_scale(work, norm, readers, fold.scale, replacements)
                    if fold.shift is not None:
                        fold_shift(work, norm, readers, fold.shift / fold.scale, replacements, stack)
            yield


SEARCHED_SMOOTHING = _SearchedSmoothing()
