"""The cached score of a row on one lm-eval task."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cushion.artifacts import Workspace, read_json, write_json
from cushion.config import EvalConfig
from cushion.evaluation.task_scores import TaskScore, record_values, score
from cushion.evaluation.tasks import EvaluationTask
from cushion.quantization.lazily import QuantizedLazily
from cushion.step import Context, Step

if TYPE_CHECKING:
    from cushion.evaluation.harness import PrefixedModel


@cache
def _version() -> str:
    """That of lm-eval, whose metadata take a while to read."""
    return version("lm_eval")


@dataclass(frozen=True)
class AskedTask:
    """The score of a task, its metric on each record (empty where the score is no mean of these), and the seconds."""

    score: TaskScore
    records: tuple[float, ...]
    seconds: float


@dataclass(frozen=True, eq=False)
class TaskStep(Step[AskedTask]):
    """What a task gave.

    Args:
        model: with its prefix and quantizer.
        asked: the same model as lm-eval asks it.
        config: limit, examples and BOS policy.
        task: the task.
        batch_size: requests per forward pass; `auto` for as many as fit.
        samples: folder for lm-eval's record of every sample, a JSON-lines file of the task's name; None for none.

    """

    name = "tasks"
    """Files: `task.json` (with the metric of each record), and `samples.jsonl` with `eval.samples`
    Key: `prefix`, `quantizer`, `task`, `config.limit`, `config.shots`, `config.bos`, `config.batch_size`,
        `config.chat_template`, `config.system_instruction`, `config.fewshot_as_multiturn`, `lm_eval`, `tokenizer`,
        `samples`
    Of that: the task's name, definition and records, with files of `eval.include_path`; the version of lm-eval;
        whether samples are kept; the template, with a chat that it writes
    """
    model: QuantizedLazily
    asked: PrefixedModel
    config: EvalConfig
    task: EvaluationTask
    batch_size: int | str
    samples: Path | None

    def key(self, context: Context) -> dict[str, Any]:
        """Prefix, quantizer, definition and records of the task, how it is asked, tokenizer and version of lm-eval.

        How it is asked: examples, BOS, requests per forward pass, chat template, system instruction.
        """
        config = self.config
        return {
            **self.model.identity(),
            "task": [self.task.name, self.task.identity],
            "config": {
                "limit": config.limit,
                "shots": config.shots,
                "bos": self.asked.begins_with_bos,
                "batch_size": self.batch_size,
                **self.asked.chat.key(context.lm),
            },
            "lm_eval": _version(),
            "tokenizer": context.lm.tokenizer_fingerprint,
            "samples": self.samples is not None,
        }

    def make(self, context: Context, workspace: Workspace) -> None:
        """Ask everything."""
        from cushion.evaluation.harness import run_task  # slow to import, and not needed without tasks

        started = time.perf_counter()
        self.model.put_on()
        metrics, asked, records = run_task(self.asked, self.task, self.config.limit)
        if self.samples is not None:
            lines = (json.dumps(record, ensure_ascii=False, default=str) for record in records)
            (workspace.folder / "samples.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
        record = {
            "metrics": metrics,
            "samples": asked,
            "truncated": self.asked.truncated,
            "version": str(self.task.task.VERSION),
            "records": record_values(metrics, records),
            "seconds": time.perf_counter() - started,
        }
        write_json(workspace.folder / "task.json", record)

    def read(self, context: Context, folder: Path) -> AskedTask:
        """The score by the configured metric; the samples are copied to where the run keeps them."""
        record = read_json(folder / "task.json")
        samples_asked, truncated = int(record["samples"]), int(record["truncated"])
        found = score(record["metrics"], samples_asked, record["version"], self.config.accuracy, truncated)
        if self.samples is not None:
            self.samples.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / "samples.jsonl", self.samples / f"{self.task.name}.jsonl")
        values = record["records"].get(found.metric, ())
        return AskedTask(found, tuple(map(float, values)), float(record["seconds"]))
