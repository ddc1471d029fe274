"""What one search step does with its candidates: rounds of successive halving, verification, and a bounded sweep.

Which tokens a short text has decides whether it ranks at all: the range of a block's output, and with it L_q, is set by
the few positions of the text whose activations spike. A text cut to its first tokens may hold none of them. A round
with `text=spikes` therefore reads the spiking tokens themselves, each with the token before it, behind the first token.

The first token of a text spikes whatever it is, unless what stands in front takes that over. So from an empty prompt a
round with `text=first` can drop most candidates by that token alone; behind a prompt it would tell nothing, and keeps
all.

## Pruned and exact scoring

Both ours. `greedy_pruned` finds a step's token by successive halving (arXiv
[1502.07943](https://arxiv.org/abs/1502.07943)) over text length and depth: a round judges candidates by L_q over
fewer tokens and the first blocks alone, and keeps the best. What is left is judged by L_q itself. A round costs C
(tokens + 1) depth token-forwards.

A short text ranks candidates only if it holds the few positions that spike behind most candidates, and so set the
range. Four references, evenly spaced among the candidates, are judged by L_q first; the spike of a position is its
largest magnitude over the median of all positions, over blocks and references. A round with `text: spikes` reads the
first token and the largest spikes that fit, each with the token before it; `text: first`, from an empty prompt alone,
the first token. A step over 49,152 tokens costs 27,186 token-forwards from an empty prompt and 39,474 behind one.

How many candidates a round keeps was set on SmolLM2-135M: on five texts of 128 tokens the token that the step finds
ended the rounds at place 4,246 (12,288 are kept), 10 (1,024) and 1 (96) or better. Another model may need others:
`search.rounds`.

`greedy_exact` cannot miss the best candidate: it runs the rounds, takes the best verified objective as a bound, and
sweeps over all others. L_q is a sum over blocks of terms that are not negative, so a candidate leaves the batch where
its sum over the first blocks exceeds the bound. With further texts the bound is the K-th lowest objective, K
being `search.verify_candidates`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cushion.config import SearchConfig, SearchRound
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.search.objective import Objective

REFERENCES = 4
"""Candidates behind which the spiking positions are looked for."""


@dataclass(frozen=True)
class Stage:
    """One pass over a pool of candidates.

    Args:
        kind: `round` (a proxy), `verify` (the objective itself), `sweep` (the objective, with a bound, of all
            candidates that the rounds dropped) or `further` (the objective of the best ones on another text).
        depth: how many of the first decoder blocks are run.
        text: the token ids behind each candidate, shape (tokens,).
        keep: how many candidates go on from a round.
        skipped: whether this step has no use for the round, so that all go on.

    """

    kind: str
    depth: int
    text: Tensor
    keep: int = 0
    skipped: bool = False

    @property
    def judges(self) -> bool:
        """Whether candidates are judged by the objective on the step's own text."""
        return self.kind in ("verify", "sweep")


def rounds_of(config: SearchConfig) -> list[SearchRound]:
    """The rounds of a search: none when all candidates are judged by the objective itself."""
    return [] if config.scoring == "full" else config.rounds


def plan_stages(
    config: SearchConfig,
    blocks: int,
    prompt: int,
    candidates: int,
    text: Tensor,
    spikes: list[int],
    further: Sequence[Tensor] = (),
) -> list[Stage]:
    """The stages of a step, in order.

    Args:
        blocks: how many decoder blocks the model has.
        prompt: how many tokens stand in front of the candidates.
        candidates: how many there are; a round may keep a share of them.
        text: token ids of the step's text, shape (n,).
        spikes: positions of `text`, the one with the largest spike first.
        further: token ids of each text that the best candidates are judged on besides, shape (n,).

    """
    stages = []
    for item in rounds_of(config):
        short = spike_text(text, spikes, item.tokens) if item.text == "spikes" else text[: item.tokens]
        keep = int(item.keep) if item.keep >= 1 else max(1, round(item.keep * candidates))
        skipped = item.text == "first" and prompt > 0
        stages.append(Stage("round", max(1, round(item.depth * blocks)), short, keep, skipped))
    stages.append(Stage("verify", blocks, text))
    if config.scoring == "exact":
        stages.append(Stage("sweep", blocks, text))
    return stages + [Stage("further", blocks, other) for other in further]


def spike_text(text: Tensor, spikes: list[int], tokens: int) -> Tensor:
    """At most `tokens` tokens of `text` in their own order: its first one, and the largest spikes that fit.

    A spike comes with the token before it. The first token is the one that spikes behind a candidate that takes no
    outlier over.
    """
    kept = {0}
    for position in spikes:
        wanted = kept | {position, max(position - 1, 0)}
        if len(wanted) <= tokens:
            kept = wanted
    return text[sorted(kept)]


def reference_positions(candidates: int) -> list[int]:
    """Evenly spaced positions in a list of candidates."""
    count = min(REFERENCES, candidates)
    return [(2 * index + 1) * candidates // (2 * count) for index in range(count)]


def find_spikes(
    objective: Objective, lm: LanguageModel, prefix: Prefix, text: Tensor, references: list[int]
) -> tuple[list[int], Tensor]:
    """The positions of a text by the size of their spike, the largest first, and the scores of `spike_sizes`."""
    spikes, scores = spike_sizes(objective, lm, prefix, text, references)
    return torch.argsort(spikes, descending=True, stable=True).tolist(), scores


def spike_sizes(
    objective: Objective, lm: LanguageModel, prefix: Prefix, text: Tensor, references: list[int]
) -> tuple[Tensor, Tensor]:
    """How much each position of a text spikes behind some candidates.

    The spike of a position is the largest magnitude of its features over the median of all positions, in whichever
    block and behind whichever candidate that is largest.

    Args:
        references: token ids that take turns as the candidate.

    Returns:
        The spikes, shape (tokens,), and the whole objective of each reference, float64, both on the CPU.

    """
    spikes = torch.zeros(len(text))

    def observe(_block: int, following: Tensor) -> None:
        magnitudes = following.abs().amax(-1).float()
        ratios = magnitudes / magnitudes.median(1, keepdim=True).values.clamp(min=1e-12)
        torch.maximum(spikes, ratios.amax(0).nan_to_num(0.0).cpu(), out=spikes)

    scores = objective.judge(lm, prefix, rows_of(references, text), skip=1, observe=observe).scores
    return spikes, scores


def rows_of(candidates: list[int], text: Tensor) -> Tensor:
    """Each candidate in front of the text: token ids, shape (candidates, 1 + tokens)."""
    return torch.cat([torch.tensor(candidates)[:, None], text.expand(len(candidates), -1)], dim=1)
