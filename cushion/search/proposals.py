"""Which tokens a search step tries: the whole vocabulary, or a sample of a size the user sets."""

from __future__ import annotations

import torch
from torch import Tensor

from cushion.config import SearchConfig
from cushion.models import LanguageModel


def propose(lm: LanguageModel, config: SearchConfig, token_counts: Tensor, seed: int) -> list[int]:
    """The candidate token ids of a search, ascending and distinct.

    `exhaustive` is the whole vocabulary, as in Algorithm 1. `sampled` is `config.candidates` tokens: all special
    tokens, the `config.frequent` most frequent tokens of the search text, and a seeded draw of the others.

    Args:
        token_counts: occurrences of each token in the search text, shape (vocabulary,).

    """
    size = lm.vocabulary_size
    if config.proposal == "exhaustive" or config.candidates >= size:
        return list(range(size))
    special = [token for token in sorted(set(lm.tokenizer.all_special_ids)) if token < size]
    ranked = torch.argsort(token_counts, descending=True, stable=True)[: config.frequent]
    frequent = ranked[token_counts[ranked] > 0].tolist()
    chosen = list(dict.fromkeys(special + frequent))[: config.candidates]
    generator = torch.Generator().manual_seed(seed)
    known = set(chosen)
    others = (token for token in torch.randperm(size, generator=generator).tolist() if token not in known)
    while len(chosen) < config.candidates:
        chosen.append(next(others))
    return sorted(chosen)
