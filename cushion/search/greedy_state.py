"""How far a greedy search is: the records of its steps, the step under way, and what a killed search goes on from."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Finalist:
    """A candidate that was judged on further texts.

    `objectives`: L_q(t | p, candidate) for the search text first, then for the further texts; None where it is not
    finite. `score`: what the lowest is taken of, the mean over texts of the objective over the text's median one;
    `ratio`: the mean over texts of L_q(t | p, candidate) / L_q(t | p). None where an objective is missing.
    """

    token_id: int
    token: str
    score: float | None
    ratio: float | None
    objectives: list[float | None]


@dataclass(frozen=True)
class SearchStep:
    """One step of the greedy search. `objective_before` is L_q(t | p), `objective_after` L_q(t | p, p*), same t.

    `token_forwards`: a token through all blocks counts one, through some of the blocks that share of one.
    """

    step: int
    token_id: int
    token: str
    objective_before: float
    objective_after: float
    accepted: bool
    candidates: int
    token_forwards: float
    seconds: float
    verified: int = 0
    """How many of the candidates were judged by the whole objective."""
    replicas: int = 1
    """GPUs (or copies of the model) that worked on it at the end."""
    rounds_dtype: str | None = None
    """The dtype that its rounds were run in; None without any."""
    ratio: float | None = None
    """The chosen token's mean ratio over search and further texts, which tau bounds; None without further texts, or
    where it is infinite."""
    further_before: list[float] = field(default_factory=list)
    """L_q(t | p) for each further text."""
    finalists: list[Finalist] = field(default_factory=list)
    """The candidates that were judged on the further texts, by their place among the candidates."""

    def is_accepted(self, tau: float) -> bool:
        """Whether the token lowers the objective to `tau` of what it was, or less.

        With further texts that is the mean over all texts; a token without one, which has an infinite ratio on some
        text, is rejected.
        """
        if self.further_before:
            return self.ratio is not None and self.ratio <= tau
        return self.objective_after <= tau * self.objective_before

    def point(self) -> dict[str, Any]:
        """The scalars of the record, as a point of a series."""
        return {key: value for key, value in asdict(self).items() if not isinstance(value, list)}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> SearchStep:
        """The step that `asdict` described; a `KeyError` when a field is missing."""
        values = {item.name: record[item.name] for item in fields(cls)}
        return cls(**{**values, "finalists": [Finalist(**finalist) for finalist in record["finalists"]]})


@dataclass
class StepState:
    """How far the step under way is. Candidates are named by their positions in the list of candidates."""

    objective_before: float | None = None
    spikes: list[int] = field(default_factory=list)
    """Positions of the step's text by the size of their spike; empty where no round asks for them."""
    stage: int = 0
    """Number of the stage under way: the rounds, the verification, the sweep."""
    pool: list[int] | None = None
    """The candidates of the stage under way; None for all."""
    scores: list[float | None] = field(default_factory=list)
    """Objectives of the first `len(scores)` candidates of that pool; None where one is not finite, or where the
    candidate was dropped."""
    verified: list[tuple[int, float]] = field(default_factory=list)
    """Candidates that were judged by the whole objective before the stage under way, with their objectives."""
    finalists: list[int] = field(default_factory=list)
    """The candidates that are judged on further texts."""
    further_before: list[float] = field(default_factory=list)
    """L_q(t | p) for the further texts begun."""
    further: list[list[float | None]] = field(default_factory=list)
    """For each further text that is done, the objectives of the finalists; None where one is not finite."""
    token_blocks: int = 0
    """Tokens times blocks they went through."""
    seconds: float = 0.0


