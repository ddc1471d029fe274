"""The order of work: load, curve before, search, tune, calibrate and quantize, curve after, evaluate.

`run(RunConfig) -> RunResult` is a function from a validated configuration to a result. It knows nothing of Hydra, W&B
or progress bars: what happens on the way is emitted as events. Every expensive step is an artifact, so a run that is
started again goes on where it stopped, and two runs that need the same step share it.
"""

from __future__ import annotations

import inspect
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cushion import activations, data, prefix, tuning
from cushion.activations import ChannelRanges, MagnitudeCurve, MagnitudeStatistics, observe_inputs
from cushion.artifacts import ArtifactStore, Workspace, read_json, write_json
from cushion.config import QuantizerConfig, RunConfig, SearchConfig, options_without_effect, to_dict
from cushion.data import Corpus, load_corpora
from cushion.errors import ArtifactError, ConfigError, TuningError
from cushion.evaluation import perplexity as perplexity_module
from cushion.evaluation.perplexity import BlockLoss, block_losses, check_evaluation, perplexity
from cushion.events import Event, Listener, Progress, Record, RunFailed, RunFinished, RunStarted
from cushion.hashing import digest, tensor_digest
from cushion.models import LanguageModel, load_language_model
from cushion.prefix import Prefix
from cushion.quantization import calibration as calibration_module
from cushion.quantization import linear, numerics, simulate, smoothquant
from cushion.quantization.calibration import calibrate
from cushion.quantization.simulate import check_quantizer, quantized
from cushion.reporting.figures import activation_curves
from cushion.results import Row, RunResult, environment, finished_result
from cushion.search import greedy, objective, proposals
from cushion.search.greedy import Scored, SearchState, greedy_search
from cushion.search.objective import Objective
from cushion.search.proposals import propose
from cushion.tuning import TuningState, tune_prefix

logger = logging.getLogger(__name__)

CODE: dict[str, tuple[ModuleType, ...]] = {
    "search": (numerics, prefix, data, objective, proposals, greedy),
    "calibration": (activations, prefix, calibration_module),
    "tuning": (numerics, prefix, activations, linear, smoothquant, simulate, tuning),
    "activations": (numerics, prefix, activations, objective),
    "perplexity": (numerics, prefix, linear, smoothquant, simulate, perplexity_module),
}
"""The modules whose source decides the outcome of a step: their text is part of the step's cache keys."""


@lru_cache
def code_version(step: str) -> str:
    """Hash of the source of the modules that a step's outcome depends on."""
    return digest([inspect.getsource(module) for module in CODE[step]])


def run_folder(config: RunConfig) -> Path:
    """`<output_dir>/<experiment>/<model>/<quantizer>-<search>-<tuning>/<hash of the config that matters>`."""
    identity = to_dict(config)
    for irrelevant in ("tracking", "experiment"):
        del identity[irrelevant]
    identity["paths"] = {"data_dir": config.paths.data_dir}
    identity["code"] = {step: code_version(step) for step in CODE}
    identity["inputs"] = [_file_identity(path) for path in _local_inputs(config)]
    row = f"{config.quantizer.name}-{config.search.name}-{config.tuning.name}"
    return (
        Path(config.paths.output_dir).expanduser() / config.experiment / config.model.label / row / digest(identity, 12)
    )


def _local_inputs(config: RunConfig) -> list[Path]:
    """Files of the user's that a result depends on: a changed file is another run."""
    files = [Path(corpus.path).expanduser() for corpus in config.data.purposes().values() if corpus.path]
    model = Path(config.model.path).expanduser()
    if model.is_dir():
        files += sorted(path for path in model.iterdir() if path.is_file())
    return files


def _file_identity(path: Path) -> list[Any]:
    if not path.is_file():
        return [path.name, None]
    stat = path.stat()
    return [path.name, stat.st_size, stat.st_mtime_ns]


