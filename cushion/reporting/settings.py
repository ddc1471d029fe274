"""What the configurations of several runs have in common, in one line of words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from cushion.registry import SEARCH_METHODS
from cushion.reporting.collect import Run
from cushion.reporting.lines import grouped
from cushion.schema import measured_with

Config = dict[str, Any]


def shared_settings(runs: Sequence[Run], numbers: Mapping[Path, int]) -> list[str]:
    """One note: which runs, and the texts, the search, the tuning and the measurements that all have, or `varies`.

    Whether texts begin with BOS is what the policy came to with the run's tokenizer, not the policy.

    A setting that does not apply to a run (the scoring of a run without a search) is not asked of it; one that applies
    to none, or that no configuration has, is left out. No note where nothing is left.
    """
    read_off = {title: [read(run.config) for run in runs] for title, read in _SETTINGS.items()}
    read_off["BOS before every text"] = [_bos(run) for run in runs]
    configurations = grouped((run for run in runs if run.completed), lambda run: run.identity("seed"))
    parts = [
        f"{title} varies"
        for title, of in _PROVENANCE.items()
        if any(of(run) != of(same[0]) for same in configurations for run in same)
    ]
    for title, texts in read_off.items():
        if found := dict.fromkeys(text for text in texts if text is not None):
            parts.append(f"{title} {next(iter(found)) if len(found) == 1 else 'varies'}")
    which = runs_in_words(sorted(numbers[run.path] for run in runs)).capitalize()
    return [f"{which}: {'; '.join(parts)}."] if parts else []


def runs_in_words(numbers: Sequence[int]) -> str:
    """Ascending numbers of runs in words: `run 3`, `runs 2, 4 to 9`."""
    return f"run{'s' if len(numbers) > 1 else ''} {in_spans(numbers)}"


def in_spans(numbers: Sequence[int]) -> str:
    """Ascending numbers in words, those that follow each other as one span: `2, 4 to 9`."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    return ", ".join(f"{span[0]} to {span[-1]}" if len(span) > 2 else ", ".join(map(str, span)) for span in spans)


def numbered(runs: Iterable[Run]) -> dict[Path, int]:
    """The numbers, from 1, by which a report names its runs, by the path of the result."""
    return {run.path: number for number, run in enumerate(runs, start=1)}


_PROVENANCE: dict[str, Callable[[Run], Any]] = {
    "the content of the measured text": lambda run: measured_with(run.record)[1],
    "the model's weights": lambda run: measured_with(run.record)[0],
    "the kind of device": lambda run: run.record["environment"].get("device"),
    "the commit of the code": lambda run: (run.record["environment"].get("git") or {}).get("commit"),
}
"""By title: what is not in a run's configuration. Seeds that differ in it may have unlike numbers for that."""


def _part(config: Config, group: str) -> Config:
    part = config.get(group)
    return part if isinstance(part, dict) else {}


def _source(purpose: str) -> Callable[[Config], str | None]:
    def read(config: Config) -> str | None:
        data = _part(config, "data")
        if _reads_no_text(config, purpose) or not isinstance(data.get(purpose), dict):
            return None
        text = _text(data[purpose])
        if purpose == "evaluation":
            text += "".join(f", {name}: {_text(further)}" for name, further in (data.get("further") or {}).items())
        return text

    return read


def _reads_no_text(config: Config, purpose: str) -> bool:
    """Whether a run has no use for the text of a purpose; a method that is not installed here is taken to have."""
    name = _part(config, purpose).get("method")
    method = SEARCH_METHODS.get(name) if purpose == "search" else None
    return name == "none" if method is None else method.texts is None


def _text(source: Config) -> str:
    """A source of text with its split, or with the file's name."""
    name, split = str(source.get("source")), source.get("split")
    if name == "file":
        return f"file {PurePath(str(source.get('path'))).name}"
    return f"{name} ({split})" if split and name != "embedded" else name


