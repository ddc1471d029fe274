"""Methods that search for nothing: no prefix, the user's tokens, and the controls that every table needs."""

from __future__ import annotations

from cushion.config import SearchConfig, require
from cushion.search.methods import SearchMethod, register

_GIVEN = "cushion.search.given"
_FIND = f"{_GIVEN}:find"


def _check_tokens(search: SearchConfig) -> None:
    reason = "search.method=tokens needs search.tokens or search.token_ids, and only one of them"
    require((search.tokens is None) != (search.token_ids is None), "search.tokens", search.tokens, reason)
    require(search.token_ids != [] and search.tokens != "", "search.tokens", search.tokens, "the prefix is empty")
    for token in search.token_ids or []:
        require(token >= 0, "search.token_ids", search.token_ids, "token ids are not negative")


register(SearchMethod(name="none", title="no prefix", find=None))
register(
    SearchMethod(
        name="tokens",
        title="given prefix",
        find=_FIND,
        start=f"{_GIVEN}:named_tokens",
        reads=("tokens", "token_ids"),
        check=_check_tokens,
    )
)
register(SearchMethod(name="bos", title="bos prefix", find=_FIND, start=f"{_GIVEN}:bos_token"))
register(SearchMethod(name="newline", title="newline prefix", find=_FIND, start=f"{_GIVEN}:newline_tokens"))
register(
    SearchMethod(
        name="random",
        title="random prefix",
        find=_FIND,
        start=f"{_GIVEN}:drawn_tokens",
        reads=("length", "seed"),
    )
)