def run(config: RunConfig, listeners: Sequence[Listener] = ()) -> RunResult:
    """Do one run, or return its result at once if it is finished already.

    Args:
        config: what to do. Nothing else, besides the text and the weights it names, influences the result.
        listeners: called with every event.

    Raises:
        CushionError: something the user can mend; result.json then has `status: failed` and the message.

    """
    folder = run_folder(config)
    done = finished_result(folder)
    if done is not None:
        return done

    def emit(event: Event) -> None:
        for listener in listeners:
            listener(event)

    folder.mkdir(parents=True, exist_ok=True)
    name = f"{config.model.label}-{config.quantizer.name}-{config.search.name}-{config.tuning.name}"
    device = _device(config)
    result = RunResult("failed", to_dict(config), {**environment(device), "seed": config.seed})
    emit(RunStarted(folder, name, result.config))
    try:
        started = time.perf_counter()
        work = _Run(config, folder, device, emit, result)
        work.execute()
        result.timings["total"] = time.perf_counter() - started
        result.status = "completed"
        figures = [activation_curves(asdict(result), folder / "figures" / "activation_curves.png")]
        result.write(folder)
    except BaseException as error:
        result.status, result.error = "failed", {"type": type(error).__name__, "message": str(error)}
        result.write(folder)
        emit(RunFailed(folder, f"{type(error).__name__}: {error}"))
        raise
    emit(RunFinished(folder, asdict(result), figures, folder / "prefix" if result.prefix else None))
    return result


def _device(config: RunConfig) -> str:
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ConfigError(f"device={config.device!r} is not allowed: auto, cpu, cuda or cuda:<number>") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={config.device!r} is not available here: torch sees no GPU; use device=cpu or auto")
    return config.device


@dataclass(frozen=True)
class _Stage:
    """A prefix as it stood at one point of the run, with what it cost so far."""

    key: str
    title: str
    prefix: Prefix
    seconds: float


