"""Group `tuning`: how the prefix is tuned."""

from __future__ import annotations

from dataclasses import dataclass

from cushion.checks import LARGEST, at_least, check_rate, check_values, one_of, require

TUNING_METHODS = ("none", "prefix")
GRADIENTS = ("range", "nearest_grid_point", "straight_through")
ERROR_SITES = ("block_outputs", "linear_inputs")
REDUCTIONS = ("mean", "sum", "token", "relative")
PREDICTION_MODELS = ("quantized", "full_precision")
RANGES = ("dynamic", "static", "learned")
LOSSES = ("next_token", "kl")
SCHEDULES = ("constant", "linear", "cosine")


@dataclass
class TuningConfig:
    """Group `tuning`: quantization-aware prefix tuning (CushionCache, section 4.2).

    The loss is `L_pred + lambda_q * L_q`. See docs/config.md for what the paper states and what was chosen here.
    """

    name: str = "none"
    method: str = "none"
    """No tuning, or tune keys and values

    Allowed: `none`, `prefix`
    """
    steps: int | None = None
    """Optimizer steps; give this or `epochs`

    Allowed: 1 and more, null
    """
    epochs: float | None = None
    """Passes over the training sequences

    Allowed: positive, null
    Paper: 2
    """
    sequences: int = 256
    """Number of training sequences

    Allowed: 1 and more
    Paper: **open**
    """
    sequence_length: int = 256
    """Tokens per sequence

    Allowed: 2 and more
    Paper: **open**
    """
    batch_size: int = 2
    """Sequences per step

    Allowed: 1 and more
    Paper: **open**
    """
    learning_rate: float = 1e-2
    """Peak learning rate of Adam

    Allowed: positive, at most 1000
    Paper: **open**
    """
    schedule: str = "cosine"
    """After warm-up: constant, or down to near 0

    Allowed: `constant`, `linear`, `cosine`
    Paper: **open**
    """
    warmup_steps: int = 5
    """Steps of linear warm-up

    Allowed: 0 and more
    Paper: **open**
    """
    gradient_clip: float | None = 1.0
    """Largest norm of the gradient over all keys and values

    Allowed: positive, finite, null
    Paper: **open**: a bound on single large steps; null for none
    """
    lambda_q: float = 0.01
    """Lambda, the weight of L_q

    Allowed: 0 to 2147483647
    Paper: 0.01
    """
    gradient: str = "range"
    """How L_q gets a gradient through the rounding

    Allowed: `range`, `nearest_grid_point`, `straight_through`
    Paper: **open**; [what each does](method.md#prefix-tuning)
    """
    error_site: str = "block_outputs"
    """X in L_q: output of every block, or input of every linear in the blocks

    Allowed: `block_outputs`, `linear_inputs`
    Paper: the activations of the blocks, as in the search
    """
    reduction: str = "mean"
    """What the sum of squares of a site is divided by: its elements, nothing, its tokens; or L_q by what it was before
    tuning

    Allowed: `mean`, `sum`, `token`, `relative`
    Paper: **open**; [what each does](method.md#prefix-tuning)
    """
    prediction_model: str = "quantized"
    """Whether the loss is computed on the quantized or on the full-precision model

    Allowed: `quantized`, `full_precision`
    Paper: **open**: the quantized model is the one that will be used
    """
    loss: str = "next_token"
    """L_pred: the next-token cross entropy, or the divergence from full precision behind the found prefix

    Allowed: `next_token`, `kl`
    Paper: next-token cross entropy
    """
    ranges: str = "dynamic"
    """The activation ranges of the quantized model: of each input, the run's own static ones, or static ones that
    learn

    Allowed: `dynamic`, `static`, `learned`
    Paper: **open**: `static` and `learned` tune under the quantizer that the row is measured with
    """
    ranges_every: int = 15
    """Steps between two estimates of static ranges, with `ranges: static`; every measurement of the held-out loss has
    one too

    Allowed: 1 and more
    """
    scale_learning_rate: float = 1e-2
    """Peak learning rate of the logarithms of learned scales, with `ranges: learned`

    Allowed: positive, at most 1000
    """
    evaluate_every: int = 15
    """Steps between measurements of the held-out loss (the last step is always measured)

    Allowed: 1 and more
    Paper: **open**
    """
    held_out_sequences: int = 8
    """Sequences that decide which step was best, from documents that give no training sequence
    ([data.md](data.md#held-out-text))

    Allowed: 1 and more
    Paper: **open**
    """

    def __post_init__(self) -> None:
        check_values("tuning", self)
        one_of("tuning.method", self.method, TUNING_METHODS)
        one_of("tuning.schedule", self.schedule, SCHEDULES)
        one_of("tuning.gradient", self.gradient, GRADIENTS)
        one_of("tuning.error_site", self.error_site, ERROR_SITES)
        one_of("tuning.reduction", self.reduction, REDUCTIONS)
        one_of("tuning.prediction_model", self.prediction_model, PREDICTION_MODELS)
        one_of("tuning.loss", self.loss, LOSSES)
        one_of("tuning.ranges", self.ranges, RANGES)
        for key in ("sequences", "batch_size", "evaluate_every", "ranges_every", "held_out_sequences"):
            at_least(f"tuning.{key}", getattr(self, key), 1)
        at_least("tuning.sequence_length", self.sequence_length, 2)
        at_least("tuning.warmup_steps", self.warmup_steps, 0)
        for key in ("learning_rate", "scale_learning_rate"):
            check_rate(f"tuning.{key}", getattr(self, key))
        require(0 <= self.lambda_q <= LARGEST, "tuning.lambda_q", self.lambda_q, f"at least 0, at most {LARGEST}")
        clip = self.gradient_clip
        require(clip is None or clip > 0, "tuning.gradient_clip", clip, "positive, or null for no clipping")
        if self.method == "prefix":
            reason = "give either tuning.steps or tuning.epochs"
            require((self.steps is None) != (self.epochs is None), "tuning.steps", self.steps, reason)
            at_least("tuning.steps", self.steps, 1)
            reason = "it must be positive and finite"
            require(self.epochs is None or self.epochs > 0, "tuning.epochs", self.epochs, reason)
            reason = f"it makes {self.total_steps} steps of the optimizer: at most {LARGEST}"
            require(self.total_steps <= LARGEST, "tuning.epochs", self.epochs, reason)

        if self.prediction_model == "full_precision":
            reason = "it needs tuning.prediction_model=quantized"
            require(self.ranges == "dynamic", "tuning.ranges", self.ranges, reason)
            require(self.loss != "kl", "tuning.loss", self.loss, reason)

    @property
    def total_steps(self) -> int:
        """Optimizer steps: `steps`, or `epochs` passes over `sequences` sequences."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return max(1, round(self.epochs * self.sequences / self.batch_size))
