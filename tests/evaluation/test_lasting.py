"""What stands in a task's identity is the same in every process, and another where what is asked is another."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tiny_tasks import few_tasks

from cushion.config import EvalConfig, PathsConfig
from cushion.errors import DataError
from cushion.evaluation import tasks
from cushion.evaluation.lasting import lasting
from cushion.evaluation.tasks import load_tasks

UTILS = """
from functools import partial

def asked(record, mark):
    return record["question"] + mark

class Metric:
    def __init__(self, power):
        self.power = power
    def __call__(self, items):
        return items[0] ** self.power

ask = partial(asked, mark="{mark}")
example = partial(asked, mark="!")
"""
TASK = """
task: partial_task
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/records.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: !function utils.ask
doc_to_choice: ["a", "b"]
doc_to_target: answer
fewshot_config: {{sampler: first_n, doc_to_text: !function utils.example}}
metric_list: [{{metric: acc}}]
"""


def identity(folder: Path, mark: str = "?") -> str:
    folder.mkdir(exist_ok=True)
    (folder / "records.jsonl").write_text('{"question": "one", "answer": 0}\n')
    (folder / "utils.py").write_text(UTILS.format(mark=mark))
    (folder / "partial_task.yaml").write_text(TASK.format(folder=folder))
    config = EvalConfig(tasks=["partial_task"], include_path=str(folder))
    return load_tasks(config, PathsConfig()).tasks["partial_task"].identity


def test_a_task_made_by_a_partial_is_the_same_one_when_it_is_loaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "_task_manager", few_tasks.__wrapped__)  # an index made anew, with functions made anew
    first = identity(tmp_path / "one")
    assert identity(tmp_path / "one") == first
    assert identity(tmp_path / "two", mark=".") != first


def _plain(record: dict[str, Any]) -> str:
    return str(record)


class _Power:
    def __init__(self, power: Any) -> None:
        self.power = power


def test_functions_partials_methods_and_objects_hold_no_address_and_differ_where_they_do() -> None:
    kinds: list[tuple[Any, Any, Any]] = [  # twice the same, and another
        (partial(_plain, x=1), partial(_plain, x=1), partial(_plain, x=2)),
        (partial(_plain, 1), partial(_plain, 1), partial(repr, 1)),
        (_Power(2), _Power(2), _Power(3)),
        (_Power(_Power(2)).power, _Power(_Power(2)).power, _Power(_Power(1)).power),
        ({"a": [partial(len)]}, {"a": [partial(len)]}, {"a": [partial(max)]}),
        (_Power(1).__init__, _Power(1).__init__, _Power(2).__init__),  # type: ignore[misc]
        (Path("a"), Path("a"), Path("b")),
        ({"b", "a"}, {"a", "b"}, {"a"}),
    ]
    for first, again, other in kinds:
        assert lasting(first, "x") == lasting(again, "x") != lasting(other, "x")
        assert not re.search("at 0x", repr(lasting(first, "x")))


def test_another_process_gives_the_same() -> None:
    made = "from functools import partial; from json import dumps; from cushion.evaluation.lasting import lasting"
    command = f"{made}; print(repr(lasting([partial(dumps, indent=2), dumps], 'x')))"
    told = {subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
            for _ in range(2)}  # fmt: skip
    assert len(told) == 1


def test_what_nothing_but_an_address_tells_apart_is_refused_with_its_place() -> None:
    with pytest.raises(DataError, match=r"copa\.metric_list\[1\]\.aggregation holds a builtins.object, which nothing"):
        lasting({"metric_list": [1, {"aggregation": object()}]}, "copa")
