"""Group `tracking`: where runs are logged."""

from __future__ import annotations

from dataclasses import dataclass, field

from cushion.checks import check_values, one_of

TRACKERS = ("none", "wandb")
TRACKING_MODES = ("auto", "online", "offline")


@dataclass
class TrackingConfig:
    """Group `tracking`: where runs are logged. Never a reason for a run to fail."""

    name: str = "wandb"
    backend: str = "wandb"
    """Which tracker

    Allowed: `none`, `wandb`
    """
    project: str = "cushion"
    """W&B project

    Allowed: text
    """
    entity: str | None = None
    """W&B user or team

    Allowed: text, null
    """
    group: str | None = None
    """W&B group

    Allowed: text, null
    """
    mode: str = "auto"
    """`auto`: what `WANDB_MODE`, `wandb offline` or `wandb disabled` says; else online if there is a key and the server
    answers within 3 seconds; else offline

    Allowed: `auto`, `online`, `offline`
    """
    tags: list[str] = field(default_factory=list)
    """W&B tags

    Allowed: list
    """

    def __post_init__(self) -> None:
        check_values("tracking", self)
        one_of("tracking.backend", self.backend, TRACKERS)
        one_of("tracking.mode", self.mode, TRACKING_MODES)
