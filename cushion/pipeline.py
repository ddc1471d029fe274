"""The order of work: load, curve before, search, tune, curves after, quantize and evaluate every row.

`run(RunConfig) -> RunResult` is a function from a validated configuration to a result. It knows nothing of Hydra, W&B,
figures or progress bars: what happens on the way is emitted as events.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from cushion.activations import MagnitudeCurve
from cushion.ceilings import Ceiling, Ceilings
from cushion.config import QuantizerConfig, RunConfig, to_dict
from cushion.config_warnings import options_without_effect
from cushion.evaluation.attention import ATTENTION_TOKENS
from cushion.evaluation.latency_step import machine
from cushion.evaluation.task_checks import task_batch_size
from cushion.evaluation.task_scores import mean_accuracy, shares_of
from cushion.events import Event, Listener, RowMeasured, RunFailed, RunFinished, RunStarted
from cushion.metrics.columns import Measured, Place, columns, row_values
from cushion.prefix import Prefix
from cushion.preparation import Prepared, choose_device, evaluation_name, prepare
from cushion.quantization.learned import Learned
from cushion.results import Row, RunResult, environment, make_folder, make_room
from cushion.row import row_label
from cushion.run_folder import finished as finished
from cushion.run_folder import run_folder as run_folder
from cushion.run_folder import run_name as run_name
from cushion.run_warnings import found_warnings, preparation_warnings, qfem_warnings, truncation_warning
from cushion.schema import FOUND, LEARNED, NO_PREFIX, PREFIX, RECONSTRUCTED, SAMPLES, STAGES, TUNED
from cushion.search.methods import METHODS
from cushion.steps import Steps
from cushion.tuning_ranges import tuning_quantizer

logger = logging.getLogger(__name__)


def run(config: RunConfig, listeners: Sequence[Listener] = (), folder: Path | None = None) -> RunResult:
    """Do one run, or return its result at once if it is finished already.

    Args:
        config: what to do. Nothing else, besides the text and the weights it names, influences the result.
        listeners: called with every event.
        folder: the run's, where the caller has asked for it already; by default `run_folder(config)`.

    Raises:
        CushionError: something the user can mend; result.json then has `status: failed` and the message.
    """
    folder = folder or run_folder(config)
    done = finished(folder)
    if done is not None:
        return done
    make_folder(folder)
    with FileLock(folder / ".lock"):
        return make_room(folder) or _run_locked(config, folder, listeners)  # another process may have done it


def _run_locked(config: RunConfig, folder: Path, listeners: Sequence[Listener]) -> RunResult:
    def emit(event: Event) -> None:
        for listener in listeners:
            listener(event)

    device = choose_device(config)
    result = RunResult("failed", to_dict(config), {**environment(device), "seed": config.seed})
    if config.eval.latency.is_on:
        result.environment["machine"] = machine(torch.device(device))
    started = time.perf_counter()
    is_started = False
    try:
        work = _Run(config, folder, device, emit, result)
        # what is refused before this leaves no trace in a tracker
        emit(RunStarted(folder, run_name(config), result.config))
        is_started = True
        work.execute()
        result.timings["total"] = time.perf_counter() - started
        result.status = "completed"
        result.write(folder)
    except BaseException as error:
        result.status, result.error = "failed", {"type": type(error).__name__, "message": str(error)}
        try:
            result.write(folder)
        except OSError as unwritten:  # on a full disk: it is the first error that counts
            logger.warning("the failed run has no result.json: %s", unwritten)
        if is_started:
            emit(RunFailed(folder, f"{type(error).__name__}: {error}"))
        raise
    emit(RunFinished(folder, asdict(result), folder / PREFIX if result.prefix else None))
    return result


@dataclass(frozen=True, eq=False)
class _Stage:
    """A prefix as it stood at one of the `STAGES` of the run, with the seconds it cost so far.

    Args:
        learned: ranges that were learned with the prefix, for the run's quantizer.
        fitted: the stage behind whose prefix the quantizer was fitted when they were learned.
        chosen: the stage behind whose prefix QFeM chose what it keeps, where the prefix was tuned under that.

    """

    key: str
    title: str
    prefix: Prefix
    seconds: float
    learned: Learned | None = None
    fitted: _Stage | None = None
    chosen: _Stage | None = None


class _Run:
    """One run under way; fills the result step by step."""

    def __init__(
        self, config: RunConfig, folder: Path, device: str, emit: Callable[[Event], None], result: RunResult
    ) -> None:
        self.config, self.folder, self.emit, self.result = config, folder, emit, result
        for warning in options_without_effect(config):
            self._warn(warning)
        prepared = prepare(config, device)
        self.lm, self.texts = prepared.lm, prepared.texts
        self.tasks = prepared.tasks
        self.steps = Steps(config, prepared, emit, folder)
        self.ceilings = Ceilings()
        result.model = {
            "path": config.model.path,
            "label": self.lm.label,
            "architecture": self.lm.architecture.model_type,
            "fingerprint": self.lm.fingerprint,
            "dtype": str(self.lm.model.dtype).removeprefix("torch."),
            "blocks": len(self.lm.blocks),
            "vocabulary": self.lm.vocabulary_size,
        }
        result.evaluation = _evaluation(config, prepared)
        for warning in preparation_warnings(config, prepared):
            self._warn(warning)
        result.data = {purpose: corpus.provenance for purpose, corpus in prepared.corpora.items()}

    def execute(self) -> None:
        """All steps in order."""
        none = _Stage(NO_PREFIX, "no prefix", Prefix.empty(), 0.0)
        measured = {none.key: self._measure(none)}
        found = self._find()
        tuned = self._tune(found) if found is not None else None
        stages = [stage for stage in (none, found, tuned) if stage is not None]
        measured |= {stage.key: self._measure(stage) for stage in stages[1:]}
        self.result.activations = {
            "texts": len(self.texts.activations),
            "text_length": self.texts.activations.shape[1],
            "titles": {stage.key: stage.title for stage in stages},
            "curves": {key: asdict(curve) for key, (curve, _) in measured.items()},
            "quantization_error": {key: error for key, (_, error) in measured.items()},
            "map": self._map(stages, measured[none.key][0]),
            **self.steps.measure_further_activations({stage.key: (stage.prefix, stage.title) for stage in stages}),
        }
        self.result.attention = self._attention(stages)
        final = stages[-1]
        if len(final.prefix):
            self._keep(final.prefix)
        if final.learned is not None:
            final.learned.save(self.folder / LEARNED)
        worst_block = measured[none.key][0].worst_block
        for stage, quantizer in self._rows(none, found or none, final):
            self.result.rows.append(self._row(stage, quantizer, *measured[stage.key], worst_block))
        for stage in self._reconstructed_stages(none, final):
            row = self._row(stage, self.config.quantizer, *measured[stage.key], worst_block, reconstructs=True)
            self.result.rows.append(row)
        own = self.result.rows[-1]
        keys = [column.key for column in columns([asdict(own)], Place.RUN)]
        self.result.metrics = {key: own.values[key] for key in keys if key in own.values}

    def _measure(self, stage: _Stage) -> tuple[MagnitudeCurve, float]:
        return self.steps.measure_activations(stage.prefix, stage.title)

    def _map(self, stages: Sequence[_Stage], before: MagnitudeCurve) -> dict[str, Any]:
        """Magnitudes at the input of the block whose top-1 is largest without a prefix, in the same channels."""
        block = before.worst_block
        none = self.steps.map_activations(stages[0].prefix, block, None, stages[0].title)
        maps = {stages[0].key: none}
        for stage in stages[1:]:
            maps[stage.key] = self.steps.map_activations(stage.prefix, block, none.channels, stage.title)
        return {
            "block": block,
            "channels": none.channels,
            "positions": len(none.values),
            "values": {key: found.values for key, found in maps.items()},
        }

    def _attention(self, stages: list[_Stage]) -> dict[str, Any] | None:
        shares = {stage.key: self.steps.measure_attention(stage.prefix, stage.title) for stage in stages}
        found = {key: asdict(share) for key, share in shares.items() if share is not None}
        if not found:
            return None
        texts = self.texts.activations
        return {
            "texts": min(self.config.eval.attention_texts, len(texts)),
            "text_length": min(texts.shape[1], ATTENTION_TOKENS),
            "first": self.config.eval.attention_first,
            "stages": found,
        }

    def _find(self) -> _Stage | None:
        """The prefix that the search finds or the user names, or None."""
        method = METHODS[self.config.search.method]
        found = self.steps.search()
        if found is None:
            return None
        self.result.search = {"method": method.name, **found.record}
        if found.seconds is not None:
            self.result.timings["search"] = found.seconds
        for warning in (*found.warnings, *found_warnings(self.config, self.lm, found.prefix)):
            self._warn(warning)
        return None if found.prefix is None else _Stage(FOUND, method.title, found.prefix, found.seconds or 0.0)

    def _tune(self, found: _Stage) -> _Stage | None:
        """The tuned prefix, or None without tuning."""
        if self.config.tuning.method == "none":
            return None
        if tuning_quantizer(self.config.tuning, self.config.quantizer).uses_qfem:
            self._keep_modules(found, self.config.quantizer)  # what tuning keeps is recorded, also without a row
        tuned = self.steps.tune(found.prefix)
        self.result.tuning = tuned.record
        self.result.timings["tuning"] = tuned.seconds
        if tuned.record["best_step"] == 0:
            self._warn("tuning did not lower the held-out loss: the prefix is kept as it was found")
        seconds, basis = found.seconds + tuned.seconds, None if tuned.learned is None else found
        chosen = None if self.config.tuning.ranges == "dynamic" else found
        return _Stage(TUNED, "tuned prefix", tuned.prefix, seconds, tuned.learned, basis, chosen)

    def _keep(self, prefix: Prefix) -> None:
        prefix.save(self.folder / PREFIX)
        self.result.prefix = {
            "token_ids": list(prefix.token_ids),
            "text": self.lm.decode(prefix.token_ids),
            "length": len(prefix),
            "tuned": prefix.tuned,
            "fingerprint": prefix.fingerprint,
        }

    def _rows(self, none: _Stage, found: _Stage, final: _Stage) -> list[tuple[_Stage, QuantizerConfig | None]]:
        """Which combinations of prefix and quantizer are evaluated; the last one is the run's own."""
        quantizer = None if self.config.quantizer.is_full_precision else self.config.quantizer
        rows: list[tuple[_Stage, QuantizerConfig | None]] = [(final, quantizer)]
        if self.config.eval.controls:
            rows = [(none, quantizer), (found, quantizer), *rows]
            if quantizer is not None:
                rows = [(none, None), (found, None), (final, None), *rows]
        distinct = {(stage.key, quantizer is None): (stage, quantizer) for stage, quantizer in rows}
        return list(distinct.values())

    def _reconstructed_stages(self, none: _Stage, final: _Stage) -> list[_Stage]:
        """Whose rows stand once more behind those of the frozen model, reconstructed: the run's own comes last."""
        if not self.config.reconstruction.is_on:
            return []
        return [none, final] if self.config.eval.controls and final is not none else [final]

    def _row(
        self,
        stage: _Stage,
        quantizer: QuantizerConfig | None,
        curve: MagnitudeCurve,
        error: float,
        worst_block: int,
        reconstructs: bool = False,
    ) -> Row:
        kind = "full_precision" if quantizer is None else "quantized"
        label = row_label(quantizer, self.config.execution, stage.title if len(stage.prefix) else "")
        name = kind if stage.key == NO_PREFIX else f"{kind}_{stage.key}"
        fitted, learned = stage.fitted or stage, None if quantizer is None else stage.learned
        has_learned_ranges = learned is not None
        if has_learned_ranges:
            label += " + learned ranges"
        keep, keep_seconds = self._keep_modules(stage.chosen or stage, quantizer)
        learning_seconds = 0.0
        if reconstructs:
            assert quantizer is not None
            name, label = f"{name}_reconstructed", f"{label} + reconstruction"
            learned, learning_seconds = self._reconstruct(stage, quantizer, keep)
        samples = self.folder / SAMPLES / name if self.config.eval.samples else None
        measured = self.steps.measure_row(stage.prefix, quantizer, label, keep, samples, learned, fitted.prefix)
        self.result.timings[f"evaluation, {label}"] = measured.seconds
        mean = mean_accuracy({task: measured.tasks[task] for task in self.tasks.in_mean if task in measured.tasks})
        without = [
            task for task in self.tasks.in_mean if task not in measured.tasks or measured.tasks[task].value is None
        ]
        if without:
            self._warn(f"{', '.join(without)} of eval.tasks has no accuracy and is not in the mean")
        truncated = {
            asked: sum(measured.tasks[task].truncated for task in self.tasks.members(asked))
            for asked in self.tasks.asked
        }
        if any(truncated.values()):
            self._warn(truncation_warning(truncated, label, len(stage.prefix), self.config.eval.shots))
        tasks = {task: asdict(found) for task, found in measured.tasks.items()}
        seconds = stage.seconds + keep_seconds + learning_seconds + measured.seconds
        ceiling = None if quantizer is None else self.ceilings.of(stage.key, stage.prefix)
        found = Measured(
            measured.perplexity,
            tasks,
            mean,
            curve.largest,
            error,
            seconds,
            measured.further,
            asdict(curve),
            worst_block,
            measured.losses,
            measured.records,
            shares_of(self.tasks, measured.tasks),
            self.tasks.in_mean,
            (self.result.attention or {}).get("stages", {}).get(stage.key, {}),
            None if ceiling is None else ceiling.measured,
        )
        if quantizer is None:
            self.ceilings.add(stage.key, stage.prefix, Ceiling(name, found))
        losses = {corpus: asdict(losses) for corpus, losses in measured.losses.items()}
        self.result.evaluation["losses"][name] = losses
        self.result.evaluation["ceilings"][name] = None if ceiling is None else ceiling.name
        row = Row(
            name=name,
            label=label,
            prefix=self.lm.decode(stage.prefix.token_ids),
            quantized=quantizer is not None,
            stage=stage.key,
            values=row_values(found),
            tokens=measured.tokens,
            tasks=tasks,
            reconstructed=reconstructs,
            learned_ranges=has_learned_ranges,
        )
        self.emit(RowMeasured(len(self.result.rows), asdict(row)))
        return row

    def _reconstruct(self, stage: _Stage, quantizer: QuantizerConfig, keep: frozenset[str]) -> tuple[Learned, float]:
        """What is learned block by block behind this stage's prefix, and the seconds it takes."""
        basis = (stage.fitted or stage).prefix
        found = self.steps.reconstruct(stage.prefix, quantizer, stage.title, keep, stage.learned, basis)
        self.result.reconstruction = {**(self.result.reconstruction or {}), stage.key: found.record}
        self.result.timings[f"reconstruction, {stage.title}"] = found.seconds
        found.learned.save(self.folder / RECONSTRUCTED)  # of the run's own row in the end: that stage comes last
        blocks = found.record["blocks"]
        lost = [str(one["block"]) for one in blocks if not one["kept"] and one["after"] != one["before"]]
        if lost and self.config.reconstruction.epochs > 0:
            self._warn(
                f"reconstruction behind {stage.title} did not lower the error of block {', '.join(lost)}: what was "
                "learned there is not used"
            )
        return found.learned, found.seconds

    def _keep_modules(self, stage: _Stage, quantizer: QuantizerConfig | None) -> tuple[frozenset[str], float]:
        """The linears that QFeM keeps in full precision behind this stage's prefix, and the seconds of finding them."""
        if quantizer is None or not quantizer.uses_qfem:
            return frozenset(), 0.0
        kept = self.steps.keep(stage.prefix, quantizer, stage.title)
        is_new = stage.key not in (self.result.qfem or {})
        records = {**(self.result.qfem or {}), stage.key: kept.record}
        self.result.qfem = {key: records[key] for key in STAGES if key in records}
        self.result.timings[f"qfem, {stage.title}"] = kept.seconds
        for warning in qfem_warnings(kept.record, stage.title) if is_new else ():
            self._warn(warning)
        return kept.names, kept.seconds

    def _warn(self, message: str) -> None:
        if message in self.result.warnings:
            return
        logger.warning(message)
        self.result.warnings.append(message)


def _evaluation(config: RunConfig, prepared: Prepared) -> dict[str, Any]:
    """What the rows of a result are measured on, as it stands in the result."""
    evaluation, tasks = config.eval, prepared.tasks
    return {
        "corpus": evaluation_name(config),
        "corpora": {name: {"blocks": len(blocks)} for name, blocks in prepared.blocks.items()},
        "block_length": evaluation.block_length,
        "bos": prepared.bos,
        "predict_first": evaluation.predict_first,
        "prefix_in_block": evaluation.prefix_in_block,
        "tasks": {
            name: {"origin": task.origin, "shots": task.task.get_config("num_fewshot"), "prepared": task.prepared}
            for name, task in tasks.tasks.items()
        },
        "asked": list(tasks.asked),
        "in_mean": list(tasks.in_mean),
        "limit": evaluation.limit,
        "task_batch_size": task_batch_size(evaluation, config.quantizer, prepared.lm.device.type),
        "accuracy": evaluation.accuracy,
        "losses": {},
        "ceilings": {},
    }
