"""One row of the comparison: perplexity of every corpus and score of every task, each an artifact of its own.

A row that was measured before is read from the cache without the quantizer being put on the model at all; an evaluation
that was killed goes on with the next block, or the next task.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from cushion.artifacts import ArtifactStore, Workspace, read_json, reading, write_json
from cushion.config import EvalConfig
from cushion.evaluation.harness import PrefixedModel, TaskScore, group_score, run_task, score
from cushion.evaluation.perplexity import BlockLoss, block_losses, perplexity
from cushion.evaluation.tasks import EvaluationTask, TaskSet, task_batch_size
from cushion.events import Event, Progress
from cushion.hashing import tensor_digest
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.fitted import FittedQuantizer


class DependsOn(Protocol):
    """What an artifact of a step depends on: what all artifacts do, and what is given here."""

    def __call__(self, step: str, **others: Any) -> dict[str, Any]:
        """The dependencies, as plain JSON."""


@dataclass(frozen=True)
class Measured:
    """What a row gave: perplexity and number of predicted tokens by corpus, scores by task, and seconds."""

    perplexity: dict[str, float]
    tokens: dict[str, int]
    tasks: dict[str, TaskScore]
    seconds: float


class RowMeasurement:
    """Measures one model: a prefix, with or without a quantizer.

    Args:
        fitted: the quantizer, fitted behind this prefix; None for the full-precision model.
        label: what progress bars call the row.
        depends_on: gives the cache keys; prefix and quantizer of this row are in them.
        emit: called with progress.

    """

    def __init__(
        self,
        lm: LanguageModel,
        config: EvalConfig,
        behind: Prefix,
        fitted: FittedQuantizer | None,
        label: str,
        store: ArtifactStore,
        depends_on: DependsOn,
        emit: Callable[[Event], None],
    ) -> None:
        self._lm, self._config, self._behind = lm, config, behind
        self._fitted, self._label = fitted, label
        self._quantizer = None if fitted is None else fitted.config
        self._store, self._depends_on, self._emit = store, depends_on, emit
        self._asked: PrefixedModel | None = None
        self._stack = ExitStack()
        self._is_quantized = False

    def measure(self, blocks: dict[str, Tensor], tasks: TaskSet, samples: Path | None) -> Measured:
        """Everything, in order.

        Args:
            blocks: by corpus, (blocks, block length).
            samples: folder for lm-eval's record of every sample, one JSON-lines file per task; None for none.

        """
        perplexities, tokens, seconds = {}, {}, 0.0
        scores: dict[str, TaskScore] = {}
        if tasks.tasks:  # before the quantizer is on: lm-eval ties the weights of a model that it is given
            batch_size = task_batch_size(self._config, self._quantizer)
            self._asked = PrefixedModel(self._lm, self._behind, batch_size, self._config.add_bos)
        with self._stack:
            for corpus, text in blocks.items():
                perplexities[corpus], tokens[corpus], cost = self._perplexity(corpus, text, len(blocks) > 1)
                seconds += cost
            for done, (name, task) in enumerate(tasks.tasks.items()):
                self._emit(Progress(f"tasks, {self._label}", done, len(tasks.tasks), "task"))
                scores[name], cost = self._task(task, samples)
                seconds += cost
                self._emit(Progress(f"tasks, {self._label}", done + 1, len(tasks.tasks), "task"))
        for name, group in tasks.groups.items():
            grouped = group_score(group, scores)
            if grouped is not None:
                scores[name] = grouped
        return Measured(perplexities, tokens, scores, seconds)

    def _quantize(self) -> None:
        """Put the quantizer on the model, the first time something has to be computed on it."""
        if self._fitted is not None and not self._is_quantized:
            self._stack.enter_context(self._fitted.on(self._lm))
            self._is_quantized = True

    def _perplexity(self, corpus: str, blocks: Tensor, is_one_of_many: bool) -> tuple[float, int, float]:
        config = self._config
        stage = f"perplexity, {corpus}, {self._label}" if is_one_of_many else f"perplexity, {self._label}"
        depends_on = self._depends_on(
            "perplexity",
            config={key: getattr(config, key) for key in ("batch_size", "bos", "predict_first")},
            blocks=tensor_digest([blocks]),
        )

        def make(workspace: Workspace) -> None:
            saved = workspace.checkpoint.load()
            state: dict[str, Any] = {"losses": [], "seconds": 0.0} if saved is None else saved[0]
            losses = [BlockLoss(**loss) for loss in state["losses"]]
            started = time.perf_counter() - state["seconds"]
            self._quantize()
            total = -(-len(blocks) // config.batch_size)
            for loss in block_losses(self._lm, self._behind, blocks, config, start=len(losses)):
                losses.append(loss)
                self._emit(Progress(stage, len(losses), total, "block"))
                if workspace.checkpoint.due():
                    elapsed = time.perf_counter() - started
                    workspace.checkpoint.save({"losses": [asdict(item) for item in losses], "seconds": elapsed})
            record = {
                "perplexity": perplexity(losses),
                "losses": [asdict(loss) for loss in losses],
                "seconds": time.perf_counter() - started,
            }
            write_json(workspace.folder / "perplexity.json", record)

        folder, _ = self._store.get_or_make("perplexity", depends_on, make)
        with reading(folder):
            record = read_json(folder / "perplexity.json")
            tokens = sum(int(loss["tokens"]) for loss in record["losses"])
            return float(record["perplexity"]), tokens, float(record["seconds"])

    def _task(self, task: EvaluationTask, samples: Path | None) -> tuple[TaskScore, float]:
        config = self._config
        batch_size = task_batch_size(config, self._quantizer)
        depends_on = self._depends_on(
            "task",
            task=[task.name, task.identity],
            config={"limit": config.limit, "shots": config.shots, "add_bos": config.add_bos, "batch_size": batch_size},
            lm_eval=version("lm_eval"),
            tokenizer=self._lm.tokenizer_fingerprint,
            **({"samples": True} if samples is not None else {}),
        )

        def make(workspace: Workspace) -> None:
            started = time.perf_counter()
            assert self._asked is not None
            self._quantize()
            metrics, asked, records = run_task(self._asked, task, config.limit)
            if samples is not None:
                lines = (json.dumps(record, ensure_ascii=False, default=str) for record in records)
                (workspace.folder / "samples.jsonl").write_text("".join(f"{line}\n" for line in lines), "utf-8")
            record = {
                "metrics": metrics,
                "samples": asked,
                "truncated": self._asked.truncated,
                "version": str(task.task.VERSION),
                "seconds": time.perf_counter() - started,
            }
            write_json(workspace.folder / "task.json", record)

        folder, _ = self._store.get_or_make("tasks", depends_on, make)
        with reading(folder):
            record = read_json(folder / "task.json")
            samples_asked, truncated = int(record["samples"]), int(record["truncated"])
            found = score(record["metrics"], samples_asked, record["version"], config.accuracy, truncated)
            seconds = float(record["seconds"])
        if samples is not None:
            samples.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / "samples.jsonl", samples / f"{task.name}.jsonl")
        return found, seconds
