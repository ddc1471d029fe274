"""Progress bars with the time left, drawn from a run's events."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm

from cushion.events import Event, Progress


class ProgressBars:
    """One bar at a time, on standard error; use it as a context manager so that the last one is closed."""

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._stage = ""

    def __call__(self, event: Event) -> None:
        """Move the bar of the event's stage, starting a new one when the stage is new."""
        if not isinstance(event, Progress):
            return
        if self._bar is None or event.stage != self._stage:
            self.close()
            self._stage = event.stage
            # what an interrupted run had done already counts as done, but not for the speed
            initial = event.done - 1 if event.done > 0 else 0
            self._bar = tqdm(
                total=event.total,
                desc=event.stage,
                unit=event.unit,
                initial=initial,
                file=sys.stderr,
                dynamic_ncols=True,
            )
        self._bar.update(event.done - self._bar.n)
        if event.done >= event.total:
            self.close()

    def close(self) -> None:
        """Finish the bar that is open."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> ProgressBars:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