@dataclass
class SearchState:
    """How far a search is: what a killed search goes on from. Plain data, ready for JSON.

    | field | content |
    |---|---|
    | `method`, `proposal`, `scoring`, `objective`, `tau` | as configured |
    | `start` | token ids of the prompt before the first step |
    | `verify_texts` | as configured |
    | `token_ids` | the prompt found, `start` included |
    | `stop_reason` | `tau` (the last step was rejected), `max_length` or `budget` |
    | `steps` | a list, the rejected last step included |
    | `steps[].step` | number, from 0 |
    | `steps[].token_id`, `token` | the best candidate and its text |
    | `steps[].objective_before`, `objective_after` | the objective without and with it, on the same text |
    | `steps[].accepted` | whether `after <= tau * before`, or `ratio <= tau` with further texts |
    | `steps[].ratio` | with `search.verify_texts`: the mean over search text and further texts of the objective with the token over that without it; null without further texts, or where it is infinite, and then the token is rejected |
    | `steps[].further_before` | the objective without the token on each further text; empty without any |
    | `steps[].finalists` | a list, the candidates that were judged on the further texts; empty without any |
    | `steps[].finalists[].token_id`, `token` | the candidate and its text |
    | `steps[].finalists[].score` | what the lowest is taken of: the mean over search text and further texts of the objective with it over the median one of the finalists; null where an objective is not finite |
    | `steps[].finalists[].ratio` | the mean over them of the objective with it over that without it; null likewise |
    | `steps[].finalists[].objectives` | the objective with it on the search text, then on each further text |
    | `steps[].candidates` | number of candidates |
    | `steps[].replicas` | copies of the model, each on a GPU of its own, that worked on it at the end |
    | `steps[].rounds_dtype` | the dtype that its rounds were run in; null without any |
    | `steps[].verified` | how many of the candidates were judged by the whole objective |
    | `steps[].token_forwards` | tokens run through the blocks, a token through some of them counting that share; with `scoring=full` `n + candidates * (n + 1)`. The prefix's own pass is not counted |
    | `steps[].seconds` | |
    | `proposal_token_forwards`, `proposal_seconds` | what it cost to name the candidates: with `proposal=outlier` one pass over each text of the search, otherwise nothing |
    | `token_forwards`, `seconds` | sums, with the proposal, and with a last step that the budget ended before a candidate was verified |
    """  # noqa: E501

    token_ids: list[int]
    steps: list[SearchStep] = field(default_factory=list)
    under_way: StepState = field(default_factory=StepState)
    finished: bool = False
    stop_reason: str = ""
    proposal_token_forwards: int = 0
    proposal_seconds: float = 0.0
    """What it cost to name the candidates, before the first step."""
    rounds_dtype: str | None = None
    """The dtype that rounds are run in, once that was chosen: a search that goes on elsewhere keeps it."""
    unrecorded_token_forwards: float = 0.0
    unrecorded_seconds: float = 0.0
    """What a last step cost that the budget ended before it had verified a candidate."""

    @property
    def token_forwards_done(self) -> float:
        """What the proposal and all steps that have ended ran."""
        others = self.proposal_token_forwards + self.unrecorded_token_forwards
        return others + sum(step.token_forwards for step in self.steps)

    @property
    def seconds_done(self) -> float:
        """What the proposal and all steps that have ended took."""
        return self.proposal_seconds + self.unrecorded_seconds + sum(step.seconds for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """The state as plain data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> SearchState:
        """The state that `to_dict` described; a `KeyError` when a field is missing."""
        under_way = record["under_way"]
        missing = {f.name for f in fields(cls)} - set(record) | {f.name for f in fields(StepState)} - set(under_way)
        if missing:
            raise KeyError(*sorted(missing))
        steps = [SearchStep.from_dict(step) for step in record["steps"]]
        verified = [(int(position), float(score)) for position, score in under_way["verified"]]
        return cls(**{**record, "steps": steps, "under_way": StepState(**{**under_way, "verified": verified})})


@dataclass(frozen=True)
class Scored:
    """Progress within a step: `done` of `total` candidates are scored in stage `stage` of `stages`, from 0 on."""

    step: int
    done: int
    total: int
    stage: int = 0
    stages: int = 1
