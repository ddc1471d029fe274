"""KIVI's layout of a quantized key-value cache (arXiv 2402.02750), simulated for all queries at once.

## KIVI's layout

With `quantizer.kv_cache.layout=kivi`; `quantizer=kivi` is KIVI-2 (arXiv
[2402.02750](https://arxiv.org/abs/2402.02750)), in the order of its public code. With G = `group_size` and R =
`residual`, counted from the first token that is not of the prefix and not protected:

- keys, with their rotary positions applied, have one scale and offset for each channel of every G neighbouring
  tokens;
- values have one for each token and G neighbouring channels of a head (for all of a smaller head; the last group may
  be smaller);
- the newest tokens are in full precision. A query with t tokens before it finds the first floor(t / R) R keys
  rounded, since keys are rounded R at a time, and the first t - R values; all others, and its own key and value, are
  exact. On average half of R keys and all of R values are.

A perplexity over a block is that of decoding the block token by token: every query reads the mixture that its own
position gives, with the softmax over rounded and exact scores together: a token attends before the cache is rounded
behind it. The public code runs a prompt as a whole with exact keys and values, so its perplexity over a block in one
pass would show no error at all; a figure that was taken so does not compare with ours. A block of no more than R
tokens shows no error here either. A sliding window of the model that has cut a group is refused when it happens,
since the group's range is then gone.

The positions of the prefix enter no scale and are not rounded, neither in K and V nor in the columns of P that weigh
them. Which positions these are is known from the cache that `Prefix.cache` makes. A model whose attention does not go
through transformers' attention interface is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cushion.errors import ConfigError
from cushion.quantization.linear import ActivationQuantizer


@dataclass(frozen=True, eq=False)
class Rounded:
    """The cache of one layer as it is rounded, and for each query what of it is read so.

    Args:
        keys, values: (batch, heads, positions, head size); what no query reads rounded is as it was.
        reads_keys, reads_values: (queries, positions), whether the query reads the rounded key, or value.

    """

    keys: Tensor
    values: Tensor
    reads_keys: Tensor
    reads_values: Tensor

    def repeated(self, groups: int) -> Rounded:
        """Each head as often as there are query heads that read it."""
        keys, values = (part.repeat_interleave(groups, dim=1) for part in (self.keys, self.values))
        return replace(self, keys=keys, values=values)

    def in_scores(self, scores: Tensor, query: Tensor) -> Tensor:
        """`scores` of `query`, (batch, heads, queries, positions), with rounded keys where the query reads these."""
        return torch.where(self.reads_keys, query @ self.keys.mT, scores)

    def weighed(self, probabilities: Tensor, value: Tensor) -> Tensor:
        """Sum over positions of `probabilities`, (batch, heads, queries, positions), times what each query reads.

        Args:
            value: in full precision, (batch, heads, positions, head size).

        """
        exact = probabilities.masked_fill(self.reads_values, 0)
        return exact @ value + probabilities.masked_fill(~self.reads_values, 0) @ self.values


class KiviLayout:
    """Rounds keys and values in KIVI's groups.

    Args:
        rounding: rounds (..., values), with one dynamic range for each row.
        group_size: values that share a scale.
        residual: tokens in full precision, a multiple of `group_size`.

    """

    def __init__(self, rounding: ActivationQuantizer, group_size: int, residual: int) -> None:
        assert residual >= group_size and residual % group_size == 0
        self.group_size, self.residual = group_size, residual
        self._rounding = rounding

    def __call__(self, key: Tensor, value: Tensor, start: int, before: Tensor, lost: int = 0) -> Rounded:
        """The rounded cache of a layer, and which queries read what of it.

        Args:
            key, value: (batch, key-value heads, positions, head size), in full precision.
            start: the position from which on there is anything to round: a prefix and protected tokens stand before.
            before: (queries,), how many tokens that may be rounded came before each query, those included that are no
                longer in the cache; below 0 for protected tokens.
            lost: how many of these are no longer in the cache.

        Raises:
            ConfigError: a part of a group of keys is no longer in the cache, and with it the range of the group.

        """
        if lost % self.group_size:
            raise ConfigError(
                f"quantizer.kv_cache.layout=kivi cannot go on with a sliding window that has dropped {lost} tokens, "
                f"no multiple of quantizer.kv_cache.group_size={self.group_size}: use shorter texts, or "
                "quantizer.kv_cache.layout=token"
            )
        before, positions = before.clamp(min=0), torch.arange(key.shape[2], device=key.device)
        keys = torch.cat([key[:, :, :start], self.rounded_keys(key[:, :, start:])], dim=2)
        values = torch.cat([value[:, :, :start], self.rounded_values(value[:, :, start:])], dim=2)
        until_keys = before // self.residual * self.residual
        until_values = (before - self.residual).clamp(min=0)
        reads = [positions < (until + start - lost)[:, None] for until in (until_keys, until_values)]
        return Rounded(keys, values, *reads)

    def rounded_keys(self, keys: Tensor) -> Tensor:
        """Keys with a scale per channel and group of tokens: (..., tokens, head size), from a group's first token on.

        Those behind the last whole group stay as they are.
        """
        whole = keys.shape[-2] - keys.shape[-2] % self.group_size
        if whole == 0:
            return keys
        groups = keys[..., :whole, :].unflatten(-2, (-1, self.group_size))
        rounded = self._rounding(groups.mT.contiguous()).mT.flatten(-3, -2)
        return torch.cat([rounded, keys[..., whole:, :]], dim=-2)

    def rounded_values(self, values: Tensor) -> Tensor:
        """Values, (..., tokens, head size), with a scale per token and group of channels; the last may be smaller."""
        return torch.cat([self._rounding(part) for part in values.split(self.group_size, dim=-1)], dim=-1)
