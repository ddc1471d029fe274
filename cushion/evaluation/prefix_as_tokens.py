"""The prefix as a server without a cache for it has it: tokens before the text, which the quantized linears read too.

## The prefix as tokens

A server that has no cache of keys and values for a prefix puts its tokens before the text, so that they run through
the quantized linears too. Static ranges that were calibrated behind the prefix leave them out: a token that takes the
outliers of a text upon itself is clipped where it does so, and the model is worse than without a prefix. The linears
that are the reason are few. One pass of the prefix's tokens alone, inputs in full precision and weights quantized,
gives for each linear with a static range

    r = 1 + (how far the farthest value lies outside the range) / (the end of the range that is farther from 0)

and linears with r above 2 keep their input in full precision (W8A16), with all linears that read the output of the
same norm. It is QFeM's measure, decided by the prefix. `eval.prefix_as_tokens` measures the perplexity of the rows
so, over the same tokens as ever, and `cushion-export --to tokens`
([export.md](export.md#tokens-the-prefix-for-servers)) writes it. SmolLM2-135M, prefix `" "`, perplexity over 4 blocks
of 256 tokens, calibrated on 8 texts of 256 tokens:

| `quantizer` | keys and values in full precision, the row | as tokens | linears kept, of 210 |
|---|---|---|---|
| `int8_static` (67.90 without a prefix) | 33.39 | 32.90; 107.20 with none kept | 8 |
| `fp8_static` | 28.08 | 27.57 | 8 |
| `int8_token` | 27.99 | 28.71 | 0 |
| `per_tensor_dynamic` | 32.74 | 61.35: not exported | 0 |
| `w4a8_gptq_static` | 32.87 | 189.79: not exported | 5 |

With a range per token nothing needs to be kept. A dynamic range per tensor spans prefix and text together, and there
is no static range to go beyond: keeping linears does not help. Neither does it with GPTQ's weights of 4 bits, where
179.1 are left with all 210 inputs in full precision: these weights were fitted to texts alone, and the prefix's own
keys and values come out wrong by them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cushion.activations import observe_inputs
from cushion.artifacts import Workspace, read_json, write_json
from cushion.config import EvalConfig
from cushion.evaluation.perplexity import BlockLoss, block_losses
from cushion.evaluation.perplexity_step import MeasuredPerplexity, PerplexityStep
from cushion.execution.registry import SIMULATED
from cushion.metrics.columns import RowContext, Values
from cushion.metrics.prefix_as_tokens import values_of
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.lazily import QuantizedLazily
from cushion.quantization.linear import ActivationQuantizer, QuantizedLinear
from cushion.step import Context, Step, compute

BEYOND = 2.0
"""A linear keeps its input where a value of the prefix's tokens is more than so many times the end of its range."""


@dataclass(frozen=True, eq=False)
class AsTokens:
    """What became of a row whose prefix is tokens.

    Args:
        keep: by linear that keeps its input in full precision, in the model's order, how far the prefix's tokens go:
            `beyond_range`. Those that QFeM keeps anyway are not among them.
        perplexity: by corpus.

    """

    keep: dict[str, float]
    perplexity: dict[str, MeasuredPerplexity]


def measure_as_tokens(
    context: Context, model: QuantizedLazily, config: EvalConfig, blocks: Mapping[str, Tensor], bos: bool
) -> AsTokens:
    """Choose the linears that keep their input, and measure the perplexity of every corpus.

    The same tokens are predicted as in the row, whose prefix predicts none.

    Args:
        context: with the model.
        model: with a prefix that was not tuned, and a quantizer; it is not on the model at the moment.
        config: as for the row.
        blocks: as for the row: by corpus, (blocks, block length), or one more with BOS in front.
        bos: whether they begin with BOS.

    """
    assert len(model.behind) > 0 and not model.behind.tuned and model.quantizer is not None
    beyond = compute(BeyondRangeStep(model), context)
    keep = chosen(model.lm, beyond)
    found = {}
    with _variant(model, model.keep | keep.keys(), model.execution) as served:
        for corpus, text in blocks.items():
            stage = f"perplexity, {corpus}, prefix as tokens"
            step = TokensPerplexityStep(served, config, text, stage, bos, model.behind.token_ids)
            found[corpus] = compute(step, context)
    return AsTokens(keep, found)


def chosen(lm: LanguageModel, beyond: Mapping[str, float]) -> dict[str, float]:
    """Of the linears in `beyond` those above `BEYOND`, with all that read the same norm: kernels run these as one."""
    names = {name for name, ratio in beyond.items() if ratio > BEYOND}
    for index in range(len(lm.blocks)):
        for _, readers in lm.norm_readers(index):
            if names & readers.keys():
                names |= readers.keys() & beyond.keys()
    return {name: ratio for name, ratio in beyond.items() if name in names}


