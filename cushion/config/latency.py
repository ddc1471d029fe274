"""Group `eval`, key `latency`: what is timed."""

from __future__ import annotations

from dataclasses import dataclass, field

from cushion.checks import at_least, require


@dataclass
class LatencyConfig:
    """`eval.latency`: every batch size with every prompt length. Nothing is timed with empty `batch_sizes`."""

    batch_sizes: list[int] = field(default_factory=list)
    """Batch sizes whose latency is measured for every row, on this machine ([execution.md](execution.md#latency));
    none by default

    Allowed: a list of numbers from 1 on
    Paper: **open**
    """
    prompt_lengths: list[int] = field(default_factory=lambda: [128])
    """Lengths of the prompts, in tokens, each with every batch size

    Allowed: a list of numbers from 1 on
    Paper: **open**
    """
    new_tokens: int = 16
    """Tokens that follow a prompt

    Allowed: 2 and more
    Paper: **open**
    """
    repeats: int = 15
    """Rounds that count

    Allowed: 3 and more
    """
    warmup: int = 3
    """Rounds before them that do not

    Allowed: 1 and more
    """
    compile: bool = False
    """Time the decoder as `torch.compile` makes it; needs a C++ compiler (on a GPU Triton), and minutes

    Allowed: true, false
    """

    def __post_init__(self) -> None:
        for key in ("batch_sizes", "prompt_lengths"):
            values = getattr(self, key)
            is_right = all(value >= 1 for value in values) and len(set(values)) == len(values)
            require(is_right, f"eval.latency.{key}", values, "numbers of at least 1, each of them once")
        reason = "name at least one, or set eval.latency.batch_sizes=[]"
        require(len(self.prompt_lengths) > 0 or not self.is_on, "eval.latency.prompt_lengths", [], reason)
        at_least("eval.latency.new_tokens", self.new_tokens, 2)
        at_least("eval.latency.repeats", self.repeats, 3)
        at_least("eval.latency.warmup", self.warmup, 1)

    @property
    def is_on(self) -> bool:
        """Whether anything is timed."""
        return len(self.batch_sizes) > 0

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """The pairs of batch size and prompt length that are timed."""
        return [(batch, length) for batch in self.batch_sizes for length in self.prompt_lengths]
