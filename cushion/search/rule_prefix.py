"""The prefixes of QFeP and of PrefixQuant's rule, and what a run records of them."""

from __future__ import annotations

from dataclasses import replace

from cushion.search.methods import Found, SearchContext


def find_by_rule(context: SearchContext) -> Found:
    """The prefix of a rule; none where it finds no outlier token."""
    record, prefix = context.steps.search_by_rule(context.metadata)
    if record["token_ids"]:
        return Found(record, prefix, record["seconds"])
    warning = (
        "the search found no prefix: no token of the search text is an outlier above "
        f"search.eta={context.config.search.eta} times the median at a down projection, so the run goes on without one"
    )
    return Found(record, None, record["seconds"], (warning,))


def find_by_prefixquant(context: SearchContext) -> Found:
    """The prefix of PrefixQuant's rule; none where it finds no outlier token."""
    found = find_by_rule(context)
    asked, given = found.record["length"], 0 if found.prefix is None else len(found.prefix)
    if given == 0 or given >= asked:
        return found
    warning = (
        f"PrefixQuant's rule asks for a prefix of {asked} tokens, and this one has {given}: it "
        f"is cut to search.max_length={context.config.search.max_length}, or there are not as many different outlier "
        "tokens"
    )
    return replace(found, warnings=(warning,))
