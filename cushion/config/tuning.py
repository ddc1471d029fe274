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
    loss: str = "next_token"
    ranges: str = "dynamic"
    ranges_every: int = 15
    scale_learning_rate: float = 1e-2
    evaluate_every: int = 15
    held_out_sequences: int = 8

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
