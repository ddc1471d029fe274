"""RoSTE's choice of rotations (arXiv 2502.09003, section 3.3): a site is rotated only where that lowers the error.

## Rotation where it helps

`quantizer.rotation_sites=adaptive` is RoSTE's choice (arXiv [2502.09003](https://arxiv.org/abs/2502.09003), section
3.3) without its training. A site is one input of R4, or the
values of one layer. Over the calibration texts behind the row's own prefix, with the stream rotated and smoothed as
the quantizer says and no site rotated,

    e(R) = sum ||Q(W R) - W R||^2 + mean over texts ||Q(X R) - X R||^2

is computed for R = I and R = H: of the weights that the site touches (two for values), of the input and, for values,
of the cache, as far as the quantizer rounds them. H is taken where it is strictly smaller, so where nothing is
rounded nothing is rotated. The errors of all sites are in `sites.json` of the cached step `rotation_sites`. Ours: the
terms are summed as they stand, as in the paper; weights are rounded to nearest also where GPTQ rounds them later;
static scales are judged by the range of each text; the stream (R1) and keys (R3) are not chosen but set; inputs that
QFeM keeps count as rounded. `quantizer=quarot_adaptive` has QuaRot's grids and GPTQ, where RoSTE trains what it rounds
to nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from cushion.artifacts import read_json, write_json
from cushion.errors import CalibrationError
from cushion.float64 import in_float64
from cushion.models import LanguageModel
from cushion.quantization.effect import Site, Work
from cushion.quantization.formats.blocks import quantizer_of
from cushion.quantization.hadamard import HadamardTransform
from cushion.quantization.head_rotation import turned_maker, turned_reader, value_linears
from cushion.quantization.input_rotation import head_size, rotated_linears, rotation_of
from cushion.quantization.inputs import grid_of, input_grid
from cushion.quantization.numerics import Grid, QuantizedWeight
from cushion.quantization.parts.activations import ActivationConfig
from cushion.quantization.parts.head_rotation import rotates_values
from cushion.quantization.parts.kv_cache import KvCacheConfig
from cushion.quantization.parts.rotation_sites import input_site, values_site
from cushion.quantization.quantizer import QuantizerConfig
from cushion.quantization.rotation import times
from cushion.quantization.statistics.observer import InputObserver
from cushion.quantization.weights import WEIGHTS

FILE_NAME = "sites.json"


class SiteErrors(InputObserver):
    """The error of every site, plain and rotated: of the weights at once, of inputs and cached values text by text.

    Args:
        lm: the model, with what the quantizer does before it rounds, but with no site rotated: make it there.
        config: the quantizer; its sites are those that it would rotate.

    """

    def __init__(self, lm: LanguageModel, config: QuantizerConfig) -> None:
        self._work, self._targets = Work(lm, config), lm.linears(config.targets)
        self._rotate = HadamardTransform()
        _, _, self._head_size = lm.architecture.cache_shape(lm.model.config.get_text_config())
        self._inputs = rotated_linears(lm, config) if config.input_rotation != "none" else {}
        layers = range(len(lm.blocks)) if rotates_values(config) else ()
        self._readers = {value_linears(lm, layer)[1]: layer for layer in layers}
        self._texts = 0
        self._seen: dict[str, Tensor] = {}
        self._weights: dict[str, Tensor] = {}
        self._head_sizes: dict[str, int] = {}
        for name, linear in self._inputs.items():
            self._head_sizes[name] = head_size(lm, config, name)
            matrix = rotation_of(linear.in_features, self._head_sizes[name])
            turned = times(linear.weight, matrix).to(linear.weight.dtype)
            self._weights[input_site(name)] = self._of_weight(name, linear.weight, turned)
        for layer in layers:
            maker, reader = value_linears(lm, layer)
            made, read = (lm.model.get_submodule(name).weight for name in (maker, reader))
            assert isinstance(made, nn.Parameter) and isinstance(read, nn.Parameter)
            errors = self._of_weight(maker, made, turned_maker(lm, made))
            self._weights[values_site(layer)] = errors + self._of_weight(reader, read, turned_reader(lm, read))

    def _of_weight(self, name: str, *weights: Tensor) -> Tensor:
        """The squared errors of several versions of a weight, (versions,); 0 where it is not rounded."""
        if self._work.config.weights.bits is None or name not in self._targets:
            return torch.zeros(len(weights), dtype=torch.float64)
        found = []
        for weight in weights:
            site = Site(name, self._targets[name], weight.detach(), None)
            WEIGHTS.at(self._work, site)
            assert isinstance(site.weight, QuantizedWeight)
            found.append(squared_distance(site.weight.dequantize(), weight))
        return torch.stack(found)

    def _of_inputs(self, *versions: Tensor) -> Tensor:
        """The squared errors of several versions of a linear's input."""
        return self._of_flow(input_grid(self._work.config), self._work.config.activations, *versions)

    def _of_cache(self, *versions: Tensor) -> Tensor:
        """The squared errors of several versions of what is cached."""
        own = self._work.config.kv_cache
        grid, heads = grid_of(self._work.config, own), [versions]
        if own.granularity == "per_head":
            heads = list(zip(*(version.unbind(1) for version in versions), strict=True))
        return torch.stack([self._of_flow(grid, own, *of) for of in heads]).sum(0)

    def _of_flow(self, grid: Grid, own: ActivationConfig | KvCacheConfig, *versions: Tensor) -> Tensor:
        """The squared errors of several versions of what flows through the model, rounded as its part `own` does."""
        granularity = own.granularity if own.granularity == "per_token" else "per_tensor"
        rounding = quantizer_of(grid, granularity, clip_ratio=own.clip_ratio)
        return torch.stack([squared_distance(rounding(one), one) for one in versions])

    def __call__(self, name: str, values: Tensor) -> None:
        """Add the input of one linear, (1, tokens, channels) or (tokens, channels)."""
        activations = self._work.config.activations
        if activations.bits is None or name not in self._targets:
            return
        if name in self._inputs:
            heads = values.unflatten(-1, (-1, self._head_sizes[name]))
            turned = self._rotate(heads.mT).mT.reshape(values.shape)
            self._add(input_site(name), self._of_inputs(values, turned))
        if name in self._readers:
            turned = self._rotate(values.unflatten(-1, (-1, self._head_size))).flatten(-2)
            self._add(values_site(self._readers[name]), self._of_inputs(values, turned))

    def watch(self, cache: DynamicCache) -> None:
        """See the values that enter the cache of a text."""
        self._texts += 1
        if self._work.config.kv_cache.bits is None or not self._readers:
            return
        update = cache.update

        def watched(key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            rounded = value_states[:, :, self._work.config.kv_cache.protect :]
            if rounded.shape[2]:  # a text may be protected as a whole
                self._add(values_site(layer_idx), self._of_cache(rounded, self._rotate(rounded)))
            return update(key_states, value_states, layer_idx, *args, **kwargs)

        setattr(cache, "update", watched)  # noqa: B010  # a method of this object alone, which lives for one text

    def _add(self, site: str, errors: Tensor) -> None:
        self._seen[site] = self._seen.get(site, torch.zeros_like(errors)) + errors

    @property
    def errors(self) -> dict[str, tuple[float, float]]:
        """e(I) and e(H) of every site.

        Raises:
            CalibrationError: one is not finite.

        """
        found = {}
        for site, errors in self._weights.items():
            if site in self._seen:
                errors = errors + self._seen[site] / self._texts
            if not bool(errors.isfinite().all()):
                raise CalibrationError(
                    f"the error of the {site} is not finite on the calibration text: use model.dtype=float32 or "
                    "bfloat16"
                )
            plain, rotated = errors.tolist()
            found[site] = plain, rotated
        return found

    def write(self, folder: Path) -> None:
        """Keep the errors, `sites.json`: for each site e(I) and e(H)."""
        write_json(folder / FILE_NAME, self.errors)

    @classmethod
    def read(cls, folder: Path, device: torch.device) -> frozenset[str]:
        """The sites that are better left alone."""
        return better_alone(read_json(folder / FILE_NAME, folder.parent))


def better_alone(errors: Mapping[str, Any]) -> frozenset[str]:
    """The sites whose error a rotation does not lower."""
    return frozenset(site for site, (plain, rotated) in errors.items() if rotated >= plain)


def squared_distance(one: Tensor, other: Tensor) -> Tensor:
    """`||one - other||^2`, a float64 scalar on the CPU."""
    return (in_float64(one) - in_float64(other)).square().sum().cpu()
