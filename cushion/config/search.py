"""Group `search`: how the prefix is found."""

from __future__ import annotations

from dataclasses import dataclass, field

from cushion.checks import at_least, check_values, one_of, require
from cushion.quantization.formats.registry import check_format
from cushion.quantization.quantizer import LEVELS
from cushion.registry import SEARCH_METHODS

PROPOSALS = ("vocabulary", "sampled", "frequent", "outlier", "user")
SCORINGS = ("full", "exact", "pruned")
ROUND_TEXTS = ("first", "spikes", "start")
OBJECTIVES = ("quantization_error", "maximum_activation")
STARTS = ("empty", "bos", "newline")
ROUNDS_DTYPES = ("model", "auto", "bfloat16")


@dataclass
class SearchRound:
    """One entry of `search.rounds`: judge candidates cheaply and keep the best."""

    depth: float = 1.0
    tokens: int = 8
    keep: int | float = 1
    text: str = "spikes"

    def __post_init__(self) -> None:
        check_values("search.rounds", self)
        require(0 < self.depth <= 1, "search.rounds.depth", self.depth, "a share of the blocks, above 0, at most 1")
        one_of("search.rounds.text", self.text, ROUND_TEXTS)
        if self.text == "first":
            require(self.tokens == 1, "search.rounds.tokens", self.tokens, "1, because text=first is one token")
        else:
            at_least("search.rounds.tokens", self.tokens, 2)
        fits = 0 < self.keep < 1 or (self.keep >= 1 and float(self.keep).is_integer())
        require(fits, "search.rounds.keep", self.keep, "a number of candidates, or a share of them below 1")


def default_rounds() -> list[SearchRound]:
    """The rounds of a pruned or exact search that names none."""
    return [
        SearchRound(0.1, 1, 0.25, "first"),
        SearchRound(0.1, 5, 1024, "spikes"),
        SearchRound(0.14, 16, 96, "spikes"),
        SearchRound(0.4, 128, 16, "start"),
    ]


@dataclass
class SearchConfig:
    """Group `search`: how the prefix is found: CushionCache's Algorithm 1 (section 4.1), QFeP, or PrefixQuant's rule.

    `bits`, `symmetric`, `levels` and `format` are the grid of q in the objective L_q: per tensor, or per block where
    the format has blocks, with the range of the following tokens themselves. They are separate from the quantizer under
    test, so that every row of a table shares one search.
    """

    name: str = "none"
    method: str = "none"
    tokens: str | None = None
    token_ids: list[int] | None = None
    length: int = 1
    seed: int | None = None
    proposal: str = "sampled"
    candidates: int = 512
    frequent: int = 128
    objective: str = "quantization_error"
    tau: float = 0.5
    max_length: int = 8
    text_length: int = 512
    start: str = "empty"
    bits: int = 8
    symmetric: bool = False
    levels: str = "full"
    format: str = "int"
    batch_size: int | None = None
    replicas: int | None = 1
    texts: int = 64
    contexts: int = 200
    outlier_tokens: int = 3
    eta: float = 64.0
    scoring: str = "full"
    rounds: list[SearchRound] = field(default_factory=default_rounds)
    rounds_dtype: str = "model"
    verify_texts: int = 0
    verify_candidates: int = 12
    budget_token_forwards: float | None = None
    budget_seconds: float | None = None
    user_tokens: list[int] | None = None

    def __post_init__(self) -> None:
        check_values("search", self)
        method = SEARCH_METHODS[self.method]
        one_of("search.proposal", self.proposal, PROPOSALS)
        one_of("search.objective", self.objective, OBJECTIVES)
        one_of("search.start", self.start, STARTS)
        one_of("search.levels", self.levels, LEVELS)
        require(0 < self.tau <= 1, "search.tau", self.tau, "above 0, at most 1")
        if self.format == "int":
            require(2 <= self.bits <= 8, "search.bits", self.bits, "2 to 8")
        else:
            check_format("search", self.format, self.bits, self.symmetric)
        at_least("search.candidates", self.candidates, 1)
        at_least("search.frequent", self.frequent, 0)
        at_least("search.length", self.length, 1)
        at_least("search.verify_texts", self.verify_texts, 0)
        at_least("search.verify_candidates", self.verify_candidates, 1)
        at_least("search.max_length", self.max_length, 1)
        at_least("search.text_length", self.text_length, 2)
        at_least("search.batch_size", self.batch_size, 1)
        at_least("search.replicas", self.replicas, 1)
        for key in ("texts", "contexts", "outlier_tokens"):
            at_least(f"search.{key}", getattr(self, key), 1)
        at_least("search.eta", self.eta, 1)
        one_of("search.scoring", self.scoring, SCORINGS)
        one_of("search.rounds_dtype", self.rounds_dtype, ROUNDS_DTYPES)
        for key in ("budget_token_forwards", "budget_seconds"):
            value = getattr(self, key)
            require(value is None or value > 0, f"search.{key}", value, "above 0, or null for no limit")
        self.rounds = [SearchRound(**item) if isinstance(item, dict) else item for item in self.rounds]
        if self.scoring != "full":
            require(len(self.rounds) > 0, "search.rounds", self.rounds, "name at least one, or use search.scoring=full")
            reason = "text=first is for steps from an empty prompt: name a round of another text behind it"
            require(any(item.text != "first" for item in self.rounds), "search.rounds", self.rounds, reason)
        if self.proposal == "user":
            reason = "search.proposal=user needs a list of token ids"
            require(bool(self.user_tokens), "search.user_tokens", self.user_tokens, reason)
            for token in self.user_tokens or []:
                require(token >= 0, "search.user_tokens", self.user_tokens, "token ids are not negative")
        method.check(self)
