"""What a search method is: a light declaration, named by `search.method`, of a way to find a prefix.

Cushion's own are in `cushion/search/built_in`. Everything that has to know of a method (the checks of the
configuration, the warnings about options without effect, the preparation, the run, the reports) asks its declaration.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from cushion.config import RunConfig, SearchConfig
from cushion.errors import ConfigError
from cushion.registry import SEARCH_METHODS, Registry, located

if TYPE_CHECKING:  # a configuration is checked without importing torch
    from torch import Tensor

    from cushion.models import LanguageModel
    from cushion.prefix import Prefix
    from cushion.step import Context


@dataclass(frozen=True)
class SearchContext:
    """What a method finds its prefix with.

    Args:
        start_tokens: what the prefix starts with, or consists of.
        metadata: kept with the prefix.
        texts: token ids, (texts, tokens), as many as the method asks for, with BOS in front where the run has it; None
            for a method that reads none.
        count_tokens: how often each token occurs in the search text, (vocabulary,).
        cached: what `cushion.step.compute` needs for a method whose work is a cached step.

    """

    config: RunConfig
    lm: LanguageModel
    start_tokens: list[int]
    metadata: dict[str, Any]
    texts: Tensor | None
    count_tokens: Callable[[], Tensor]
    cached: Context


@dataclass(frozen=True)
class Found:
    """What came out of a method.

    Args:
        record: what `search` of result.json holds beside the method's name.
        prefix: None where there is none: the run goes on without one.
        seconds: what the search took; None where nothing was searched for.
        warnings: what the user should know.

    """

    record: dict[str, Any]
    prefix: Prefix | None
    seconds: float | None
    warnings: tuple[str, ...] = ()


def _accept(*_: Any) -> None:
    """Refuse nothing."""


def _as_started(_: SearchConfig, started: int) -> int:
    return started


def _none_idle(_: SearchConfig) -> list[str]:
    return []


@dataclass(frozen=True, kw_only=True)
class SearchMethod:
    """The declaration of a method. What it names as `module:attribute` is imported when it is used.

    Args:
        name: the value of `search.method`.
        title: how its prefix is called in tables.
        find: `module:attribute` of the function from a `SearchContext` to `Found`; None for a run without a prefix.
        start: `module:attribute` of the function from the model and the configuration to the tokens that the prefix
            starts with, or consists of; None for none.
        reads: the keys of `search` that have an effect with it, beside those that always have.
        texts: how many texts of `search.text_length` tokens it reads, by the number of start tokens; None for no text.
        texts_by: the keys of `search` that decide how many, for the error where the text does not hold them.
        places: which ones these are, places in the seeded order of all texts, from 0 on, by the number of start tokens;
            None for the first ones.
        longest: the length of the longest prefix that it may give, by the number of start tokens.
        needs_bos: whether it puts a BOS token into the prefix by itself.
        leads_texts: whether it puts BOS before its texts by itself: it gets them without, whatever the key `bos` says.
        behind_prefix: whether its texts are run behind the prefix as far as it is found, and need room for the longest.
        check: raises `ConfigError` on values that cannot work.
        check_model: raises `ConfigError` where the model cannot do what is asked for, by the number of start tokens.
        check_texts: raises `ConfigError` where the texts that were drawn are too many.
        idle: warnings about keys that it reads, but that have no effect beside others.

    """

    name: str
    title: str
    find: str | None
    start: str | None = None
    reads: tuple[str, ...] = ()
    texts: Callable[[SearchConfig, int], int] | None = None
    texts_by: tuple[str, ...] = ()
    places: Callable[[SearchConfig, int], list[int]] | None = None
    longest: Callable[[SearchConfig, int], int] = _as_started
    needs_bos: bool = False
    leads_texts: bool = False
    behind_prefix: bool = True
    check: Callable[[SearchConfig], None] = _accept
    check_model: Callable[[SearchConfig, LanguageModel, int], None] = _accept
    check_texts: Callable[[SearchConfig, Tensor], None] = _accept
    idle: Callable[[SearchConfig], list[str]] = _none_idle

    def __post_init__(self) -> None:
        unknown = {*self.reads, *self.texts_by} - {field.name for field in dataclasses.fields(SearchConfig)}
        if unknown:
            keys = ", ".join(f"search.{key}" for key in sorted(unknown))
            raise ConfigError(f"search.method={self.name} is declared to read {keys}, which there is not")

    def start_tokens(self, lm: LanguageModel, config: RunConfig) -> list[int]:
        """What the prefix starts with, or consists of.

        Raises:
            ConfigError: the model lacks a token that is asked for.

        """
        if self.needs_bos and lm.bos_token_id is None:
            raise ConfigError(
                f"search.method={self.name} puts a BOS token into the prefix, and {lm.label} has neither BOS nor EOS: "
                "use search=greedy_sampled"
            )
        return [] if self.start is None else cast(list[int], located(self.start)(lm, config))

    def run(self, context: SearchContext) -> Found | None:
        """Find the prefix; None where this is the method of a run without one."""
        return None if self.find is None else cast(Found, located(self.find)(context))


METHODS: Registry[SearchMethod] = SEARCH_METHODS


def register(method: SearchMethod) -> SearchMethod:
    """Make a method known under its name.

    Raises:
        ConfigError: there is one of this name.

    """
    return METHODS.register(method.name, method)