def _variant(model: QuantizedLazily, keep: frozenset[str], execution: str) -> QuantizedLazily:
    """The model of a row without its prefix, its quantizer fitted as it was, with other linears kept."""
    return QuantizedLazily(model.lm, Prefix.empty(), model.quantizer, model.calibration, keep, execution, model.learned)


@torch.no_grad()
def beyond_ranges(model: QuantizedLazily) -> dict[str, float]:
    """By linear with a static range of its input: how far the prefix's own tokens go beyond it, in one pass.

    All inputs are in full precision in this pass, the weights are quantized. A linear that reads none of the tokens, an
    expert, is left out.
    """
    lm, inputs = model.lm, dict[str, Tensor]()
    assert model.quantizer is not None
    linears = lm.linears(model.quantizer.targets)
    with _variant(model, frozenset(linears), SIMULATED) as free:
        free.put_on()
        placed = {name: lm.model.get_submodule(name) for name in linears}
        with observe_inputs(placed, lambda name, values: inputs.update({name: values.clone()})):
            lm.body(torch.tensor([model.behind.token_ids]))
    found = {}
    with _variant(model, model.keep, SIMULATED) as own:
        own.put_on()
        for name in linears:
            module = lm.model.get_submodule(name)
            if name in inputs and isinstance(module, QuantizedLinear) and module.activation is not None:
                found[name] = beyond_range(module.activation, inputs[name])
    return found


def beyond_range(quantizer: ActivationQuantizer, values: Tensor) -> float:
    """How far `values`, any shape, go beyond a static range: 1 where none does, or where there is no such range.

    In units of the end of the range that is farther from 0: with a symmetric range, 3 is three times its end. Of
    channels with ranges of their own, that which goes farthest.
    """
    if quantizer.parameters is None:
        return 1.0
    scale, offset = quantizer.parameters
    low, high = (scale * bound + offset for bound in quantizer.grid.bounds)
    outside = torch.maximum(values.float() - high, low - values.float()).clamp(min=0)
    return float(1 + (outside / torch.maximum(low.abs(), high.abs())).amax())


@dataclass(frozen=True, eq=False)
class BeyondRangeStep(Step[dict[str, float]]):
    """`beyond_ranges` of a row.

    Args:
        model: with its prefix and quantizer.

    """

    name = "beyond_range"
    """Files: `beyond_range.json`, with `eval.prefix_as_tokens` and for `cushion-export --to tokens`
    Key: `prefix`, `quantizer`
    """
    model: QuantizedLazily

    def key(self, context: Context) -> dict[str, Any]:
        """Prefix and quantizer."""
        return self.model.identity()

    def make(self, context: Context, workspace: Workspace) -> None:
        """One pass."""
        write_json(workspace.folder / "beyond_range.json", beyond_ranges(self.model))

    def read(self, context: Context, folder: Path) -> dict[str, float]:
        """By linear, in the model's order."""
        found: dict[str, float] = read_json(folder / "beyond_range.json")
        return found


@dataclass(frozen=True, eq=False)
class TokensPerplexityStep(PerplexityStep):
    """Perplexity with tokens in front of every block, in the same pass.

    Args:
        tokens: their ids.

    """

    name = "perplexity_as_tokens"
    """Files: `perplexity.json`, with `eval.prefix_as_tokens`
    Key: `prefix`, `quantizer`, `config.batch_size`, `config.predict_first`, `bos`, `blocks`, `tokens`
    Of that: the empty prefix; the linears that are kept are in `quantizer`; the token ids in front of each block
    """
    tokens: tuple[int, ...] = ()

    def key(self, context: Context) -> dict[str, Any]:
        """That of a perplexity, and the tokens."""
        return {**super().key(context), "tokens": list(self.tokens)}

    def losses(self, context: Context, start: int) -> Iterator[BlockLoss]:
        """The loss of each batch of blocks from number `start` on, over what is predicted without the tokens too."""
        front = torch.tensor([self.tokens]).expand(len(self.blocks), -1).to(self.blocks)
        blocks = torch.cat([front, self.blocks], dim=1)
        none, count = Prefix.empty(), len(self.tokens)
        return block_losses(context.lm, none, blocks, self.config, start, self.bos, count)


def measure(row: RowContext) -> Values:
    """The values of a row whose prefix could be tokens, where `eval.prefix_as_tokens` asks for them."""
    model = row.model
    if not row.config.prefix_as_tokens or model.quantizer is None or model.behind.tuned or not len(model.behind):
        return {}
    model.take_off()
    found = measure_as_tokens(row.cached, model, row.config, row.blocks, row.bos)
    return values_of({corpus: one.value for corpus, one in found.perplexity.items()}, len(found.keep))
