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
    project: str = "cushion"
    entity: str | None = None
    group: str | None = None
    mode: str = "auto"
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_values("tracking", self)
        one_of("tracking.backend", self.backend, TRACKERS)
        one_of("tracking.mode", self.mode, TRACKING_MODES)