class _Run:
    """One run under way: what has been loaded, and one method per step."""

    def __init__(
        self, config: RunConfig, folder: Path, device: str, emit: Callable[[Event], None], result: RunResult
    ) -> None:
        self.config, self.folder, self.emit, self.result = config, folder, emit, result
        self.store = ArtifactStore(Path(config.paths.cache_dir).expanduser())
        for warning in options_without_effect(config):
            self._warn(warning)
        self.corpora: dict[str, Corpus] = load_corpora(config.data, config.paths)
        self.lm: LanguageModel = load_language_model(config.model, config.paths, device)
        self._check()
        self._draw_texts()
        result.model = {
            "path": config.model.path,
            "label": self.lm.label,
            "architecture": self.lm.architecture.model_type,
            "fingerprint": self.lm.fingerprint,
            "dtype": str(self.lm.model.dtype).removeprefix("torch."),
            "blocks": len(self.lm.blocks),
            "vocabulary": self.lm.vocabulary_size,
        }
        result.data = {purpose: corpus.provenance for purpose, corpus in self.corpora.items()}
        name = config.data.evaluation.source
        self.corpus_name = Path(config.data.evaluation.path or name).stem if name == "file" else name

    def execute(self) -> None:
        """All steps in order; fills the result."""
        none = _Stage("none", "no prefix", Prefix.empty(), 0.0)
        before = self._measure_activations(none)
        found = self._search()
        tuned = self._tune(found) if found is not None else None
        stages = [stage for stage in (none, found, tuned) if stage is not None]
        final = stages[-1]
        measured = {"none": before} | {stage.key: self._measure_activations(stage) for stage in stages[1:]}
        self.result.activations = {
            "texts": len(self.activation_texts),
            "text_length": self.activation_texts.shape[1],
            "curves": {key: asdict(curve) for key, (curve, _) in measured.items()},
            "quantization_error": {key: error for key, (_, error) in measured.items()},
            "titles": {stage.key: stage.title for stage in stages},
        }
        if len(final.prefix):
            final.prefix.save(self.folder / "prefix")
            self.result.prefix = {
                "token_ids": list(final.prefix.token_ids),
                "text": self.lm.decode(final.prefix.token_ids),
                "length": len(final.prefix),
                "tuned": final.prefix.tuned,
                "fingerprint": final.prefix.fingerprint,
            }
        for stage, is_quantized in self._rows(none, found, final):
            curve, error = measured[stage.key]
            self.result.rows.append(self._row(stage, is_quantized, curve, error))
        last = self.result.rows[-1]
        self.result.metrics = {
            "perplexity": last.perplexity,
            "largest_activation": last.largest_activation,
            "quantization_error": last.quantization_error,
        }

    # ---- before any long work -------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Refuse what cannot work with this model, now that its sizes are known."""
        lm, search = self.lm, self.config.search
        check_quantizer(lm, self.config.quantizer)
        self.start_tokens = self._start_tokens()
        longest = len(self.start_tokens)
        if search.method == "greedy":
            longest = max(longest, search.max_length)
            if lm.context_length is not None and longest + search.text_length > lm.context_length:
                raise ConfigError(
                    f"search.max_length={search.max_length} and search.text_length={search.text_length} need "
                    f"{longest + search.text_length} positions, but {lm.label} has {lm.context_length}: shorten one"
                )
        check_evaluation(lm, self.config.eval, longest)
        length = self.config.tuning.sequence_length
        if (
            self.config.tuning.method != "none"
            and lm.context_length is not None
            and longest + length > lm.context_length
        ):
            raise ConfigError(
                f"tuning.sequence_length={length} and a prefix of {longest} tokens do not fit the "
                f"{lm.context_length} positions of {lm.label}: shorten the sequences"
            )

    def _start_tokens(self) -> list[int]:
        lm, search = self.lm, self.config.search
        if search.method == "tokens":
            ids = search.token_ids if search.token_ids is not None else lm.encode(search.tokens or "").tolist()
            lm.check_token_ids(ids, "search.token_ids")
            return ids
        if search.method == "greedy" and search.start == "bos":
            if lm.bos_token_id is None:
                raise ConfigError(f"search.start=bos, but {lm.label} has no BOS token: use search.start=empty")
            return [lm.bos_token_id]
        if search.method == "greedy" and search.start == "newline":
            return lm.encode("\n").tolist()
        return []

    def _draw_texts(self) -> None:
        """Every text that the run will need, drawn now, so that a short source is refused before any long work."""
        config, encode = self.config, self.lm.encode
        corpora = self.corpora
        self.blocks = corpora["evaluation"].blocks(encode, config.eval.block_length, config.eval.blocks)
        self.activation_texts = self.blocks[: config.eval.activation_blocks]
        calibration = config.quantizer.calibration
        if config.quantizer.needs_calibration:
            self.calibration_texts = corpora["calibration"].samples(
                encode, calibration.length, calibration.samples, config.seed
            )
        if config.search.method == "greedy":
            count = max(1, config.search.max_length - len(self.start_tokens))
            self.search_texts = corpora["search"].samples(encode, config.search.text_length, count, config.seed)
        if config.tuning.method != "none":
            tuning_config = config.tuning
            texts = corpora["tuning"].samples(
                encode,
                tuning_config.sequence_length,
                tuning_config.sequences + tuning_config.held_out_sequences,
                config.seed,
            )
            self.tuning_texts, self.held_out = texts.split([tuning_config.sequences, tuning_config.held_out_sequences])

    # ---- steps ----------------------------------------------------------------------------------------------------

    def _search(self) -> _Stage | None:
        """The prefix that the search finds, or None."""
        config = self.config.search
        if config.method == "none":
            return None
        if config.method == "tokens":
            self.result.search = {"method": "tokens", "token_ids": self.start_tokens, "seconds": 0.0}
            return _Stage("found", "given prefix", Prefix.from_tokens(self.lm.model, self.start_tokens), 0.0)
        counts = self.corpora["search"].token_counts(self.lm.encode, self.lm.vocabulary_size)
        candidates = propose(self.lm, config, counts, self.config.seed)
        depends_on = {
            "code": code_version("search"),
            "model": self.lm.fingerprint,
            "config": _without(to_dict(config), "name", "method", "tokens", "token_ids", "candidates", "frequent"),
            "candidates": digest(candidates),
            "texts": tensor_digest([self.search_texts]),
        }

        def make(workspace: Workspace) -> None:
            saved = workspace.checkpoint.load()
            state = SearchState(list(self.start_tokens)) if saved is None else SearchState.from_dict(saved[0])
            for event in greedy_search(self.lm, config, self.search_texts, candidates, state):
                if isinstance(event, Scored):
                    self.emit(Progress(f"search step {event.step + 1}", event.done, event.total, "candidate"))
                    if workspace.checkpoint.due():
                        workspace.checkpoint.save(state.to_dict())
                else:
                    workspace.checkpoint.save(state.to_dict())
            write_json(workspace.folder / "search.json", state.to_dict())

        folder, _ = self._artifact("search", depends_on, make)
        state = SearchState.from_dict(read_json(folder / "search.json"))
        for step in state.steps:
            self.emit(Record("search", step.step, _without(asdict(step), "step")))
        seconds = sum(step.seconds for step in state.steps)
        self.result.search = {
            "method": config.method,
            "proposal": config.proposal,
            "objective": config.objective,
            "tau": config.tau,
            "start": self.start_tokens,
            "token_ids": state.token_ids,
            "stop_reason": state.stop_reason,
            "steps": [asdict(step) for step in state.steps],
            "token_forwards": sum(step.token_forwards for step in state.steps),
            "seconds": seconds,
        }
        self.result.timings["search"] = seconds
        if not state.token_ids:
            self._warn(
                f"the search found no prefix: the best candidate does not lower the objective to tau={config.tau} of "
                "what it was, so the run goes on without one"
            )
            return None
        title = "greedy prefix"
        return _Stage("found", title, Prefix.from_tokens(self.lm.model, state.token_ids), seconds)

    def _tune(self, found: _Stage) -> _Stage | None:
        """The tuned prefix, or None without tuning."""
        config, quantizer = self.config.tuning, self.config.quantizer
        if config.method == "none":
            return None
        smooths = quantizer.smoothing_alpha is not None and config.prediction_model == "quantized"
        ranges, calibration_key = self._calibrate(found.prefix) if smooths else (None, None)
        under = tuning.tuning_quantizer(config, quantizer)
        depends_on = {
            "code": code_version("tuning"),
            "model": self.lm.fingerprint,
            "prefix": found.prefix.fingerprint,
            "config": _without(to_dict(config), "name", "method"),
            "objective": self._grid_identity(),
            "quantizer": self._quantizer_identity(under, calibration_key),
            "texts": tensor_digest([self.tuning_texts, self.held_out]),
            "seed": self.config.seed,
        }

        def make(workspace: Workspace) -> None:
            saved = workspace.checkpoint.load()
            state = None if saved is None else TuningState.from_checkpoint(*saved, found.prefix)
            try:
                steps = tune_prefix(
                    self.lm,
                    found.prefix,
                    config,
                    quantizer,
                    self.config.search,
                    self.tuning_texts,
                    self.held_out,
                    seed=self.config.seed,
                    calibration=ranges,
                    state=state,
                )
                for current in steps:
                    state = current
                    self.emit(Progress("tuning", len(state.steps), config.total_steps, "step"))
                    if workspace.checkpoint.due():
                        workspace.checkpoint.save(*state.to_checkpoint())
            except TuningError as error:
                if state is None:
                    raise
                state.best.save(self.folder / "last_good_prefix")
                raise TuningError(
                    f"{error} -- the best prefix before that (step {state.best_step}) is kept in "
                    f"{self.folder / 'last_good_prefix.safetensors'}"
                ) from error
            assert state is not None
            state.best.save(workspace.folder / "prefix")
            record = {
                "steps": [asdict(step) for step in state.steps],
                "best_step": state.best_step,
                "best_loss": state.best_loss,
                "initial_loss": state.initial_loss,
            }
            write_json(workspace.folder / "tuning.json", record)

        folder, _ = self._artifact("tuning", depends_on, make)
        record = read_json(folder / "tuning.json")
        for step in record["steps"]:
            self.emit(Record("tuning", step["step"], _without(step, "step")))
        seconds = sum(step["seconds"] for step in record["steps"])
        self.result.tuning = {**record, "seconds": seconds}
        self.result.timings["tuning"] = seconds
        if record["best_step"] == 0:
            self._warn("tuning did not lower the held-out loss: the prefix is kept as it was found")
        return _Stage("tuned", "tuned prefix", Prefix.load(folder / "prefix"), found.seconds + seconds)

    def _calibrate(self, behind: Prefix) -> tuple[ChannelRanges, dict[str, Any]]:
        """Ranges of every linear's input behind a prefix, their cache key, with the seconds they took."""
        depends_on = {
            "code": code_version("calibration"),
            "model": self.lm.fingerprint,
            "prefix": behind.fingerprint,
            "texts": tensor_digest([self.calibration_texts]),
        }

        def make(workspace: Workspace) -> None:
            started = time.perf_counter()
            ranges = ChannelRanges()
            for done in calibrate(self.lm, behind, self.calibration_texts, ranges):
                self.emit(Progress("calibration", done, len(self.calibration_texts), "text"))
            tensors = {f"minimum.{k}": v.cpu() for k, v in ranges.minimum.items()}
            tensors |= {f"maximum.{k}": v.cpu() for k, v in ranges.maximum.items()}
            save_file(tensors, workspace.folder / "ranges.safetensors")
            write_json(workspace.folder / "calibration.json", {"seconds": time.perf_counter() - started})

        folder, _ = self._artifact("calibration", depends_on, make)
        try:
            tensors = load_file(folder / "ranges.safetensors", device=str(self.lm.device))
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{folder / 'ranges.safetensors'} is damaged ({error}): delete {folder}") from error
        ranges = ChannelRanges()
        for name, tensor in tensors.items():
            kind, _, linear_name = name.partition(".")
            (ranges.minimum if kind == "minimum" else ranges.maximum)[linear_name] = tensor
        return ranges, {**depends_on, "seconds": read_json(folder / "calibration.json")["seconds"]}

    def _measure_activations(self, stage: _Stage) -> tuple[MagnitudeCurve, float]:
        """The magnitude curve and the mean L_q of the evaluation texts behind a prefix, in full precision."""
        depends_on = {
            "code": code_version("activations"),
            "model": self.lm.fingerprint,
            "prefix": stage.prefix.fingerprint,
            "grid": self._grid_identity(),
            "texts": tensor_digest([self.activation_texts]),
        }

        def make(workspace: Workspace) -> None:
            statistics, errors = MagnitudeStatistics(), []
            error_of = Objective(replace(self.config.search, objective="quantization_error"))
            blocks = {str(index): block for index, block in enumerate(self.lm.blocks)}
            for done, text in enumerate(self.activation_texts, start=1):
                with observe_inputs(blocks, statistics):
                    errors.append(error_of(self.lm, stage.prefix, text[None], skip=0).item())
                self.emit(Progress(f"activations, {stage.title}", done, len(self.activation_texts), "text"))
            record = {"curve": asdict(statistics.curve()), "quantization_error": sum(errors) / len(errors)}
            write_json(workspace.folder / "activations.json", record)

        folder, _ = self._artifact("activations", depends_on, make)
        record = read_json(folder / "activations.json")
        return MagnitudeCurve(**record["curve"]), record["quantization_error"]

    def _rows(self, none: _Stage, found: _Stage | None, final: _Stage) -> list[tuple[_Stage, bool]]:
        """Which combinations of prefix and quantizer are evaluated; the last one is the run's own."""
        quantizes = not self.config.quantizer.is_full_precision
        rows = [(final, quantizes)]
        if self.config.eval.controls:
            controls = [(none, False), (final, False), (none, True), (found or none, True)]
            if not quantizes:
                controls = [(none, False), (found or none, False)]
            rows = controls + rows
        return [row for index, row in enumerate(rows) if row not in rows[index + 1 :]]

    def _row(self, stage: _Stage, is_quantized: bool, curve: MagnitudeCurve, error: float) -> Row:
        quantizer = self.config.quantizer
        label = _scheme(quantizer) if is_quantized else "full precision"
        if len(stage.prefix):
            label += f" + {stage.title}"
        value, seconds = self._evaluate(stage, is_quantized, label)
        kind = "quantized" if is_quantized else "full_precision"
        return Row(
            name=kind if stage.key == "none" else f"{kind}_{stage.key}",
            label=label,
            prefix=self.lm.decode(stage.prefix.token_ids),
            quantized=is_quantized,
            perplexity={self.corpus_name: value},
            largest_activation=curve.largest,
            quantization_error=error,
            seconds=stage.seconds + seconds,
        )

    def _evaluate(self, stage: _Stage, is_quantized: bool, label: str) -> tuple[float, float]:
        """Perplexity of one row, and the seconds of its calibration and evaluation."""
        config = self.config.eval
        ranges, calibration_key, seconds = None, None, 0.0
        if is_quantized and self.config.quantizer.needs_calibration:
            ranges, calibration_key = self._calibrate(stage.prefix)
            seconds = calibration_key["seconds"]
        quantizer = self._quantizer_identity(self.config.quantizer, calibration_key) if is_quantized else None
        depends_on = {
            "code": code_version("perplexity"),
            "model": self.lm.fingerprint,
            "prefix": stage.prefix.fingerprint,
            "quantizer": quantizer,
            "config": {key: getattr(config, key) for key in ("batch_size", "bos", "predict_first")},
            "blocks": tensor_digest([self.blocks]),
        }

        def make(workspace: Workspace) -> None:
            saved = workspace.checkpoint.load()
            state: dict[str, Any] = {"losses": [], "seconds": 0.0} if saved is None else saved[0]
            losses = [BlockLoss(**loss) for loss in state["losses"]]
            started = time.perf_counter() - state["seconds"]
            total = -(-len(self.blocks) // config.batch_size)

            def measure() -> None:
                for loss in block_losses(self.lm, stage.prefix, self.blocks, config, start=len(losses)):
                    losses.append(loss)
                    self.emit(Progress(f"perplexity, {label}", len(losses), total, "block"))
                    if workspace.checkpoint.due():
                        elapsed = time.perf_counter() - started
                        workspace.checkpoint.save({"losses": [asdict(item) for item in losses], "seconds": elapsed})

            if is_quantized:
                with quantized(self.lm, self.config.quantizer, ranges):
                    measure()
            else:
                measure()
            record = {
                "perplexity": perplexity(losses),
                "losses": [asdict(loss) for loss in losses],
                "seconds": time.perf_counter() - started,
            }
            write_json(workspace.folder / "perplexity.json", record)

        folder, _ = self._artifact("perplexity", depends_on, make)
        record = read_json(folder / "perplexity.json")
        self.emit(Record("perplexity", len(self.result.rows), {label: record["perplexity"]}))
        self.result.timings[f"perplexity, {label}"] = record["seconds"]
        return record["perplexity"], seconds + record["seconds"]

    # ---- small things ---------------------------------------------------------------------------------------------

    def _artifact(self, step: str, depends_on: dict[str, Any], make: Callable[[Workspace], None]) -> tuple[Path, bool]:
        folder, cached = self.store.get_or_make(step, depends_on, make)
        logger.debug("%s: %s %s", step, "found" if cached else "made", folder)
        return folder, cached

    def _grid_identity(self) -> dict[str, Any]:
        search: SearchConfig = self.config.search
        return {"bits": search.bits, "symmetric": search.symmetric, "levels": search.levels}

    @staticmethod
    def _quantizer_identity(quantizer: QuantizerConfig, calibration_key: dict[str, Any] | None) -> dict[str, Any]:
        identity = _without(to_dict(quantizer), "name", "calibration")
        if calibration_key is not None:
            identity["calibration"] = _without(calibration_key, "seconds")
        return identity

    def _warn(self, message: str) -> None:
        logger.warning(message)
        self.result.warnings.append(message)


def _scheme(quantizer: QuantizerConfig) -> str:
    """`per_tensor_static W8A8`, the way the field writes it."""
    weights, activations_bits = quantizer.weights.bits or 16, quantizer.activations.bits or 16
    return f"{quantizer.name} W{weights}A{activations_bits}"


def _without(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in keys}
