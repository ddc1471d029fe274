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
    """No search, a prefix that needs no search, greedy, QFeP, or PrefixQuant's rule

    Allowed: `none`, `tokens`, `bos`, `newline`, `random`, `greedy`, `qfep`, `prefixquant`, and what packages of yours
        add ([extending](extending.md#a-search))
    Paper: greedy
    """
    tokens: str | None = None
    """With `method=tokens`: the prefix as text

    Allowed: text, null
    """
    token_ids: list[int] | None = None
    """With `method=tokens`: the prefix as token ids

    Allowed: list, null
    """
    length: int = 1
    """With `method=random`: number of tokens

    Allowed: 1 and more
    """
    seed: int | None = None
    """What the tokens of `method=random` and of the sampled proposal are drawn with; null: the run's `seed`.
    `search.seed=0,1,2` varies these tokens alone, `seed=0,1,2` the texts too

    Allowed: 0 to 4294967295, null
    """
    proposal: str = "sampled"
    """Which tokens each step tries: the whole vocabulary, a sample of it, the most frequent tokens of the search text,
    the tokens that spike in it, or yours

    Allowed: `vocabulary`, `sampled`, `frequent`, `outlier`, `user`
    Paper: the whole vocabulary
    """
    candidates: int = 512
    """`sampled`: number of tokens tried per step, the whole vocabulary if it is not larger; `frequent`, `outlier`:
    their largest number

    Allowed: 1 and more
    """
    frequent: int = 128
    """`sampled`: how many of them are the most frequent tokens of the search text (counted in its first 64 documents)

    Allowed: 0 and more
    """
    objective: str = "quantization_error"
    """What a candidate is judged by

    Allowed: `quantization_error`, `maximum_activation`
    Paper: section 4 minimises L_q; the abstract words it as the maximum activation
    """
    tau: float = 0.5
    """A token is accepted if the objective falls to `tau` times its former value or less

    Allowed: above 0, at most 1
    Paper: 0.5
    """
    max_length: int = 8
    """M, the largest length of the prefix, in tokens, the start included. `prefixquant`: a longer prefix is cut to it,
    with a warning

    Allowed: 1 and more
    Paper: **open**; a bound on the cost, `tau` may stop sooner
    """
    text_length: int = 512
    """N, tokens of the text of each step; `qfep`, `prefixquant`: of each text

    Allowed: 2 and more
    Paper: 512
    """
    start: str = "empty"
    """The prompt before the first step

    Allowed: `empty`, `bos`, `newline`
    Paper: **open**: the paper names `<bos>` and a newline as possible; empty makes the search itself find what
        works
    """
    bits: int = 8
    """Bits of q in L_q

    Allowed: 2 to 8
    """
    symmetric: bool = False
    """Whether q in L_q is symmetric

    Allowed: true, false
    Paper: asymmetric
    """
    levels: str = "full"
    """Denominator of q's scale in L_q, on integers

    Allowed: `full`, `paper`
    Paper: see `quantizer.levels`
    """
    format: str = "int"
    """Number format of q in L_q; other than `int` needs its own `bits` and `symmetric=true`. A format of blocks has
    one scale for every block of features, MX with its own rule of the shared exponent

    Allowed: as `quantizer.weights.format`
    Paper: integers
    """
    batch_size: int | None = None
    """Candidates per forward pass; null: as many as make 2,048 tokens on a CPU; on a GPU 8,192 at first, then as many
    as 0.8 of the free memory has room for

    Allowed: 1 and more, null
    Paper: the batch is halved whenever memory runs out
    """
    replicas: int | None = 1
    """GPUs of this machine among which the candidates are shared out, each with a copy of the model; `batch_size` is
    each one's share

    Allowed: 1 and more, null for all that the run may use
    Paper: a run of a sweep by several processes has one GPU
    """
    texts: int = 64
    """`qfep`, `prefixquant`: number of texts

    Allowed: 1 and more
    Paper: PrefixQuant: 64; QFeP: 512
    """
    contexts: int = 200
    """`qfep`: number of contexts C, the most frequent tokens of the texts

    Allowed: 1 and more
    Paper: QFeP: 200
    """
    outlier_tokens: int = 3
    """`qfep`: number of tokens T that are tried

    Allowed: 1 and more
    Paper: QFeP: 3
    """
    eta: float = 64.0
    """`prefixquant`: a token is an outlier above `eta` times the median of its text

    Allowed: 1 and more
    Paper: PrefixQuant: 64
    """
    scoring: str = "full"
    """How the best candidate is found: by the objective of all of them; the same with a bound; or by rounds, with the
    objective for those that are left

    Allowed: `full`, `exact`, `pruned`
    Paper: full
    """
    rounds: list[SearchRound] = field(default_factory=default_rounds)
    """`pruned` and `exact`: what each round runs (`depth`, share of the blocks; `tokens`; `text`, the spiking tokens
    of the step's text, its `start`, or its `first` token, which is for steps from an empty prompt alone) and how
    many candidates it keeps

    Allowed: list of `depth` (above 0, at most 1), `tokens` (2 and more; 1 for `first`), `keep` (1 and more, or a
        share of the candidates below 1), `text` (`first`, `spikes`, `start`)
    Paper: [method.md](method.md#pruned-and-exact-scoring)
    """
    rounds_dtype: str = "model"
    """What the rounds multiply in: the model's own dtype, a copy in bfloat16, or (`auto`, in `greedy_pruned` and
    `greedy_exact`) that copy where the model is float32 and the processor multiplies bfloat16 faster (AMX, AMD's
    AVX-512, CUDA); whatever enters a result is judged by the model itself

    Allowed: `model`, `auto`, `bfloat16`
    """
    verify_texts: int = 0
    """Further texts of `text_length` tokens of the search text that the best candidates of every step are judged on
    before one is taken; 0: the search text alone decides

    Allowed: 0 and more
    Paper: 0: one text a step; 4 in `greedy_pruned`, see [method.md](method.md#verification-on-further-texts)
    """
    verify_candidates: int = 12
    """How many candidates those are

    Allowed: 1 and more
    """
    budget_token_forwards: float | None = None
    """The search stops before it has run more, the proposal included; one token through all blocks counts one, through
    some of them that share

    Allowed: above 0, null
    """
    budget_seconds: float | None = None
    """The search stops once it has taken longer, the proposal included, at the end of the batch under way

    Allowed: above 0, null
    """
    user_tokens: list[int] | None = None
    """`user`: the token ids to try; ties go to the one that you name first

    Allowed: list, null
    """

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
