"""The cached step: a name, a key made of everything that decides its outcome, how it is made, and how it is read.

Every step stands beside what it computes; `compute` is the only caller of the artifact store. A step that another run
has done already is read from the cache, and one that was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
import transformers

from cushion.artifacts import ArtifactStore, Workspace, reading
from cushion.code import version_of
from cushion.events import Event, Progress, Record
from cushion.models import LanguageModel

T = TypeVar("T")


def runtime(device_type: str) -> list[str]:
    """What else the bits of a result depend on: versions of torch and transformers, and the kind of device."""
    return [torch.__version__, transformers.__version__, device_type]


class Context:
    """What every step works with: the model, the store of artifacts, and who wants to know of progress.

    Args:
        lm: the model, as loaded.
        store: where artifacts are.
        emit: called with progress and with every point of a series.

    """

    def __init__(self, lm: LanguageModel, store: ArtifactStore, emit: Callable[[Event], None]) -> None:
        self.lm, self.store, self.emit = lm, store, emit
        self._logged: set[tuple[str, int]] = set()

    def progress(self, stage: str, done: int, total: int, unit: str) -> None:
        """Tell that `done` of `total` units of a stage are finished."""
        self.emit(Progress(stage, done, total, unit))

    def log_series(self, kind: str, points: list[dict[str, Any]]) -> None:
        """Emit each point of a series once: live while it is computed, afterwards where it came from the cache."""
        for point in points:
            if (kind, point["step"]) not in self._logged:
                self._logged.add((kind, point["step"]))
                self.emit(Record(kind, point["step"], {key: value for key, value in point.items() if key != "step"}))


class Step(ABC, Generic[T]):
    """One cached step. A subclass is named by `name`, and keeps what it works on in its fields.

    `version` is that of the code in the import closure of the module that defines the subclass, as the code was on disk
    when the process started.
    """

    name: ClassVar[str]
    version: ClassVar[str]

    def __init_subclass__(cls, **others: Any) -> None:
        super().__init_subclass__(**others)
        cls.version = version_of(cls.__module__)

    @abstractmethod
    def key(self, context: Context) -> dict[str, Any]:
        """Everything that decides the outcome besides model, code and runtime, as plain JSON: a whitelist."""

    @abstractmethod
    def make(self, context: Context, workspace: Workspace) -> None:
        """Compute, and write what came out into `workspace.folder`."""

    @abstractmethod
    def read(self, context: Context, folder: Path) -> T:
        """The outcome, from the folder of a finished artifact."""

    def tell(self, context: Context, outcome: T) -> None:
        """Emit the points of the step's series, if it has one, that were not emitted while it was made."""
        return

    def depends_on(self, context: Context) -> dict[str, Any]:
        """The whole key of the artifact: what every step depends on, and what this one does."""
        return {
            "code": self.version,
            "runtime": runtime(context.lm.device.type),
            "model": context.lm.fingerprint,
            **self.key(context),
        }


def compute(step: Step[T], context: Context) -> T:
    """The outcome of a step: from the cache, or made now.

    Raises:
        ArtifactError: the cached artifact is damaged; the message names the folder to delete.

    """
    folder = context.store.get_or_make(
        step.name, step.depends_on(context), lambda workspace: step.make(context, workspace)
    )
    with reading(folder):
        outcome = step.read(context, folder)
    step.tell(context, outcome)
    return outcome
