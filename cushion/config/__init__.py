"""The typed configuration: one dataclass per config group, each checking its own values.

Hydra merges the YAML files of `conf/` into these classes, so a misspelt key or a value of the wrong type stops the run
before anything is loaded; `__post_init__` stops values out of range, with a message that names the key, the value and
what is allowed. Below the front door there is no Hydra and no DictConfig: `pipeline.run` takes a `RunConfig`.

Each group has a file here, and the parts of a quantizer have theirs (`cushion/quantization/parts`); all of them are
imported from `cushion.config`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cushion.checks import EXPERIMENT_BYTES, check_name, check_values, from_plain, one_of, require
from cushion.config.data import CorpusConfig as CorpusConfig
from cushion.config.data import DataConfig as DataConfig
from cushion.config.evaluation import EvalConfig as EvalConfig
from cushion.config.model import ModelConfig as ModelConfig
from cushion.config.reconstruction import ReconstructionConfig as ReconstructionConfig
from cushion.config.reconstruction import check_learns
from cushion.config.search import SearchConfig as SearchConfig
from cushion.config.search import SearchRound as SearchRound
from cushion.config.tracking import TrackingConfig as TrackingConfig
from cushion.config.tuning import TuningConfig as TuningConfig
from cushion.errors import ConfigError
from cushion.quantization.parts.activations import ActivationConfig as ActivationConfig
from cushion.quantization.parts.attention import AttentionConfig as AttentionConfig
from cushion.quantization.parts.compensation import CompensationConfig as CompensationConfig
from cushion.quantization.parts.kv_cache import KvCacheConfig as KvCacheConfig
from cushion.quantization.parts.qfem import QFeMConfig as QFeMConfig
from cushion.quantization.parts.registry import rounds
from cushion.quantization.parts.weights import WeightConfig as WeightConfig
from cushion.quantization.quantizer import CalibrationConfig as CalibrationConfig
from cushion.quantization.quantizer import QuantizerConfig as QuantizerConfig
from cushion.registry import EXECUTIONS, SEARCH_METHODS

BOS_POLICIES = ("tokenizer", "always", "never")


@dataclass
class PathsConfig:
    """`paths`: where results, cached steps and converted models go, and where named sets are read from."""

    output_dir: str = "outputs"
    """Results, sweeps, cache

    Allowed: text
    """
    cache_dir: str | None = None
    """Cached steps; null: the folder `cache` inside `paths.output_dir`

    Allowed: text, null
    """
    model_dir: str = "~/.cache/cushion/models"
    """Converted embedded models. On the command line the environment variable `CUSHION_MODEL_DIR` is the default where
    it is set

    Allowed: text
    """
    data_dir: str | None = None
    """Folder that holds WikiText-2, C4 and the tasks' records in place of the hub, see [data.md](data.md)

    Allowed: text, null
    """

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
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    paths: PathsConfig = field(default_factory=PathsConfig)
    experiment: str = "default"
    """First folder of the results, and the W&B group

    Allowed: letters, digits, `.`, `_`, `-`
    """
    seed: int = 0
    """Which texts are drawn for calibration, search and tuning; the sampled candidates and the tokens of
    `search=random`, unless `search.seed` is set; the order of the tuning sequences. Not the evaluation blocks

    Allowed: 0 to 4294967295
    """
    device: str = "auto"
    """Where the model runs; `auto` is a CUDA GPU if torch sees one, else the CPU. `mps`, a GPU of Apple, has no
    float64: sums in double precision are then made on the CPU. It is tested with a pretended device, not measured
    on one; what torch lacks there ends the run with its own message

    Allowed: `auto`, `cpu`, `cuda`, `cuda:<number>`, `mps`
    """
    execution: str = "simulated"
    """How the quantized linears of the rows of a table are computed: `simulated`, or on codes of 8 bits
    ([execution.md](execution.md)); searching and tuning are simulated

    Allowed: `simulated`, `int8`, `fp8`, and what packages of yours add ([extending](extending.md#an-execution))
    """
    bos: str = "tokenizer"
    """Whether every text of the run begins with BOS: as the tokenizer does by itself, always, or never

    Allowed: `tokenizer`, `always`, `never`
    """
    objective: str | None = None
    """The final number of a run that a sweeper optimises ([reports.md](reports.md#sweepers-that-optimise)); it changes
    no result and no folder

    Allowed: text, null
    """

    def __post_init__(self) -> None:
        check_values("", self)
        EXECUTIONS[self.execution]  # refuses a name that there is not
        one_of("bos", self.bos, BOS_POLICIES)
        reason = "a prefix is keys and values and predicts no token, and with bos=never nothing else stands before it"
        first, before = self.eval.predict_first, self.bos != "never"
        require(before or not first, "eval.predict_first", first, reason)
        safe = bool(self.experiment) and all(c.isalnum() or c in "._-" for c in self.experiment)
        require(safe, "experiment", self.experiment, "it names a folder: letters, digits, '.', '_' and '-'")
        check_name("experiment", self.experiment, EXPERIMENT_BYTES)
        method = SEARCH_METHODS[self.search.method]
        if self.tuning.method != "none" and method.find is None:
            raise ConfigError(
                f"tuning={self.tuning.name} has no prefix to tune with search={self.search.name}: "
                "choose a search that finds one, for example search=greedy_pruned, or tuning=none"
            )
        self._check_tuning()
        self.reconstruction.check(self.quantizer)
        if "replicas" in method.reads and self.search.replicas != 1 and self.model.device_map is not None:
            replicas = "null" if self.search.replicas is None else self.search.replicas
            raise ConfigError(
                f"search.replicas={replicas} puts a copy of the model on each GPU, and model.device_map="
                f"{self.model.device_map!r} places the model otherwise: use search.replicas=1, or model.device_map=null"
            )

    def _check_tuning(self) -> None:
        """Refuse a tuning whose ranges or loss need a quantizer that is not there."""
        tuning, quantizer = self.tuning, self.quantizer
        if tuning.method == "none":
            return
        if tuning.ranges != "dynamic":
            bits, kind = quantizer.activations.bits, quantizer.activations.range
            wanted = "null" if bits is None else kind
            key = "bits" if bits is None else "range"
            if bits is None or kind != "static":
                raise ConfigError(
                    f"tuning.ranges={tuning.ranges} needs a quantizer with static ranges, and quantizer="
                    f"{quantizer.name} has quantizer.activations.{key}={wanted}: choose one that has, for example "
                    "quantizer=per_tensor_static, or tuning.ranges=dynamic"
                )
        if tuning.ranges == "learned":
            check_learns("tuning.ranges=learned", quantizer, "use tuning.ranges=dynamic or static")
        if tuning.ranges == "static" and quantizer.blockwise:
            raise ConfigError(
                f"tuning.ranges=static fits the quantizer anew every {tuning.ranges_every} steps, and "
                f"{quantizer.blockwise[0].key} is fitted block by block, which takes too long for that: "
                "use tuning.ranges=dynamic or learned"
            )
        if tuning.loss == "kl" and not rounds(quantizer):
            raise ConfigError(
                f"tuning.loss=kl compares the quantized model with full precision, and quantizer={quantizer.name} "
                "rounds nothing: choose a quantizer, or tuning.loss=next_token"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The configuration that `to_dict` made these values of: `RunConfig.from_dict(result["config"])`.

        Args:
            values: as `config` of a result.json holds them. A key that it lacks has its default: results of older
                versions are from before there was one.

        Raises:
            ConfigError: a key is not of the schema, or a value is not allowed.

        """
        return from_plain(cls, values)

    @property
    def needs_calibration_text(self) -> bool:
        """Whether the quantizer is calibrated, or something of it learned."""
        return self.quantizer.needs_calibration_text or self.reconstruction.is_on

    @property
    def search_seed(self) -> int:
        """What tokens are drawn with: `search.seed`, else the run's seed."""
        return self.seed if self.search.seed is None else self.search.seed


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain dictionaries, lists and scalars, ready for JSON."""
    return dataclasses.asdict(config)
