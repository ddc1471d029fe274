"""The cached search of a rule that reads the prefix off the token scales of the search text."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from cushion.artifacts import Workspace, read_json, write_json
from cushion.config import SearchConfig
from cushion.hashing import tensor_digest
from cushion.prefix import Prefix
from cushion.search.scan import Scanned
from cushion.step import Context, Step


@dataclass(frozen=True, eq=False)
class RuleSearch(Step[tuple[dict[str, Any], Prefix]]):
    """A rule's search: its record as plain data, and the prefix found (empty where nothing was).

    A subclass names the `record` type that its search ends with, and the keys of `search` that it `reads`.

    Args:
        config: the search.
        texts: token ids, (texts, tokens).

    """

    record: ClassVar[type[Any]]
    reads: ClassVar[tuple[str, ...]]
    config: SearchConfig
    texts: Tensor

    @abstractmethod
    def find(self, context: Context) -> Iterator[Any]:
        """Run the search: yields `Scanned`, and at the end the record, which has `token_ids`."""

    def key(self, context: Context) -> dict[str, Any]:
        """The keys that the rule reads, and the texts."""
        return {
            "config": {key: getattr(self.config, key) for key in self.reads},
            "texts": tensor_digest([self.texts]),
        }

    def make(self, context: Context, workspace: Workspace) -> None:
        """Run the rule; the prefix is stored to the bit."""
        for event in self.find(context):
            if isinstance(event, Scanned):
                context.progress(f"{self.name}, {event.unit}s", event.done, event.total, event.unit)
            else:
                write_json(workspace.folder / "search.json", asdict(event))
                if event.token_ids:
                    Prefix.from_tokens(context.lm.model, event.token_ids).save(workspace.folder / "prefix")

    def read(self, context: Context, folder: Path) -> tuple[dict[str, Any], Prefix]:
        """The record and the prefix."""
        stored = read_json(folder / "search.json")
        record = {field.name: stored[field.name] for field in fields(self.record)}
        return record, Prefix.load(folder / "prefix") if record["token_ids"] else Prefix.empty()
