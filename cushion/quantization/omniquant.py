"""OmniQuant (arXiv 2308.13137): ranges of weights and equivalent transforms, learned block by block.

## OmniQuant

`reconstruction.method=omniquant`, after the authors' code (arXiv [2308.13137](https://arxiv.org/abs/2308.13137)), on
the two streams of [reconstruction](#reconstruction) and with its loss; Adam has constant rates.

- Learnable weight clipping (section 3.2): each row or group of a weight keeps the share sigmoid(g) of its largest
  magnitude, g = 4 at first.
- Learnable equivalent transform (section 3.3): the input of the linears that read one norm is divided by a scale of
  each channel and the columns of their weights are multiplied with it, and so is that of the output projection. Scales
  start as SmoothQuant's; heads that read the same values have the same.

Both are differentiated through the rounding. Nothing is folded: the division stands before each linear, which gives the
same, and cached values are those without scales. Weights and norms stay as they are, but what is learned is learned
from the outputs of blocks, as PrefixQuant's ranges are: so its rows are reconstructed ones too. What differs from the
code: symmetric weights; no shift, and no scale between queries and keys; queries are not rounded (the cache is); scales
learn as logarithms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from cushion.config import ReconstructionConfig
from cushion.execution.registry import SIMULATED, load_execution
from cushion.quantization.effect import Turn
from cushion.quantization.fitted import rounded
from cushion.quantization.head_rotation import value_heads
from cushion.quantization.input_rotation import output_projections
from cushion.quantization.learned import HALF_PRECISION_SCALING
from cushion.quantization.linear import straight_through
from cushion.quantization.numerics import Grid
from cushion.quantization.reconstruction import BlockRecord, batches, checked_error, error_of, squared_error
from cushion.quantization.smoothquant import smoothing_scales
from cushion.quantization.weights import weight_grid

INITIAL = 4.0
"""g at first: a share of 0.982."""


def learn_block(turn: Turn, config: ReconstructionConfig, seed: int) -> BlockRecord:
    """Let the ranges of the weights of one block learn, and the scales of its inputs.

    What was learned is left in the dictionaries of `turn.work.learned`, where it lowers the error of the block's
    output. Arguments and errors as those of `reconstruct_block`.
    """
    transforms = transforms_of(turn, config.transform_alpha) if config.transforms else []
    work = replace(turn.work, straight_through=True)
    with rounded(work, load_execution(SIMULATED), turn.index) as placed:
        before = checked_error(turn, config)
        own = _Block(turn, config, placed, transforms)
        nothing_learns = not (own.clipping or own.transforms)  # no linear before the inputs can take a scale
        if before == 0.0 or config.epochs == 0 or nothing_learns:
            return BlockRecord(turn.index, before, before, False)
        _learn(turn, config, seed, own, before)
        with torch.no_grad():
            own.put()
            after = error_of(turn, config.batch_size)
    kept = after < before
    if kept:
        turn.work.learned.shares.update(own.shares())
        turn.work.learned.divisors.update(own.divisors())
    return BlockRecord(turn.index, before, after, kept)


@dataclass(eq=False)
class Transform:
    """The scale of what several linears read.

    Args:
        names: of these linears.
        logarithm: of the scale, (channels,), or (value heads, 1, head size) before an output projection; learns.
        heads: how many heads read each value head; 1 behind a norm.

    """

    names: tuple[str, ...]
    logarithm: nn.Parameter
    heads: int = 1

    @property
    def scale(self) -> Tensor:
        """(in_features,), positive."""
        scale = self.logarithm.exp()
        return scale.expand(-1, self.heads, -1).flatten() if scale.dim() == 3 else scale


class _Block:
    """What learns in one block, and the linears that compute with it."""

    def __init__(
        self, turn: Turn, config: ReconstructionConfig, placed: dict[str, nn.Module], transforms: list[Transform]
    ) -> None:
        quantizer = turn.work.config
        self._placed, self._grid = placed, weight_grid(quantizer)
        self._size = quantizer.weights.group_size if quantizer.weights.granularity == "per_group" else None
        self._dims = (0, 1) if quantizer.weights.granularity == "per_tensor" else (-1,)
        self._weights = {name: site.linear.weight.detach() for name, site in turn.sites.items()}
        self.transforms = transforms
        self.clipping: dict[str, nn.Parameter] = {}
        for name, weight in self._weights.items():
            if config.clipping:
                shape = self._grouped(weight).float().abs().amax(self._dims, keepdim=True)
                self.clipping[name] = nn.Parameter(torch.full_like(shape, INITIAL))
            del placed[name].weight  # a parameter without gradient, in whose place `put` sets what depends on ours
            placed[name].register_forward_pre_hook(lambda _module, args, name=name: self._divided(name, args))
        self.put()

    def put(self) -> None:
        """Let the linears compute with what there is now, rounded, and pass their gradients on."""
        self._scales = {name: own.scale for own in self.transforms for name in own.names}
        for name, weight in self._weights.items():
            scaled = (weight.float() * self._scales[name]).to(weight.dtype) if name in self._scales else weight
            share = torch.sigmoid(self.clipping[name]) if name in self.clipping else None
            grouped = clipped_weight(self._grouped(scaled), self._dims, share, self._grid)
            self._placed[name].weight = grouped.reshape(weight.shape).to(weight.dtype)

    def _grouped(self, weight: Tensor) -> Tensor:
        return weight if self._size is None else weight.unflatten(1, (-1, self._size))

    def _divided(self, name: str, args: tuple[Tensor]) -> tuple[Tensor] | None:
        if name not in self._scales:
            return None
        (values,) = args
        return ((values / self._scales[name]).to(values.dtype),)

    def shares(self) -> dict[str, Tensor]:
        """What of the largest magnitude is kept, by linear."""
        return {name: torch.sigmoid(own).detach().cpu() for name, own in self.clipping.items()}

    def divisors(self) -> dict[str, Tensor]:
        """The scales of inputs, by linear."""
        return {name: own.scale.detach().cpu() for own in self.transforms for name in own.names}


def clipped_weight(weight: Tensor, dims: tuple[int, ...], share: Tensor | None, grid: Grid) -> Tensor:
    """The weight on the grid whose range is a share of its own, differentiable in both.

    Args:
        weight: (out_features, in_features), or (out_features, groups, size).
        dims: over which a range extends.
        share: with a 1 for each of `dims`; None for 1.
        grid: symmetric.

    Returns:
        float32, of the shape of `weight`.

    """
    values = weight.float()
    kept = 1.0 if share is None else share
    scale, _ = grid.parameters(values.amin(dims, keepdim=True) * kept, values.amax(dims, keepdim=True) * kept)
    units = (values / scale).clamp(*grid.bounds)
    return straight_through(units, grid.rounded(units.detach().clone())) * scale


@torch.no_grad()
def transforms_of(turn: Turn, alpha: float) -> list[Transform]:
    """The scales of a block, none of whose linears is replaced yet, as SmoothQuant has them with this alpha.

    There is none for what is rotated while the model runs: no linear before it could take the scale.
    """
    work, lm = turn.work, turn.work.lm
    largest: dict[str, Tensor] = {}
    for names, values in turn.shared_inputs(full_precision=True):
        seen = values.flatten(0, -2).float().abs().amax(0)
        for name in names:
            largest[name] = torch.maximum(largest[name], seen) if name in largest else seen
    groups = [tuple(name for name in readers if name in largest) for _, readers in lm.norm_readers(turn.index)]
    found = []
    for names in (group for group in groups if group and not any(name in work.input_hooks for name in group)):
        magnitudes = torch.stack([largest[name] for name in names]).amax(0)
        weights = [turn.sites[name].linear.weight.detach() for name in names]
        found.append(Transform(names, nn.Parameter(smoothing_scales(magnitudes, weights, alpha).log())))
    _, _, size = lm.architecture.cache_shape(lm.model.config.get_text_config())
    heads = value_heads(lm) if lm.architecture.values is not None else 0
    for name in output_projections(lm) & largest.keys() - work.input_hooks.keys():
        shape = (heads, -1, size)  # heads that read the same values have the same scale
        magnitudes = largest[name].view(shape).amax(1)
        weight = turn.sites[name].linear.weight.detach().abs().amax(0).view(shape).amax(1)
        scale = smoothing_scales(magnitudes.flatten(), [weight.flatten()[None]], alpha).view(heads, 1, size)
        found.append(Transform((name,), nn.Parameter(scale.log()), len(largest[name]) // (heads * size)))
    return found


@torch.enable_grad()
def _learn(turn: Turn, config: ReconstructionConfig, seed: int, own: _Block, before: float) -> None:
    groups = [
        {"params": list(own.clipping.values()), "lr": config.clipping_learning_rate},
        {"params": [one.logarithm for one in own.transforms], "lr": config.transform_learning_rate},
    ]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    scaling = HALF_PRECISION_SCALING if turn.inputs.dtype == torch.float16 else 1.0
    for chosen in batches(len(turn.texts), config, turn.index, seed):
        own.put()
        optimizer.zero_grad()
        (squared_error(turn, chosen).mean() / before * scaling).backward()
        optimizer.step()
