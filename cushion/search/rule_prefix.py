"""The prefixes of QFeP and of PrefixQuant's rule, and what a run records of them."""

from __future__ import annotations

from dataclasses import replace

from cushion.search.methods import Found, SearchContext
from cushion.search.prefixquant import PrefixQuantSearch
from cushion.search.qfep import QfepSearch
from cushion.search.rule_step import RuleSearch
from cushion.step import compute


def find_by_qfep(context: SearchContext) -> Found:
    """The prefix of QFeP; none where it finds no outlier token."""
    return _found(context, QfepSearch)


def find_by_prefixquant(context: SearchContext) -> Found:
    """The prefix of PrefixQuant's rule; none where it finds no outlier token."""
    found = _found(context, PrefixQuantSearch)
    asked, given = found.record["length"], 0 if found.prefix is None else len(found.prefix)
    if given == 0 or given >= asked:
        return found
    warning = (
        f"PrefixQuant's rule asks for a prefix of {asked} tokens, and this one has {given}: it "
        f"is cut to search.max_length={context.config.search.max_length}, or there are not as many different outlier "
        "tokens"
    )
    return replace(found, warnings=(warning,))


def _found(context: SearchContext, rule: type[RuleSearch]) -> Found:
    assert context.texts is not None
    record, prefix = compute(rule(context.config.search, context.texts), context.cached)
    if record["token_ids"]:
        metadata = {**context.metadata, "text": context.lm.decode(record["token_ids"])}
        return Found(record, replace(prefix, metadata=metadata), record["seconds"])
    warning = (
        "the search found no prefix: no token of the search text is an outlier above "
        f"search.eta={context.config.search.eta} times the median at a down projection, so the run goes on without one"
    )
    return Found(record, None, record["seconds"], (warning,))
