"""Activation sparsity of the feed-forward parts: how many neurons a token needs, block by block.

## Activation sparsity

With `eval.sparsity_texts`. A neuron i of a feed-forward part adds n_i = h_i W_down[:, i] to its output; it is
inactive for a token where ||n_i|| is at most eps, one eps for a block. Of the inactive ones together, CETT = ||sum
n_i over inactive i|| / ||sum n_i over all i|| (ReLU2 wins, arXiv 2402.03804). At a CETT, eps is the largest at which
the mean CETT over all tokens is no larger, and the activation ratio is the share of neurons above it; 1 minus it is
the sparsity. A CETT of 0 leaves out exact zeros alone, as ReLU makes them. CETT-PPL-p% (Sparsing Law, arXiv
2411.02335) takes one CETT for all blocks, the largest with which the perplexity of the same texts grows by at most p
percent when inactive neurons are left out of the running model, by 8 halvings.

All on the full-precision model, in float32, on the texts of the curves, without and behind each prefix; the tokens of
the prefix are not counted. As in the paper's code, eps comes from the dense pass, also where blocks before are
truncated. Here, "at most eps" replaces "below eps", so that 0 means zeros; eps is found among 1024 quantiles of the
norms in each block; a bias of the down projection belongs to no neuron; each expert is a feed-forward part of its own
for the tokens that it gets, and a block's experts share an eps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cushion.activations import observe_inputs, observe_outputs
from cushion.artifacts import Workspace, read_json, write_json
from cushion.config import EvalConfig
from cushion.errors import ConfigError
from cushion.evaluation.perplexity import block_losses
from cushion.hashing import tensor_digest
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.step import Context, Step

SPARSITY_TOKENS = 512
"""Tokens of a text at most: what all tokens of all texts give their neurons is held at once, for a block at a time."""

CANDIDATES = 1024
"""Values of eps that are tried: quantiles of the norms above 0, so that the ratio is found to one part in as many."""

SAMPLE = 2**20
"""Norms of which the quantiles are taken, at even distances."""

BISECTIONS = 8
"""Halvings of [0, 1] in the search for the CETT of a perplexity."""


@dataclass(frozen=True)
class Level:
    """The activation ratio of every block at one CETT.

    Args:
        cett: the largest mean CETT of a block that was allowed.
        ratios: by block, the share of active neurons, 0 to 1, over all tokens.
        thresholds: by block, eps.

    """

    cett: float
    ratios: list[float]
    thresholds: list[float]


@dataclass(frozen=True)
class Sparsity:
    """What was found behind one prefix.

    Args:
        levels: one for each CETT asked for.
        within_perplexity: the level of the perplexity asked for (CETT-PPL-p%), or None.
        perplexity_ratio: the perplexity there, over that of the dense model; at most 1 + p / 100. None without a level.

    """

    levels: list[Level]
    within_perplexity: Level | None = None
    perplexity_ratio: float | None = None


def feed_forward(lm: LanguageModel) -> dict[str, list[str]]:
    """By number of the block, the full names of its down projections: one, or one for each of its experts.

    Raises:
        ConfigError: a block has none that the architecture table names.

    """
    found: dict[str, list[str]] = {name: [] for name in lm.named_blocks}
    for names in lm.down_projections().values():
        for name in names:
            found[name.removeprefix(f"{lm.architecture.blocks}.").partition(".")[0]].append(name)
    without = [block for block, names in found.items() if not names]
    if without:
        raise ConfigError(
            f"eval.sparsity_texts: the architecture table names no down projection in block {without[0]} of "
            f"{lm.label}, whose neurons could be counted: set eval.sparsity_texts=0, or name one in its entry"
        )
    return found


class _Neurons:
    """What the neurons of one block give to its output, for all tokens.

    Args:
        parts: h, (tokens, neurons), and W_down, (features, neurons), of the feed-forward part or of each expert.

    """

    def __init__(self, parts: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._parts = [(values.flatten(0, -2).float(), weight.float()) for values, weight in parts]
        self._norms = [values.abs() * _columns(weight) for values, weight in self._parts]
        self._whole = [(values @ weight.T).norm(dim=-1) for values, weight in self._parts]
        self._known: dict[int, float] = {}
        self._candidates = self._quantiles()

    def _quantiles(self) -> Tensor:
        """The values of eps that are tried, ascending, from 0 on."""
        norms = torch.cat([norms.flatten() for norms in self._norms])
        norms = norms[:: math.ceil(len(norms) / SAMPLE)]
        norms = norms[norms > 0].sort().values
        places = torch.linspace(0, len(norms) - 1, min(CANDIDATES, len(norms)), device=norms.device).round().long()
        return torch.cat([norms.new_zeros(1), norms[places].unique()])

    def error(self, candidate: int) -> float:
        """The mean CETT over tokens; of a token whose neurons give nothing it is 0."""
        if candidate not in self._known:
            errors = []
            for (values, weight), norms, whole in zip(self._parts, self._norms, self._whole, strict=True):
                lost = (values.masked_fill(norms > self._candidates[candidate], 0) @ weight.T).norm(dim=-1)
                errors.append(torch.where(lost == 0, 0, lost / whole))
            self._known[candidate] = float(torch.cat(errors).mean())
        return self._known[candidate]

    def at(self, cett: float) -> tuple[float, float]:
        """The activation ratio at a CETT, and eps. Halving the same candidates, neither falls as the CETT falls."""
        low, high = 0, len(self._candidates)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.error(middle) <= cett else (low, middle)
        eps = self._candidates[low]
        active = sum(int((norms > eps).sum()) for norms in self._norms)
        return active / sum(norms.numel() for norms in self._norms), float(eps)


def _columns(weight: Tensor) -> Tensor:
    """The norm of what each neuron writes, float32, (neurons,)."""
    return weight.float().norm(dim=0)


@torch.no_grad()
def activation_ratios(lm: LanguageModel, prefix: Prefix, texts: Tensor, targets: Sequence[float]) -> list[Level]:
    """The activation ratio of every block at each of several CETTs, in one pass of the model as it stands.

    The neurons of the prefix are not among those counted. Where a block has experts, each is a feed-forward part of its
    own for the tokens that are sent to it, and all share the block's eps.

    Args:
        texts: token ids, (texts, tokens), at most `SPARSITY_TOKENS` of each are used, all in one batch.
        targets: values of the mean CETT, 0 or more and below 1.

    """
    texts = texts[:, :SPARSITY_TOKENS]
    blocks = feed_forward(lm)
    linears = {name: lm.model.get_submodule(name) for names in blocks.values() for name in names}
    seen: dict[str, list[Tensor]] = {}
    found: dict[str, list[tuple[float, float]]] = {}

    def keep(name: str, values: Tensor) -> None:
        seen.setdefault(name, []).append(values)

    def finish(block: str, _output: Tensor) -> None:
        parts = [(values, _weight(linears[name])) for name in blocks[block] for values in seen.pop(name, [])]
        neurons = _Neurons(parts)
        found[block] = [neurons.at(cett) for cett in targets]

    with observe_inputs(linears, keep), observe_outputs(lm.named_blocks, finish):
        lm.body(texts, past_key_values=prefix.cache(lm.model, len(texts)), use_cache=True)
    return [
        Level(cett, [found[block][index][0] for block in blocks], [found[block][index][1] for block in blocks])
        for index, cett in enumerate(targets)
    ]


def _weight(linear: nn.Module) -> Tensor:
    assert isinstance(linear, nn.Linear)
    return linear.weight


@contextmanager
def truncated(lm: LanguageModel, thresholds: Sequence[float]) -> Iterator[None]:
    """Run the model without its inactive neurons, while the block runs.

    Args:
        thresholds: eps, by block.

    """
    with ExitStack() as hooks:
        for names, eps in zip(feed_forward(lm).values(), thresholds, strict=True):
            for name in names:
                linear = lm.model.get_submodule(name)
                handle = linear.register_forward_pre_hook(_truncating(_columns(_weight(linear)), eps))
                hooks.callback(handle.remove)
        yield


def _truncating(columns: Tensor, eps: float) -> Any:
    def hook(_linear: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        values: Tensor = args[0]
        return (values.masked_fill(values.float().abs() * columns <= eps, 0), *args[1:])

    return hook


def within_perplexity(
    lm: LanguageModel, prefix: Prefix, texts: Tensor, percent: float, bos: bool = False
) -> Iterator[tuple[Level, float]]:
    """Bisection for the largest CETT at which the perplexity on the same texts is at most `percent` % larger.

    Args:
        texts: as in `activation_ratios`.
        percent: above 0.
        bos: whether the texts begin with BOS.

    Yields:
        After each of the `BISECTIONS` halvings, the largest level so far that is within, and its perplexity over that
        of the dense model. The first level has a CETT of 0: neurons that give exactly nothing.

    """
    texts = texts[:, :SPARSITY_TOKENS]
    dense = _mean_loss(lm, prefix, texts, bos)
    (best,), ratio = activation_ratios(lm, prefix, texts, [0.0]), 1.0
    low, high = 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        (level,) = activation_ratios(lm, prefix, texts, [middle])
        with truncated(lm, level.thresholds):
            more = _mean_loss(lm, prefix, texts, bos) - dense
        if more <= math.log1p(percent / 100):
            low, best, ratio = middle, level, math.exp(more)
        else:
            high = middle
        yield best, ratio


def _mean_loss(lm: LanguageModel, prefix: Prefix, texts: Tensor, bos: bool) -> float:
    losses = list(block_losses(lm, prefix, texts, EvalConfig(batch_size=1), bos=bos))
    return sum(batch.loss for batch in losses) / sum(batch.tokens for batch in losses)


@dataclass(frozen=True, eq=False)
class SparsityStep(Step[Sparsity]):
    """Activation sparsity behind a prefix, on the full-precision model.

    Args:
        behind: the prefix.
        texts: token ids, (texts, tokens).
        cett: values of the mean CETT at which the ratio is taken.
        percent: by how many percent the perplexity may grow for CETT-PPL-p%; None: it is not searched for.
        bos: whether the texts begin with BOS.
        title: how progress calls the prefix.

    """

    name = "sparsity"
    """Files: `sparsity.json`, with `eval.sparsity_texts`
    Key: `prefix`, `texts`, `cett`, `percent`, `bos`
    Of that: the part of the texts that is run; whether they begin with BOS, where a perplexity is asked for
    """
    behind: Prefix
    texts: Tensor
    cett: tuple[float, ...]
    percent: float | None
    bos: bool
    title: str

    def key(self, context: Context) -> dict[str, Any]:
        """Prefix, texts, CETTs and the perplexity, for which alone it counts whether the texts begin with BOS."""
        return {
            "prefix": self.behind.fingerprint,
            "texts": tensor_digest([self.texts[:, :SPARSITY_TOKENS]]),
            "cett": list(self.cett),
            "percent": self.percent,
            "bos": self.bos if self.percent is not None else None,
        }

    def make(self, context: Context, workspace: Workspace) -> None:
        """One pass, and the bisection where it is asked for."""
        stage, passes = f"sparsity, {self.title}", 1 + (BISECTIONS if self.percent is not None else 0)
        context.progress(stage, 0, passes, "pass")
        found = Sparsity(activation_ratios(context.lm, self.behind, self.texts, self.cett))
        context.progress(stage, 1, passes, "pass")
        if self.percent is not None:
            search = within_perplexity(context.lm, self.behind, self.texts, self.percent, self.bos)
            for done, (level, ratio) in enumerate(search, start=2):
                found = Sparsity(found.levels, level, ratio)
                context.progress(stage, done, passes, "pass")
        write_json(workspace.folder / "sparsity.json", asdict(found))

    def read(self, context: Context, folder: Path) -> Sparsity:
        """The ratios."""
        record = read_json(folder / "sparsity.json")
        level = record["within_perplexity"]
        return Sparsity(
            [Level(**one) for one in record["levels"]],
            None if level is None else Level(**level),
            record["perplexity_ratio"],
        )
