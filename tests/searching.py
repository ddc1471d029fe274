"""What the tests of the greedy search share: states without their seconds, and a search that is cut off anywhere."""

from __future__ import annotations

import itertools
import json
from typing import Any

from torch import Tensor

from cushion.config import SearchConfig
from cushion.models import LanguageModel
from cushion.search.greedy import greedy_search
from cushion.search.greedy_state import Scored, SearchState, SearchStep


def comparable(state: SearchState) -> dict[str, Any]:
    """Everything but the time it took."""
    record = state.to_dict()
    for step in [*record["steps"], record["under_way"]]:
        del step["seconds"]
    return record


def assert_it_goes_on_after_any_event(
    lm: LanguageModel, config: SearchConfig, texts: Tensor, candidates: list[int], further: Tensor | None = None
) -> list[Scored | SearchStep]:
    """Cut a search off behind each of its events and go on from the saved state; returns the events of a whole one."""
    whole = SearchState([])
    events = list(greedy_search(lm, config, texts, candidates, whole, further))
    for stop in range(len(events) + 1):
        state = SearchState([])
        for _ in itertools.islice(greedy_search(lm, config, texts, candidates, state, further), stop):
            pass
        resumed = SearchState.from_dict(json.loads(json.dumps(state.to_dict())))
        rest = list(greedy_search(lm, config, texts, candidates, resumed, further))
        assert len(rest) == len(events) - stop  # nothing is computed again
        assert comparable(resumed) == comparable(whole)
    return events
