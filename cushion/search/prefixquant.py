"""PrefixQuant's rule for the prefix: the tokens with outliers at the down projections (arXiv 2410.05265, section 4).

## PrefixQuant's rule

ArXiv [2410.05265](https://arxiv.org/abs/2410.05265). Over `search.texts` texts, a token is an outlier of a down
projection (the last linear of a block's feed-forward part) where its scale exceeds `search.eta` times the median of
its text.

    length = ceil( max over down projections of the mean number of outlier tokens in a text )
    prefix = the length - 1 most frequent outlier tokens, then BOS

- The initial token of a text counts towards the length and not towards the frequencies: BOS stands in the prefix for
  it. Where initial tokens are the only outliers, the prefix is BOS alone; where there are none at all, there is no
  prefix.
- Where one token is the only one of its kind, and an outlier in less than a tenth of the texts, it is left out, as in
  the authors' code.
- The scales are those of the model as it is. The authors' code rotates first, the inputs of the down projections too,
  so that it sees an outlier token spread over all channels.
- **Open** in the paper, and ours: texts begin with BOS as the key `bos` says; with experts, a token's scale is the
  largest at the down projections of its experts; frequencies are counted over all down projections together, ties go
  to the smaller token id.
- A length beyond `search.max_length` is cut to it, with a warning.

The rest of PrefixQuant is not part of the rule: its rotations are `quantizer=prefixquant`, its search of
ranges is [`block_output`](method.md#ranges-by-block-output), its fine-tuning
[reconstruction](method.md#reconstruction).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cushion.config import SearchConfig
from cushion.errors import UnsupportedModelError
from cushion.models import LanguageModel
from cushion.search.rule_step import RuleSearch
from cushion.search.scan import Scanned, scan_texts
from cushion.step import Context

LEAST_SHARE = 10
"""A token that is the only candidate must be found in at least the so-manieth part of the texts."""

REPORTED_TOKENS = 10
"""Outlier tokens that are kept in the record."""


@dataclass(frozen=True)
class OutlierToken:
    """How often a token is an outlier, over all texts and down projections, position 0 left out."""

    token_id: int
    token: str
    count: int


@dataclass(frozen=True)
class PrefixQuantRecord:
    """What the rule found; `token_ids` is empty where no token is an outlier.

    `mean_counts` is, per down projection, the mean number of outlier tokens in a text, the initial one included;
    `module` is where it is largest, `initial_share` the part of the texts whose initial token is an outlier there, and
    `length` the ceiling of that mean: the length that the rule asks for. `token_ids` is shorter where there are not as
    many different outlier tokens, or where `search.max_length` cuts it.

    | field | content |
    |---|---|
    | `method` | `prefixquant` |
    | `token_ids` | the prefix, BOS last; empty where no token is an outlier |
    | `length` | the length that the rule asks for, `search.max_length` aside |
    | `module` | the down projection with the largest mean number of outlier tokens |
    | `initial_share` | the part of the texts whose initial token is an outlier there |
    | `mean_counts` | mean number of outlier tokens in a text, by down projection |
    | `tokens` | the ten most frequent outlier tokens outside of position 0: `token_id`, `token`, `count` over all texts and down projections |
    | `token_forwards`, `seconds` | |
    """  # noqa: E501

    token_ids: list[int]
    length: int
    module: str
    initial_share: float
    mean_counts: dict[str, float]
    tokens: list[OutlierToken]
    token_forwards: int
    seconds: float


def down_projections(lm: LanguageModel) -> dict[str, list[str]]:
    """`LanguageModel.down_projections`, of which there must be some.

    Raises:
        UnsupportedModelError: the table names none for this architecture, or the model has none of that name.

    """
    found = lm.down_projections()
    if not found:
        raise UnsupportedModelError(
            f"search.method=prefixquant reads the down projections, and the architecture table has none for {lm.label} "
            f"({lm.architecture.model_type}): use search=qfep or search=greedy_sampled"
        )
    return found


def prefixquant_rule(lm: LanguageModel, config: SearchConfig, texts: Tensor) -> Iterator[Scanned | PrefixQuantRecord]:
    """Find the prefix by PrefixQuant's rule.

    Args:
        config: `eta`, and `max_length`, the largest length of the prefix.
        texts: token ids, (texts, tokens), run as they are.

    Yields:
        `Scanned` after every text, and the `PrefixQuantRecord` at the end.

    Raises:
        NotFiniteError: an activation is not finite.
        UnsupportedModelError: the down projections, or the tokens that they read, are not known.

    """
    started = time.perf_counter()
    assert lm.bos_token_id is not None, "checked by preparation"
    layers, scales = down_projections(lm), dict[str, Tensor]()
    yield from scan_texts(lm, [name for names in layers.values() for name in names], texts, scales)
    totals: dict[str, int] = {}
    initial: dict[str, int] = {}
    frequency: Counter[int] = Counter()
    found_in = torch.zeros(len(texts), dtype=torch.bool)
    for name, names in layers.items():
        of_layer = torch.stack([scales[each].nan_to_num(nan=0.0) for each in names]).amax(0)
        outliers = outlier_tokens(of_layer, config.eta)
        totals[name], initial[name] = int(outliers.sum()), int(outliers[:, 0].sum())
        frequency.update(texts[:, 1:].cpu()[outliers[:, 1:]].tolist())
        found_in |= outliers[:, 1:].any(1)
    module = max(totals, key=totals.__getitem__)
    length = -(-totals[module] // len(texts))
    ranked = sorted(frequency.items(), key=lambda item: (-item[1], item[0]))
    others = max(0, min(length, config.max_length) - 1)
    if len(ranked) == 1 and int(found_in.sum()) * LEAST_SHARE < len(texts):
        others = 0
    yield PrefixQuantRecord(
        token_ids=[*(token for token, _ in ranked[:others]), lm.bos_token_id] if length else [],
        length=length,
        module=module,
        initial_share=initial[module] / len(texts),
        mean_counts={name: total / len(texts) for name, total in totals.items()},
        tokens=[OutlierToken(token, lm.decode([token]), count) for token, count in ranked[:REPORTED_TOKENS]],
        token_forwards=texts.numel(),
        seconds=time.perf_counter() - started,
    )


def outlier_tokens(scales: Tensor, eta: float) -> Tensor:
    """Which tokens exceed `eta` times the median scale of their text: `scales` and the result are (texts, tokens)."""
    return scales > eta * scales.median(dim=1, keepdim=True).values


class PrefixQuantSearch(RuleSearch):
    """PrefixQuant's rule as a cached step."""

    name = "prefixquant"
    """Files: `search.json`, and `prefix.*` where a prefix was found
    Key: `config.eta`, `config.max_length`, `texts`
    Of that: the keys of `search` that have an effect
    """
    record = PrefixQuantRecord
    reads = ("eta", "max_length")

    def find(self, context: Context) -> Iterator[Scanned | PrefixQuantRecord]:
        """The one pass of the rule."""
        return prefixquant_rule(context.lm, self.config, self.texts)