def _calibration(config: Config) -> str | None:
    calibration = _part(config, "quantizer").get("calibration") or {}
    if not {"samples", "length"} <= set(calibration):
        return None
    return f"{calibration['samples']} x {calibration['length']} tokens"


def _of_search(key: str, read: Callable[[Config], str | None]) -> Callable[[Config], str | None]:
    """What `read` reads off a search whose method has an effect of `key`."""

    def of(config: Config) -> str | None:
        search = _part(config, "search")
        method = SEARCH_METHODS.get(search.get("method"))
        return None if method is None or key not in method.reads else read(search)

    return of


def _budget(search: Config) -> str | None:
    if not {"budget_token_forwards", "budget_seconds"} <= set(search):
        return None
    tokens, seconds = search["budget_token_forwards"], search["budget_seconds"]
    limits = [f"{tokens:g} token-forwards"] if tokens is not None else []
    limits += [f"{seconds:g} seconds"] if seconds is not None else []
    return " or ".join(limits) or "none"


def _steps(config: Config) -> str | None:
    tuning = _part(config, "tuning")
    if tuning.get("method", "none") == "none":
        return None
    if tuning.get("steps") is not None:
        return str(tuning["steps"])
    return None if tuning.get("epochs") is None else f"{tuning['epochs']} epochs"


def _blocks(config: Config) -> str | None:
    evaluation = _part(config, "eval")
    if not {"blocks", "block_length"} <= set(evaluation):
        return None
    if not evaluation.get("perplexity", True):
        return "none"
    blocks = "all" if evaluation["blocks"] is None else evaluation["blocks"]
    return f"{evaluation['block_length']} x {blocks} (block_length x blocks)"


def _tasks(config: Config) -> str | None:
    tasks = _part(config, "eval").get("tasks")
    return None if tasks is None else ", ".join(map(str, tasks)) or "none"


def _limit(config: Config) -> str | None:
    evaluation = _part(config, "eval")
    if not evaluation.get("tasks") or "limit" not in evaluation:
        return None
    return "none" if evaluation["limit"] is None else str(evaluation["limit"])


def _chat(config: Config) -> str | None:
    """The chat template of tasks, and the system instruction."""
    evaluation = _part(config, "eval")
    if not evaluation.get("tasks") or "chat_template" not in evaluation:
        return None
    template, system = evaluation["chat_template"], evaluation.get("system_instruction")
    name = "none" if template is False else "default" if template is True else str(template)
    return f"{name}, system instruction {system!r}" if system else name


def _bos(run: Run) -> str | None:
    """Whether BOS stood before every text of a run; None where its result does not say, as of one that failed."""
    found = (run.record.get("evaluation") or {}).get("bos")
    return None if found is None else "yes" if found else "no"


def _execution(config: Config) -> str | None:
    found = config.get("execution")
    return None if found is None else str(found)


def _named(group: str, key: str) -> Callable[[Config], str | None]:
    def read(config: Config) -> str | None:
        value = _part(config, group).get(key)
        return None if value is None else str(value)

    return read


_SETTINGS: dict[str, Callable[[Config], str | None]] = {
    "evaluation text": _source("evaluation"),
    "calibration text": _source("calibration"),
    "calibration": _calibration,
    "search text": _source("search"),
    "tuning text": _source("tuning"),
    "search": _named("search", "name"),
    "search.scoring": _of_search("scoring", lambda search: search.get("scoring")),
    "search budget": _of_search("budget_seconds", _budget),
    "tuning": _named("tuning", "name"),
    "tuning steps": _steps,
    "reconstruction": _named("reconstruction", "name"),
    "execution": _execution,
    "perplexity": _blocks,
    "tasks": _tasks,
    "eval.limit": _limit,
    "eval.chat_template": _chat,
}
"""By title: what reads a setting off a configuration, in words, or None where it does not apply."""
