"""The lm-eval tasks of a run: the stock definitions, over the hub's records or over JSON-lines files of the user's.

Prompts, choices, metrics and filters are those of lm-eval's own task of that name. Where `paths.data_dir` is set, the
tasks of `LOCAL_SETS` take their records from `<data_dir>/<folder>/<file>` instead of the hub; all others are as ever.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import lru_cache
from itertools import dropwhile
from pathlib import Path
from typing import Any

from cushion.config import EvalConfig, PathsConfig, QuantizerConfig
from cushion.errors import ConfigError, DataError
from cushion.hashing import digest
from cushion.models import LanguageModel
from cushion.sources import read_lines, read_records, wikitext_articles

PAPER_TASKS = ("lambada_openai", "hellaswag", "piqa", "winogrande", "openbookqa", "rte", "copa")
"""The seven zero-shot tasks whose mean CushionCache reports (arXiv 2406.12016, Table 2)."""

BATCH_SIZE = 8
"""Requests per forward pass where `eval.task_batch_size` names none and the quantizer allows several."""

GENERATED_TOKENS = 256
"""What lm-eval lets a task generate that does not say how much."""

FEW_SHOT_SEED = 1234
"""lm-eval's own seed for the draw of examples."""


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


_MMLU = LocalSet(
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


@dataclass(frozen=True, eq=False)
class EvaluationTask:
    """One lm-eval task, ready to run.

    Args:
        name: lm-eval's name.
        task: lm-eval's object; its type is lm-eval's.
        identity: hash of its definition and of the records it will be asked: its part in every cache key.
        origin: the file or the set on the hub that the records come from.
        prepared: whether the definition's `process_docs` was taken to have been applied to the records already.

    """

    name: str
    task: Any
    identity: str
    origin: str
    prepared: bool = False


@dataclass(frozen=True)
class TaskGroup:
    """A group of tasks (such as `mmlu_stem`) and whether its mean weighs tasks by their number of records."""

    name: str
    tasks: tuple[str, ...]
    weighted: bool


@dataclass(frozen=True)
class TaskSet:
    """All that `eval.tasks` stands for: `asked` as the user wrote it, groups taken apart into `tasks`."""

    asked: tuple[str, ...]
    tasks: dict[str, EvaluationTask]
    groups: dict[str, TaskGroup]

    def members(self, name: str) -> tuple[str, ...]:
        """The tasks that an entry of `asked` stands for."""
        return self.groups[name].tasks if name in self.groups else (name,)

    @property
    def in_mean(self) -> tuple[str, ...]:
        """The entries that the mean is over: those asked for that are no part of another, as `mmlu_stem` is."""
        members = {name: set(self.members(name)) for name in self.asked}
        return tuple(name for name in self.asked if not any(members[name] < other for other in members.values()))


def local_task_files(config: EvalConfig, paths: PathsConfig) -> list[Path]:
    """The files below `paths.data_dir` that a run with tasks may read, present or not."""
    if paths.data_dir is None or not config.tasks:
        return []
    root = Path(paths.data_dir).expanduser()
    return sorted(root / one.folder / file for one in (*LOCAL_SETS.values(), _MMLU) for _, file in one.files)


def own_task_files(config: EvalConfig) -> list[Path]:
    """Every file below `eval.include_path`: definitions, functions that they use, and records beside them."""
    if config.include_path is None:
        return []
    root = Path(config.include_path).expanduser()
    return sorted(path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def _text(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load_tasks(config: EvalConfig, paths: PathsConfig) -> TaskSet:
    """Find the tasks of `eval.tasks` and their records.

    Raises:
        ConfigError: no task, group or tag of that name, or no such `eval.include_path`.
        DataError: a local file is missing or damaged (the file and line are named), or the hub does not answer.

    """
    if not config.tasks:
        return TaskSet((), {}, {})
    manager = _task_manager(_include_path(config))
    tasks: dict[str, EvaluationTask] = {}
    groups: dict[str, TaskGroup] = {}
    for name in config.tasks:
        if name not in manager.task_index:
            near = ", ".join(get_close_matches(name, manager.all_tasks, n=5)) or "none"
            raise ConfigError(
                f"eval.tasks names {name!r}, which is no task, group or tag of lm-eval; near names: {near} "
                "(`lm-eval ls tasks` lists all, eval.include_path adds a folder of yours)"
            )
        members = dict(_load(manager, name, config, paths))
        tasks |= members
        if list(members) != [name]:
            groups[name] = TaskGroup(name, tuple(members), _is_weighted(manager, name))
    return TaskSet(tuple(config.tasks), tasks, groups)


def _include_path(config: EvalConfig) -> str | None:
    if config.include_path is None:
        return None
    folder = Path(config.include_path).expanduser()
    if not folder.is_dir():
        raise ConfigError(
            f"eval.include_path={config.include_path!r} is no folder: name one that holds task YAML files"
        )
    return str(folder)


@lru_cache(maxsize=4)
def _task_manager(include_path: str | None) -> Any:
    """lm-eval's index of all tasks; kept, because reading its thousands of files takes seconds."""
    from lm_eval.tasks import TaskManager  # slow to import, and not needed without tasks

    return TaskManager(include_path=include_path)


def _load(manager: Any, name: str, config: EvalConfig, paths: PathsConfig) -> Iterator[tuple[str, EvaluationTask]]:
    leaves = _leaves(manager, name)
    sets = {leaf: _local_set(manager, leaf, config) for leaf in leaves}
    if paths.data_dir is not None and leaves and all(sets.values()):
        for leaf in leaves:
            local = sets[leaf]
            assert local is not None
            yield leaf, _local_task(manager, leaf, local, Path(paths.data_dir).expanduser(), config)
        return
    try:
        loaded = manager.load([name])["tasks"]
    except ImportError as error:
        raise ConfigError(f"eval.tasks={name} needs a package that is not installed ({error}): install it") from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"the records of eval.tasks={name} cannot be read: {reason} -- check the network, or set paths.data_dir to "
            f"a folder that holds them (it can hold {', '.join(LOCAL_SETS)} and mmlu)"
        ) from error
    for leaf, task in loaded.items():
        origin = f"hub:{task.DATASET_PATH}/{task.DATASET_NAME or ''}".rstrip("/")
        yield leaf, _finished(leaf, task, origin, config)


def _local_set(manager: Any, name: str, config: EvalConfig) -> LocalSet | None:
    """MMLU's records serve every task that is defined over them; the other sets serve the stock task of their name."""
    own = _include_path(config)
    if own is not None and Path(own).resolve() in Path(manager.task_index[name].yaml_path or "/").resolve().parents:
        return None  # a task of the user's brings its own records
    return _MMLU if manager.task_index[name].cfg.get("dataset_path") == "cais/mmlu" else LOCAL_SETS.get(name)


def _leaves(manager: Any, name: str) -> list[str]:
    """The single tasks below a group or a tag, by the index alone; empty where a group defines tasks of its own."""
    entry = manager.task_index[name]
    if entry.kind.name == "TAG":
        return [leaf for tagged in sorted(entry.tags) for leaf in _leaves(manager, tagged)]
    if entry.kind.name != "GROUP":
        return [name]
    members = entry.cfg.get("task", [])
    if not all(isinstance(member, str) and member in manager.task_index for member in members):
        return []
    return [leaf for member in members for leaf in _leaves(manager, member)]


def _is_weighted(manager: Any, name: str) -> bool:
    """Whether a group's mean weighs its tasks by size (lm-eval's `weight_by_size`); a tag has no mean of its own."""
    entry = manager.task_index[name]
    metrics = (entry.cfg or {}).get("aggregate_metric_list") or [{}] if entry.kind.name == "GROUP" else [{}]
    return bool(metrics[0].get("weight_by_size", True))


def _local_task(manager: Any, name: str, local: LocalSet, root: Path, config: EvalConfig) -> EvaluationTask:
    """The stock task over local records: only where the records come from is replaced in its definition."""
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
    _check_records(task, path, lines[asked])
    origin = ", ".join(str((root / local.folder / file).resolve()) for _, file in local.files)
    return replace(_finished(name, task, origin, config), prepared=processed)


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


def _check_records(task: Any, path: Path, lines: list[int]) -> None:
    """Raise `DataError` for a record of which the definition cannot make a request, with its line."""
    for number, record in enumerate(task.eval_docs):
        try:
            text, target = task.doc_to_text(record), task.doc_to_target(record)
            if task.OUTPUT_TYPE == "multiple_choice":
                choices = task.doc_to_choice(record)
                gold = text if isinstance(text, int) else target  # WinoGrande's choices are contexts
                known = 0 <= gold < len(choices) if isinstance(gold, int) else gold in choices
                if not known:
                    raise ValueError(f"its answer {gold!r} is none of its {len(choices)} choices")
            elif not text and not str(target).strip():
                raise ValueError("it is empty")
        except Exception as error:  # whatever a template or a function of a definition raises
            line = lines[number] if lines else number + 1
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(
                f"{path}, line {line}: {task.task_name} of lm-eval cannot make a request of this record: {reason}"
            ) from error


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


def _finished(name: str, task: Any, origin: str, config: EvalConfig) -> EvaluationTask:
    """Set what lm-eval's own runner sets on a task before it asks its requests, and hash what they depend on."""
    shots = config.shots
    if shots and task.get_config("num_fewshot") == 0:
        raise ConfigError(
            f"eval.shots={shots}: {name} is defined without examples; leave it out or set eval.shots=null"
        )
    if shots is not None and task.get_config("num_fewshot") != 0:
        task.set_config(key="num_fewshot", value=shots)
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=FEW_SHOT_SEED)
    definition = {key: value for key, value in task.dump_config().items() if key not in ("metadata", "custom_dataset")}
    records = list(task.eval_docs)[: config.limit]
    wanted = int(task.get_config("num_fewshot"))
    examples = list(task.fewshot_docs()) if wanted else []
    if wanted > len(examples):
        raise ConfigError(f"eval.shots={wanted} is more than the {len(examples)} examples that {name} has: lower it")
    own = [] if config.include_path is None else [_text(path) for path in own_task_files(config)]
    identity = digest(json.loads(json.dumps([definition, task.VERSION, records, examples, own], default=str)))
    return EvaluationTask(name, task, identity, origin)


def task_batch_size(config: EvalConfig, quantizer: QuantizerConfig | None) -> int:
    """Requests per forward pass: as configured, else one where a dynamic per-tensor range would span a batch.

    A dynamic per-tensor range is that of the whole batch: other requests and padding would decide a request's scale.
    """
    if config.task_batch_size is not None:
        return config.task_batch_size
    return 1 if quantizer is not None and quantizer.spans_batch else BATCH_SIZE


def check_tasks(
    lm: LanguageModel, config: EvalConfig, tasks: TaskSet, quantizer: QuantizerConfig, prefix_length: int
) -> None:
    """Refuse what cannot be evaluated right: no room behind the prefix, or scales that would span a batch.

    Raises:
        ConfigError: names the key.

    """
    if not config.tasks:
        return
    if lm.context_length is not None and lm.context_length - prefix_length < 2:
        raise ConfigError(
            f"a prefix of up to {prefix_length} tokens leaves no room for the context of eval.tasks in the "
            f"{lm.context_length} positions of {lm.label}: shorten the prefix"
        )
    for name, one in tasks.tasks.items():
        if getattr(one.task, "UNSAFE_CODE", False) or getattr(one.task, "MULTIMODAL", False):
            kind = "runs code that the model writes" if getattr(one.task, "UNSAFE_CODE", False) else "shows images"
            raise ConfigError(f"eval.tasks={name} {kind}, which is not supported: leave it out")
        if lm.context_length is None or one.task.OUTPUT_TYPE != "generate_until":
            continue
        given = one.task.get_config("generation_kwargs") or {}
        keys = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
        generated = next((int(given[key]) for key in keys if given.get(key) is not None), GENERATED_TOKENS)
        if lm.context_length - prefix_length - generated < 1:
            raise ConfigError(
                f"eval.tasks={name} generates up to {generated} tokens, and behind a prefix of up to {prefix_length} "
                f"no room is left for its context in the {lm.context_length} positions of {lm.label}: "
                "shorten the prefix"
            )
    if (config.task_batch_size or 1) > 1 and quantizer.spans_batch:
        raise ConfigError(
            f"eval.task_batch_size={config.task_batch_size} with quantizer={quantizer.name}: one dynamic range per "
            "tensor would span all requests of a batch and their padding; set eval.task_batch_size=1 or null"
        )


@contextmanager
def silenced(name: str) -> Iterator[None]:
    """Keep a logger of lm-eval's from warning of what is meant as it is."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
