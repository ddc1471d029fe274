"""The lm-eval tasks of a run: the stock definitions, over the hub's records or over JSON-lines files of the user's.

Prompts, choices, metrics and filters are those of lm-eval's own task of that name. Where `paths.data_dir` is set, the
tasks of `LOCAL_SETS` take their records from `<data_dir>/<folder>/<file>` instead of the hub; all others are as ever.

## Accuracy on tasks

Requests, choices, filters and metrics are lm-eval's. Its Hugging Face model class is asked, with three overrides: the
forward pass starts from a fresh copy of the prefix, generation does so too, and the context is shorter by the prefix.
Without a prefix and a quantizer every log-likelihood equals that of lm-eval itself; with a prefix of tokens it equals
lm-eval's with these tokens in front of every context. Both are tested.

With one dynamic range per tensor, requests are asked one by one. The standard error of an accuracy is lm-eval's; that
of the mean takes the tasks as independent: sqrt(sum of squares) / number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from typing import Any

from cushion.config import EvalConfig, PathsConfig
from cushion.errors import ConfigError, DataError
from cushion.evaluation.lasting import lasting
from cushion.evaluation.local_tasks import LOCAL_SETS, MMLU, LocalSet, check_requests, local_task
from cushion.hashing import digest, file_digest

PAPER_TASKS = ("lambada_openai", "hellaswag", "piqa", "winogrande", "openbookqa", "rte", "copa")
"""The seven zero-shot tasks whose mean CushionCache reports (arXiv 2406.12016, Table 2)."""

FEW_SHOT_SEED = 1234
"""lm-eval's own seed for the draw of examples."""


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


def records_asked(limit: float | None, count: int) -> int:
    """How many of a task's `count` records are asked: `limit`, or that share of them where it is below 1, rounded up.

    As lm-eval's `--limit` has it.
    """
    if limit is None:
        return count
    return min(count, math.ceil(count * limit) if limit < 1 else int(limit))


def own_task_files(config: EvalConfig) -> list[Path]:
    """Every file below `eval.include_path`: definitions, functions that they use, and records beside them."""
    if config.include_path is None:
        return []
    root = Path(config.include_path).expanduser()
    return sorted(path for path in root.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


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
            _check_yaml(config)
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
            found = local_task(manager, leaf, local, Path(paths.data_dir).expanduser(), config)
            yield leaf, _finished(leaf, found.task, found.origin, config, found.prepared)
        return
    from lm_eval.api.task import ConfigurableTask

    try:
        loaded = manager.load([name])["tasks"]
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        if any(_is_own(manager, leaf, config) for leaf in leaves or [name]) and not isinstance(error, OSError):
            raise ConfigError(
                f"eval.tasks={name}: lm-eval cannot make this task of its file below eval.include_path "
                f"({type(error).__name__}: {reason}): mend it there"
            ) from error
        if isinstance(error, ImportError):
            raise ConfigError(
                f"eval.tasks={name} needs a package that is not installed ({error}): install it"
            ) from error
        if not isinstance(error, (OSError, ValueError, RuntimeError)):
            raise
        raise DataError(
            f"the records of eval.tasks={name} cannot be read: {reason} -- check the network, or set paths.data_dir to "
            f"a folder that holds them (it can hold {', '.join(LOCAL_SETS)} and mmlu)"
        ) from error
    for leaf, task in loaded.items():
        origin = f"hub:{task.DATASET_PATH}/{task.DATASET_NAME or ''}".rstrip("/")
        is_own = leaf in manager.task_index and _is_own(manager, leaf, config)
        # a class of the user's may ask what it likes
        yield leaf, _finished(leaf, task, origin, config, checked=is_own and type(task) is ConfigurableTask)


def _check_yaml(config: EvalConfig) -> None:
    """Raise `ConfigError` for a file of the user's that lm-eval cannot read: it leaves it out of its index silently."""
    from lm_eval.tasks._yaml_loader import load_yaml

    for path in own_task_files(config):
        if path.suffix == ".yaml":
            try:
                load_yaml(path, resolve_func=False)
            except Exception as error:
                reason = " ".join(str(error).split())
                raise ConfigError(
                    f"eval.include_path: lm-eval cannot read {path}, so its task is not known: {reason}"
                ) from error


def _is_own(manager: Any, name: str, config: EvalConfig) -> bool:
    """Whether a task is defined below `eval.include_path`."""
    own, file = _include_path(config), manager.task_index[name].yaml_path
    return own is not None and Path(own).resolve() in Path(file or "/").resolve().parents


def _local_set(manager: Any, name: str, config: EvalConfig) -> LocalSet | None:
    """MMLU's records serve every task that is defined over them; the other sets serve the stock task of their name."""
    if _is_own(manager, name, config):
        return None  # a task of the user's brings its own records
    return MMLU if manager.task_index[name].cfg.get("dataset_path") == "cais/mmlu" else LOCAL_SETS.get(name)


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


def _finished(
    name: str, task: Any, origin: str, config: EvalConfig, prepared: bool = False, checked: bool = False
) -> EvaluationTask:
    """Set what lm-eval's own runner sets on a task before it asks its requests, and hash what they depend on.

    With `checked`, records of which no request can be made are refused.
    """
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
    definition = task.config.to_dict(keep_callable=True)
    definition = {key: value for key, value in definition.items() if key not in ("metadata", "custom_dataset")}
    records = list(task.eval_docs)
    records = records[: records_asked(config.limit, len(records))]
    if checked:
        check_requests(task, records, lambda number: f"eval.tasks={name}, record {number + 1}")
    wanted = int(task.get_config("num_fewshot"))
    examples = list(task.fewshot_docs()) if wanted else []
    if wanted > len(examples):
        raise ConfigError(f"eval.shots={wanted} is more than the {len(examples)} examples that {name} has: lower it")
    own = [] if config.include_path is None else [file_digest(path) for path in own_task_files(config)]
    identity = digest(lasting([definition, task.VERSION, records, examples, own], name))
    return EvaluationTask(name, task, identity, origin, prepared)
