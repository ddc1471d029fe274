"""Tasks over JSON-lines files of the user's: which there are, how the files are read, and lm-eval's task over them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from typing import Any

from cushion.config import EvalConfig, PathsConfig
from cushion.errors import DataError
from cushion.evaluation.lm_eval_log import silenced
from cushion.sources import wikitext_articles
from cushion.text_files import read_lines, read_records


@dataclass(frozen=True)
class LocalSet:
    """Where a task's records are below `paths.data_dir`, and what every record must have.

    Args:
        folder: below the data folder.
        files: file name by split.
        fields: keys of a record as the hub has it, which lm-eval's definition reads.
        processed: keys of a record that the definition's `process_docs` has been applied to already; it is taken as it
            is only where it lacks some of `fields`.
        subject: the key that picks the records of one task out of a file for many, by the task's `dataset_name`.

    """

    folder: str
    files: tuple[tuple[str, str], ...]
    fields: tuple[str, ...]
    processed: tuple[str, ...] | None = None
    subject: str | None = None


MMLU = LocalSet(
    "mmlu",
    (("test", "test.jsonl"), ("dev", "dev.jsonl")),
    ("subject", "question", "choices", "answer"),
    None,
    "subject",
)
_CHOICES = ("choices", "answerKey")
LOCAL_SETS = {
    "lambada_openai": LocalSet("lambada_openai", (("test", "lambada_test.jsonl"),), ("text",)),
    "hellaswag": LocalSet(
        "hellaswag",
        (("validation", "validation.jsonl"),),
        ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
        processed=("query", "choices", "label"),
    ),
    "piqa": LocalSet("piqa", (("validation", "validation.jsonl"),), ("goal", "sol1", "sol2", "label")),
    "winogrande": LocalSet(
        "winogrande", (("validation", "validation.jsonl"),), ("sentence", "option1", "option2", "answer")
    ),
    "openbookqa": LocalSet("openbookqa", (("test", "test.jsonl"),), ("question_stem", *_CHOICES)),
    "rte": LocalSet("rte", (("validation", "validation.jsonl"),), ("sentence1", "sentence2", "label")),
    "copa": LocalSet(
        "copa", (("validation", "validation.jsonl"),), ("premise", "choice1", "choice2", "question", "label")
    ),
    "arc_challenge": LocalSet("arc_challenge", (("test", "test.jsonl"),), ("question", *_CHOICES)),
    "wikitext": LocalSet("wikitext2_raw", (("test", "wiki.test.raw"),), ()),  # the published file, cut into articles
}


def local_task_files(config: EvalConfig, paths: PathsConfig) -> list[Path]:
    """The files below `paths.data_dir` that a run with tasks may read, present or not."""
    if paths.data_dir is None or not config.tasks:
        return []
    root = Path(paths.data_dir).expanduser()
    return sorted(root / one.folder / file for one in (*LOCAL_SETS.values(), MMLU) for _, file in one.files)


@dataclass(frozen=True, eq=False)
class LocalTask:
    """lm-eval's task over local records.

    Args:
        task: lm-eval's object.
        origin: the files that the records come from.
        prepared: whether the definition's `process_docs` was taken to have been applied to the records already.

    """

    task: Any
    origin: str
    prepared: bool


def local_task(manager: Any, name: str, local: LocalSet, root: Path, config: EvalConfig) -> LocalTask:
    """The stock task over local records: only where the records come from is replaced in its definition.

    Raises:
        DataError: a file is missing or damaged, or has no examples where some are asked for.

    """
    if not root.is_dir():
        raise DataError(f"paths.data_dir={str(root)!r} is not a folder: check the path")
    records: dict[str, list[dict[str, Any]]] = {}
    lines: dict[str, list[int]] = {}
    processed = False
    definition = manager.task_index[name].cfg
    subject = definition.get("dataset_name") if local.subject else None
    for split, file in local.files:
        path = root / local.folder / file
        records[split], lines[split], processed = _read(path, local, subject)
    overrides: dict[str, Any] = {"task": name}
    if processed:
        overrides["process_docs"] = None
    for key in ("training_split", "validation_split", "test_split"):
        if definition.get(key) not in records:  # lm-eval reads every split that a definition names
            overrides[key] = None
    _check_examples(name, definition, set(records), root / local.folder, config)
    asked = definition.get("test_split") or definition.get("validation_split")
    path = root / local.folder / dict(local.files)[asked]
    task = _stock(manager, overrides, name, records, asked, path, lines[asked])

    def place(number: int) -> str:
        return f"{path}, line {lines[asked][number] if lines[asked] else number + 1}"

    check_requests(task, task.eval_docs, place)
    origin = ", ".join(os.path.realpath(root / local.folder / file) for _, file in local.files)
    return LocalTask(task, origin, processed)


def _stock(
    manager: Any,
    overrides: dict[str, Any],
    name: str,
    records: dict[str, list[dict[str, Any]]],
    split: str,
    path: Path,
    lines: list[int],
) -> Any:
    """lm-eval's task with some of its definition replaced.

    Raises:
        DataError: it cannot prepare a record of `split`; the first such record's line is named.

    """

    def load(count: int) -> Any:
        given = {**records, split: records[split][:count]}
        # a group of our own is lm-eval's way to load a task of its index with changes
        spec = {"group": "cushion_local", "task": [{**overrides, "custom_dataset": _give(name, given)}]}
        with silenced("lm_eval.api.task"):  # it warns that the records come from a function
            return manager.load([spec])["tasks"][name]

    try:
        return load(len(records[split]))
    except Exception as error:
        good, bad = 0, len(records[split])  # it takes the first `good` records, and not the first `bad`
        while bad - good > 1:
            middle = (good + bad) // 2
            try:
                load(middle)
            except Exception:  # noqa: BLE001 - whatever it raised before; the first record with it is looked for
                bad = middle
            else:
                good = middle
        line = lines[bad - 1] if lines else bad
        raise DataError(f"{path}, line {line}: {name} of lm-eval cannot prepare this record: {error}") from error


def check_requests(task: Any, records: Iterable[dict[str, Any]], place: Callable[[int], str]) -> None:
    """Raise `DataError` for a record of which the definition cannot make a request.

    Args:
        task: lm-eval's object.
        records: those to look at.
        place: where the record of a number, from 0 on, is.

    """
    for number, record in enumerate(records):
        try:
            text, target = task.doc_to_text(record), task.doc_to_target(record)
            if task.config.process_results is not None:  # which scores without lm-eval's rules
                continue
            if task.OUTPUT_TYPE == "multiple_choice":
                choices = task.doc_to_choice(record)
                gold = text if task.multiple_input else target  # WinoGrande's choices are contexts
                if not _is_answer(gold, choices):
                    raise ValueError(f"its answer {gold!r} is none of its {len(choices)} choices")
            elif not text and not str(target).strip():
                raise ValueError("it is empty")
        except Exception as error:  # whatever a template or a function of a definition raises
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{place(number)}: {task.task_name} of lm-eval cannot make a request of this record: {reason}"
            ) from error


def _is_answer(gold: Any, choices: list[str]) -> bool:
    """Whether lm-eval can score by it: the number of a choice, a choice, or a list of numbers."""
    if isinstance(gold, str):
        return gold in choices
    several = gold if isinstance(gold, list) else [gold]
    return all(isinstance(one, int) and 0 <= one < len(choices) for one in several)


def _check_examples(name: str, definition: dict[str, Any], splits: set[str], folder: Path, config: EvalConfig) -> None:
    """Refuse examples from another split than the stock task's, which is what lm-eval falls back to."""
    shots = definition.get("num_fewshot") if config.shots is None else config.shots
    keys = ("fewshot_split", "training_split", "validation_split", "test_split")
    split = next(definition[key] for key in keys if definition.get(key))
    if shots and split not in splits:
        raise DataError(
            f"eval.shots={shots}: lm-eval takes the examples of {name} from the split {split!r}, which {folder} is not "
            "read for; set eval.shots=0, or leave paths.data_dir out and use the hub"
        )


