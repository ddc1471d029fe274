"""Methods that read the prefix off the token scales of the search text: QFeP, and PrefixQuant's rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from cushion.config import SearchConfig
from cushion.errors import ConfigError
from cushion.search.methods import SearchMethod, register

if TYPE_CHECKING:
    from cushion.models import LanguageModel

_FIND = "cushion.search.rule_prefix"


def _texts(search: SearchConfig, _: int) -> int:
    return search.texts


def _with_room_for(in_front: int) -> Callable[[SearchConfig, LanguageModel, int], None]:
    """The check that a text fits the model behind so many tokens."""

    def check(search: SearchConfig, lm: LanguageModel, _: int) -> None:
        positions = search.text_length + in_front
        if lm.context_length is not None and positions > lm.context_length:
            raise ConfigError(
                f"search.text_length={search.text_length} needs {positions} positions, but "
                f"{lm.label} has {lm.context_length}: shorten it"
            )

    return check


register(
    SearchMethod(
        name="qfep",
        title="QFeP prefix",
        find=f"{_FIND}:find_by_qfep",
        reads=("texts", "text_length", "contexts", "outlier_tokens"),
        texts=_texts,
        texts_by=("texts",),
        longest=lambda search, started: 3,
        needs_bos=True,
        leads_texts=True,
        behind_prefix=False,
        check_model=_with_room_for(1),  # BOS
    )
)
register(
    SearchMethod(
        name="prefixquant",
        title="PrefixQuant prefix",
        find=f"{_FIND}:find_by_prefixquant",
        reads=("texts", "text_length", "eta", "max_length"),
        texts=_texts,
        texts_by=("texts",),
        longest=lambda search, started: search.max_length,
        needs_bos=True,
        behind_prefix=False,
        check_model=_with_room_for(0),
    )
)
