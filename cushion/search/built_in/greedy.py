"""CushionCache's Algorithm 1 (arXiv 2406.12016, section 4.1), as a method."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cushion.checks import without_effect
from cushion.config import SearchConfig
from cushion.errors import ConfigError
from cushion.search.methods import SearchMethod, register

if TYPE_CHECKING:
    from torch import Tensor

    from cushion.models import LanguageModel


FURTHER_TEXTS_AT = 8
"""Place of the first further text in the seeded order of all texts. It does not depend on how many steps there may be,
so that the first steps of a longer search are those of a shorter one."""


def _places(search: SearchConfig, started: int) -> list[int]:
    """One text for each step, in order, then those that the best candidates of all steps are verified on.

    The steps leave out the places of the further texts: no text is both.
    """
    steps, further = max(1, search.max_length - started), search.verify_texts
    of_steps = [place if place < FURTHER_TEXTS_AT else place + further for place in range(steps)]
    return of_steps + list(range(FURTHER_TEXTS_AT, FURTHER_TEXTS_AT + further))


def _texts(search: SearchConfig, started: int) -> int:
    return len(_places(search, started))


def _longest(search: SearchConfig, started: int) -> int:
    return max(started, search.max_length)


def _check_model(search: SearchConfig, lm: LanguageModel, started: int) -> None:
    from cushion.search.half_precision import check_rounds_dtype

    check_rounds_dtype(search, lm)
    positions = _longest(search, started) + search.text_length
    if lm.context_length is not None and positions > lm.context_length:
        raise ConfigError(
            f"search.max_length={search.max_length} and search.text_length={search.text_length} need "
            f"{positions} positions, but {lm.label} has {lm.context_length}: shorten one"
        )


def _check_texts(search: SearchConfig, texts: Tensor) -> None:
    budget = search.budget_token_forwards
    if search.proposal != "outlier" or budget is None:
        return
    steps = texts[: len(texts) - search.verify_texts]
    cost = steps.numel() + len(steps)  # one token stands in front of each
    if cost >= budget:
        raise ConfigError(
            f"search.budget_token_forwards={budget} leaves nothing to search with: search.proposal=outlier runs the "
            f"{len(steps)} texts of the search, {cost} token-forwards; raise it, or use another proposal"
        )


def _idle(search: SearchConfig) -> list[str]:
    found: list[str] = []

    def changed(keys: tuple[str, ...], why: str) -> None:
        found.extend(without_effect("search", search, keys, why))

    if search.proposal in ("vocabulary", "user"):
        changed(("candidates",), f"with search.proposal={search.proposal}")
    if search.proposal != "sampled":
        changed(("frequent", "seed"), f"with search.proposal={search.proposal}")
    if search.proposal != "user":
        changed(("user_tokens",), f"with search.proposal={search.proposal}")
    if search.verify_texts == 0:
        changed(("verify_candidates",), "with search.verify_texts=0")
    if search.scoring == "full":
        changed(("rounds", "rounds_dtype"), "with search.scoring=full")
    if search.proposal == "sampled" and search.frequent >= search.candidates:
        found.append(
            f"search.candidates={search.candidates} leaves no room for a seeded draw beside "
            f"search.frequent={search.frequent}: the seed has no effect on the candidates"
        )
    if search.objective == "maximum_activation":
        changed(("bits", "symmetric", "levels"), "on the search with search.objective=maximum_activation")
    return found


register(
    SearchMethod(
        name="greedy",
        title="greedy prefix",
        find="cushion.search.greedy_prefix:find",
        start="cushion.search.greedy_prefix:start_tokens",
        reads=(
            "seed",
            "proposal",
            "candidates",
            "frequent",
            "objective",
            "tau",
            "max_length",
            "text_length",
            "start",
            "batch_size",
            "replicas",
            "scoring",
            "rounds",
            "rounds_dtype",
            "verify_texts",
            "verify_candidates",
            "budget_token_forwards",
            "budget_seconds",
            "user_tokens",
        ),
        texts=_texts,
        texts_by=("max_length", "verify_texts"),
        places=_places,
        longest=_longest,
        check_model=_check_model,
        check_texts=_check_texts,
        idle=_idle,
    )
)
