"""Prefixes that nothing searched for: the user's tokens, BOS, a line break, or tokens drawn by a seed."""

from __future__ import annotations

from itertools import islice

import torch

from cushion.config import RunConfig
from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.search.methods import Found, SearchContext


def find(context: SearchContext) -> Found:
    """The prefix that consists of the start tokens."""
    tokens, lm = context.start_tokens, context.lm
    metadata = {**context.metadata, "text": lm.decode(tokens)}
    return Found({"token_ids": tokens, "seconds": 0.0}, Prefix.from_tokens(lm.model, tokens, metadata), None)


def named_tokens(lm: LanguageModel, config: RunConfig) -> list[int]:
    """The tokens that the user names, as text or as ids."""
    search = config.search
    ids = search.token_ids if search.token_ids is not None else lm.encode(search.tokens or "").tolist()
    lm.check_token_ids(ids, "search.token_ids")
    return ids


def bos_token(lm: LanguageModel, config: RunConfig) -> list[int]:
    """BOS alone.

    Raises:
        ConfigError: the model has none.

    """
    if lm.bos_token_id is None:
        raise ConfigError(f"search.method=bos, but {lm.label} has no BOS token: use search=newline")
    return [lm.bos_token_id]


def newline_tokens(lm: LanguageModel, config: RunConfig) -> list[int]:
    """A line break."""
    return line_break(lm)


def line_break(lm: LanguageModel) -> list[int]:
    """The tokens of a line break inside of a text: some tokenizers put a blank before the first token of one."""
    before, both = lm.encode("a").tolist(), lm.encode("a\n").tolist()
    if both[: len(before)] != before or both == before:  # it becomes one token with what is before it
        return lm.encode("\n").tolist()
    return both[len(before) :]


def drawn_tokens(lm: LanguageModel, config: RunConfig) -> list[int]:
    """`search.length` tokens drawn by the seed."""
    return random_tokens(lm, config.search.length, config.search_seed)


def random_tokens(lm: LanguageModel, length: int, seed: int) -> list[int]:
    """A seeded draw of `length` distinct tokens, special ones left out: the control for what a search finds."""
    special = set(lm.tokenizer.all_special_ids)
    generator = torch.Generator().manual_seed(seed)
    drawn = (t for t in torch.randperm(lm.vocabulary_size, generator=generator).tolist() if t not in special)
    tokens = list(islice(drawn, length))
    if len(tokens) < length:
        raise ConfigError(
            f"search.length={length} is more than the {len(tokens)} tokens of {lm.label} that are not special: lower it"
        )
    return tokens
