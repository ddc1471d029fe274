"""The prefix of the greedy search: what it starts with, and what a run records of it."""

from __future__ import annotations

from dataclasses import asdict, replace

from torch import Tensor

from cushion.config import RunConfig, SearchConfig
from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.search.given import line_break
from cushion.search.greedy_steps import GreedySearch
from cushion.search.half_precision import resolved
from cushion.search.methods import Found, SearchContext
from cushion.search.proposals import OutlierProposal, Proposal, propose
from cushion.step import compute


def start_tokens(lm: LanguageModel, config: RunConfig) -> list[int]:
    """What `search.start` puts in front of the tokens that are searched for.

    Raises:
        ConfigError: BOS is asked for, and the model has none.

    """
    start = config.search.start
    if start == "empty":
        return []
    if start == "newline":
        return line_break(lm)
    if lm.bos_token_id is None:
        raise ConfigError(f"search.start=bos, but {lm.label} has no BOS token: use search.start=empty")
    return [lm.bos_token_id]


def find(context: SearchContext) -> Found:
    """The prefix of the greedy search; none where no candidate lowers the objective enough."""
    config = resolved(context.config.search, context.lm)
    assert context.texts is not None
    texts, further = split_texts(config, context.texts)
    proposal = _propose(context, texts)
    step = GreedySearch(config, texts, proposal, list(context.start_tokens), further)
    state, prefix = compute(step, context.cached)
    prefix = replace(prefix, metadata={**context.metadata, "text": context.lm.decode(state.token_ids)})
    warnings, found = [], len(state.token_ids) > len(context.start_tokens)
    if state.stop_reason == "budget":
        outcome = "the prefix is the best that was verified by then" if found else "none was verified by then"
        warnings.append(
            f"the search ran out of its budget (search.budget_token_forwards={config.budget_token_forwards}, "
            f"search.budget_seconds={config.budget_seconds}): {outcome}"
        )
    if not found and state.stop_reason == "max_length":
        warnings.append(
            f"search.start={config.start} fills search.max_length={config.max_length}, and nothing was searched: "
            "raise it"
        )
    elif not found:
        reason = (
            "its budget ended before a candidate was verified that lowers"
            if state.stop_reason == "budget"
            else "the best candidate does not lower"
        )
        goes_on = f"with search.start={config.start} alone" if state.token_ids else "without one"
        warnings.append(
            f"the search found no prefix: {reason} the objective to tau={config.tau} of what it was, so the run "
            f"goes on {goes_on}"
        )
    record = {
        "proposal": config.proposal,
        "scoring": config.scoring,
        "objective": config.objective,
        "tau": config.tau,
        "start": context.start_tokens,
        "verify_texts": config.verify_texts,
        "token_ids": state.token_ids,
        "stop_reason": state.stop_reason,
        "steps": [asdict(step) for step in state.steps],
        "proposal_token_forwards": state.proposal_token_forwards,
        "proposal_seconds": state.proposal_seconds,
        "token_forwards": state.token_forwards_done,
        "seconds": state.seconds_done,
    }
    return Found(record, prefix if state.token_ids else None, state.seconds_done, tuple(warnings))


def split_texts(config: SearchConfig, texts: Tensor) -> tuple[Tensor, Tensor]:
    """The texts of the steps, and the further ones that finalists are judged on: the last `search.verify_texts`."""
    steps = len(texts) - config.verify_texts
    return texts[:steps], texts[steps:]


def _propose(context: SearchContext, texts: Tensor) -> Proposal:
    """The candidates; an artifact of its own where the model is run to name them."""
    config = context.config.search
    if config.proposal == "outlier":
        return compute(OutlierProposal(config, texts), context.cached)
    return propose(context.lm, config, context.count_tokens, texts, context.config.search_seed)