def _give(name: str, records: dict[str, list[dict[str, Any]]]) -> Callable[..., Any]:
    def dataset(**_metadata: Any) -> Any:
        import datasets  # slow to import, and not needed without tasks

        return datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in records.items()})

    dataset.__name__ = f"local_{name}"
    return dataset


def _read(path: Path, local: LocalSet, subject: str | None) -> tuple[list[dict[str, Any]], list[int], bool]:
    """The records of one file, their lines, and whether they are in the form that `process_docs` makes."""
    if path.suffix != ".jsonl":
        from_first = dropwhile(lambda line: not line.strip(), read_lines(path))
        return [{"page": article} for article in wikitext_articles(from_first, "\n")], [], False
    records = list(read_records(path))
    if local.subject is not None:
        for line, record in records:
            _check_fields(path, line, record, local.fields)
        records = [(line, record) for line, record in records if record.get(local.subject) == subject]
    if not records:
        what = f" with {local.subject}={subject!r}" if local.subject else ""
        raise DataError(f"{path} holds no record{what}: check the file")
    first, fields = set(records[0][1]), local.fields
    if local.processed is not None and set(local.processed) <= first and not set(fields) <= first:
        fields = local.processed
    kinds: dict[str, type] = {}
    for line, record in records:
        _check_fields(path, line, record, fields)
        for field in fields:
            kind = kinds.setdefault(field, type(record[field]))
            if type(record[field]) is not kind:
                raise DataError(
                    f"{path} line {line}: the field {field!r} is {type(record[field]).__name__}, and {kind.__name__} "
                    "in the records before it"
                )
    return [record for _, record in records], [line for line, _ in records], fields is local.processed


def _check_fields(path: Path, line: int, record: dict[str, Any], fields: tuple[str, ...]) -> None:
    missing = [field for field in fields if field not in record]
    if missing:
        raise DataError(f"{path} line {line} has no field {', '.join(map(repr, missing))}, only {sorted(record)}")
