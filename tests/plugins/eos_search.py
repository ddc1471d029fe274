"""A search method in one file: the EOS token alone, as a control."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cushion.errors import ConfigError
from cushion.search.methods import Found, SearchContext, SearchMethod, register

if TYPE_CHECKING:
    from cushion.config import RunConfig
    from cushion.models import LanguageModel


def start_tokens(lm: LanguageModel, config: RunConfig) -> list[int]:
    """What the prefix consists of."""
    eos = lm.tokenizer.eos_token_id
    if eos is None:
        raise ConfigError(f"search.method=eos, but {lm.label} has no EOS token: use search=newline")
    return [eos]


def find(context: SearchContext) -> Found:
    """The prefix, and what `search` of result.json says of it."""
    from cushion.prefix import Prefix  # imports torch: only here

    tokens, lm = context.start_tokens, context.lm
    prefix = Prefix.from_tokens(lm.model, tokens, {**context.metadata, "text": lm.decode(tokens)})
    return Found({"token_ids": tokens}, prefix, seconds=None)


register(
    SearchMethod(
        name="eos",
        title="EOS prefix",
        find=f"{__name__}:find",
        start=f"{__name__}:start_tokens",
    )
)
