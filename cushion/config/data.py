"""Group `data`: where the text for each purpose comes from."""

from __future__ import annotations

from dataclasses import dataclass, field

from cushion.checks import check_name, check_values, one_of, require

SOURCES = ("embedded", "wikitext2", "c4", "file")
SPLITS = ("train", "validation", "test")


@dataclass
class CorpusConfig:
    """Where the text for one purpose comes from: a named set, or a text or JSON-lines file of the user's."""

    source: str = "embedded"
    """Which set

    Allowed: `embedded`, `wikitext2`, `c4`, `file`
    """
    split: str = "train"
    """Split of `wikitext2` or `c4`

    Allowed: `train`, `validation`, `test`
    """
    path: str | None = None
    """The file, with `source=file` only

    Allowed: text, null
    """
    text_field: str = "text"
    """Field of a record, or column of a table, that holds the text

    Allowed: text
    """


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
    """Further corpora for perplexity, by the name they get in results: `'++data.further={c4: {source: c4, split:
    validation}}'`

    Allowed: names with `source`, `split`, `path`, `text_field` each
    """
    path: str | None = None
    """The one file of `data=file`, which hands it to all four purposes

    Allowed: text, null
    """

    def __post_init__(self) -> None:
        check_values("data", self)
        for name in self.further:
            named = bool(name) and all(c.isalnum() or c in "._-" for c in name)
            require(named, "data.further", name, "a corpus is named with letters, digits, '.', '_' and '-'")
            check_name("data.further", name)
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
