"""The expensive steps of a run, each an artifact under a key made of everything it depends on.

A step that another run has done already is read from the cache; one that was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

import inspect
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cushion import activations, prefix, tuning
from cushion import config as config_module
from cushion.activations import ChannelRanges, MagnitudeCurve, MagnitudeStatistics, observe_inputs
from cushion.artifacts import ArtifactStore, Workspace, read_json, write_json
from cushion.config import QuantizerConfig, RunConfig, to_dict
from cushion.data import Corpus
from cushion.errors import ArtifactError, NotFiniteError, TuningError
from cushion.evaluation import perplexity as perplexity_module
from cushion.evaluation.perplexity import BlockLoss, block_losses, perplexity
from cushion.events import Event, Progress, Record
from cushion.hashing import digest, tensor_digest
from cushion.models import LanguageModel, architectures, language_model
from cushion.prefix import Prefix
from cushion.preparation import Prepared
from cushion.quantization import calibration, linear, numerics, simulate, smoothquant
from cushion.quantization.calibration import calibrate
from cushion.quantization.simulate import quantized
from cushion.search import blockwise, greedy, objective, proposals, rounds
from cushion.search.greedy import Scored, SearchState, greedy_search
from cushion.search.objective import Objective
from cushion.search.proposals import propose
from cushion.tuning import TuningState, tune_prefix, tuning_quantizer

_COMMON = (sys.modules[__name__], config_module, architectures, language_model, prefix, numerics)
CODE: dict[str, tuple[ModuleType, ...]] = {
    "search": (*_COMMON, activations, blockwise, objective, rounds, proposals, greedy),
    "calibration": (*_COMMON, activations, calibration),
    "tuning": (*_COMMON, activations, linear, smoothquant, simulate, tuning),
    "activations": (*_COMMON, activations, blockwise, objective),
    "perplexity": (*_COMMON, linear, smoothquant, simulate, perplexity_module),
}
"""The modules whose source decides the outcome of a step: their text is part of the step's cache keys."""


def runtime(device_type: str) -> list[str]:
    """What else the bits of a result depend on: versions of torch and transformers, and the kind of device."""
    return [torch.__version__, transformers.__version__, device_type]


@lru_cache
def code_version(step: str) -> str:
    """Hash of the source of the modules that a step's outcome depends on."""
    return digest([inspect.getsource(module) for module in CODE[step]])


@dataclass(frozen=True)
class Calibration:
    """Ranges of every linear's input behind one prefix, what they depend on, and the seconds they took."""

    ranges: ChannelRanges
    depends_on: dict[str, Any]
    seconds: float


@dataclass(frozen=True)
class Tuned:
    """A tuned prefix and the record of its making."""

    prefix: Prefix
    record: dict[str, Any]
    seconds: float


class Steps:
    """The steps of one run.

    Args:
        emit: called with progress and with every point of a series.
        folder: the run's own folder, where a tuning that diverges leaves its last good prefix.
    """

    def __init__(self, config: RunConfig, prepared: Prepared, emit: Callable[[Event], None], folder: Path) -> None:
        self._config, self._emit, self._folder = config, emit, folder
        self._lm: LanguageModel = prepared.lm
        self._corpora: dict[str, Corpus] = prepared.corpora
        self._texts = prepared.texts
        self._start_tokens = prepared.start_tokens
        self._store = ArtifactStore(config.paths.cache)
        self._logged: set[tuple[str, int]] = set()

    def search(self, metadata: dict[str, Any]) -> tuple[SearchState, Prefix]:
        """Run the greedy search; its whole record, and the prefix found (empty where nothing was).

        Args:
            metadata: kept with the prefix.
        """
        config, texts = self._config.search, self._texts.search
        assert texts is not None
        counts = self._corpora["search"].token_counts(self._lm.encode, self._lm.vocabulary_size)
        candidates = propose(self._lm, config, counts, texts, self._config.seed)
        depends_on = self._depends_on(
            "search",
            config=_without(
                to_dict(config), "name", "method", "tokens", "token_ids", "candidates", "frequent", "user_tokens"
            ),
            candidates=digest(candidates),
            texts=tensor_digest([texts]),
        )

        def make(workspace: Workspace) -> None:
            saved = workspace.checkpoint.load()
            state = SearchState(list(self._start_tokens)) if saved is None else SearchState.from_dict(saved[0])
            for event in greedy_search(self._lm, config, texts, candidates, state):
                if isinstance(event, Scored):
                    stage = f"search step {event.step + 1}"
                    if event.stages > 1:
                        stage += f", round {event.stage + 1} of {event.stages}"
                    self._emit(Progress(stage, event.done, event.total, "candidate"))
                    if workspace.checkpoint.due():
                        workspace.checkpoint.save(state.to_dict())
                else:
                    self._log_series("search", [asdict(step) for step in state.steps])
                    workspace.checkpoint.save(state.to_dict())
            write_json(workspace.folder / "search.json", state.to_dict())
            if state.token_ids:  # the very bits, so that what depends on this prefix finds it on any machine
                Prefix.from_tokens(self._lm.model, state.token_ids).save(workspace.folder / "prefix")

        folder, _ = self._store.get_or_make("search", depends_on, make)
        with _damaged(folder):
            state = SearchState.from_dict(read_json(folder / "search.json"))
            found = Prefix.load(folder / "prefix") if state.token_ids else Prefix.empty()
        self._log_series("search", [asdict(step) for step in state.steps])
        text = self._lm.decode(state.token_ids)
        return state, replace(found, metadata={**metadata, "text": text})

    def tune(self, found: Prefix) -> Tuned:
        """Tune the keys and values of a prefix.

        Raises:
            TuningError: the loss is not finite any more; the message says where the last good prefix is kept.
        """
        config, quantizer = self._config.tuning, self._config.quantizer
        texts, held_out = self._texts.tuning, self._texts.held_out
        assert texts is not None and held_out is not None
        under = tuning_quantizer(config, quantizer)
        calibrated = self.calibrate(found) if under.needs_calibration else None
        depends_on = self._depends_on(
            "tuning",
            prefix=found.fingerprint,
            config=_without(to_dict(config), "name", "method"),
            objective=self._grid(),
            quantizer=_quantizer_identity(under, calibrated),
            texts=tensor_digest([texts, held_out]),
            seed=self._config.seed,
        )

        def make(workspace: Workspace) -> None:
            saved = workspace.checkpoint.load()
            state = None if saved is None else TuningState.from_checkpoint(*saved, found)
            started = time.perf_counter() - (0.0 if saved is None else saved[0]["seconds"])
            steps = tune_prefix(
                self._lm,
                found,
                config,
                quantizer,
                self._config.search,
                texts,
                held_out,
                seed=self._config.seed,
                calibration=None if calibrated is None else calibrated.ranges,
                state=state,
            )
            try:
                for current in steps:
                    state = current
                    self._emit(Progress("tuning", len(state.steps), config.total_steps, "step"))
                    self._log_series("tuning", [asdict(state.steps[-1])])
                    if workspace.checkpoint.due():
                        scalars, tensors = state.to_checkpoint()
                        workspace.checkpoint.save({**scalars, "seconds": time.perf_counter() - started}, tensors)
            except TuningError as error:
                if state is None:
                    raise
                kept = self._folder / "last_good_prefix"
                state.best.save(kept)
                raise TuningError(
                    f"{error} -- the best prefix before that (step {state.best_step}) is kept in {kept}.safetensors"
                ) from error
            assert state is not None
            state.best.save(workspace.folder / "prefix")
            record = {
                "steps": [asdict(step) for step in state.steps],
                "best_step": state.best_step,
                "best_loss": state.best_loss,
                "initial_loss": state.initial_loss,
                "seconds": time.perf_counter() - started,
            }
            write_json(workspace.folder / "tuning.json", record)

        folder, _ = self._store.get_or_make("tuning", depends_on, make)
        with _damaged(folder):
            stored = read_json(folder / "tuning.json")
            record = {key: stored[key] for key in ("steps", "best_step", "best_loss", "initial_loss", "seconds")}
            tuned = replace(Prefix.load(folder / "prefix"), metadata={**found.metadata, "tuning": config.name})
            seconds = float(record["seconds"])
        self._log_series("tuning", record["steps"])
        return Tuned(tuned, record, seconds)

    def calibrate(self, behind: Prefix) -> Calibration:
        """Ranges of every linear's input over the calibration texts behind a prefix."""
        texts = self._texts.calibration
        assert texts is not None
        depends_on = self._depends_on("calibration", prefix=behind.fingerprint, texts=tensor_digest([texts]))

        def make(workspace: Workspace) -> None:
            started = time.perf_counter()
            ranges = ChannelRanges()
            for done in calibrate(self._lm, behind, texts, ranges):
                self._emit(Progress("calibration", done, len(texts), "text"))
            tensors = {f"minimum.{name}": low.cpu() for name, low in ranges.minimum.items()}
            tensors |= {f"maximum.{name}": high.cpu() for name, high in ranges.maximum.items()}
            save_file(tensors, workspace.folder / "ranges.safetensors")
            write_json(workspace.folder / "calibration.json", {"seconds": time.perf_counter() - started})

        folder, _ = self._store.get_or_make("calibration", depends_on, make)
        with _damaged(folder):
            seconds = float(read_json(folder / "calibration.json")["seconds"])
        return Calibration(self._read_ranges(folder), depends_on, seconds)

    def _read_ranges(self, folder: Path) -> ChannelRanges:
        path = folder / "ranges.safetensors"
        try:
            tensors = load_file(path, device=str(self._lm.device))
        except (OSError, SafetensorError) as error:
            raise ArtifactError(f"{path} is damaged ({error}): delete the folder {folder} and run again") from error
        ranges = ChannelRanges()
        for name, tensor in tensors.items():
            kind, _, linear_name = name.partition(".")
            (ranges.minimum if kind == "minimum" else ranges.maximum)[linear_name] = tensor
        return ranges

    def measure_activations(self, behind: Prefix, title: str) -> tuple[MagnitudeCurve, float]:
        """The magnitude curve and the mean L_q per text behind a prefix, on the full-precision model."""
        texts = self._texts.activations
        depends_on = self._depends_on(
            "activations", prefix=behind.fingerprint, grid=self._grid(), texts=tensor_digest([texts])
        )

        def make(workspace: Workspace) -> None:
            statistics, errors = MagnitudeStatistics(), []
            error_of = Objective(replace(self._config.search, objective="quantization_error"))
            for done, text in enumerate(texts, start=1):
                with observe_inputs(self._lm.named_blocks, statistics):
                    errors.append(error_of(self._lm, behind, text[None], skip=0).item())
                self._emit(Progress(f"activations, {title}", done, len(texts), "text"))
            curve, error = statistics.curve(), sum(errors) / len(errors)
            if not (math.isfinite(curve.largest) and math.isfinite(error)):
                raise NotFiniteError(
                    f"the activations of {self._lm.label} are not finite ({title}: largest {curve.largest}, L_q "
                    f"{error}): use model.dtype=bfloat16 or float32"
                )
            record = {"curve": asdict(curve), "quantization_error": error}
            write_json(workspace.folder / "activations.json", record)

        folder, _ = self._store.get_or_make("activations", depends_on, make)
        with _damaged(folder):
            record = read_json(folder / "activations.json")
            return MagnitudeCurve(**record["curve"]), float(record["quantization_error"])

    def evaluate(self, behind: Prefix, quantizer: QuantizerConfig | None, label: str) -> tuple[float, float]:
        """Perplexity behind a prefix, quantized or not, and the seconds of its calibration and evaluation."""
        config, blocks = self._config.eval, self._texts.blocks
        calibrated = self.calibrate(behind) if quantizer is not None and quantizer.needs_calibration else None
        depends_on = self._depends_on(
            "perplexity",
            prefix=behind.fingerprint,
            quantizer=None if quantizer is None else _quantizer_identity(quantizer, calibrated),
            config={key: getattr(config, key) for key in ("batch_size", "bos", "predict_first")},
            blocks=tensor_digest([blocks]),
        )

        def measure(losses: list[BlockLoss], workspace: Workspace, started: float) -> None:
            total = -(-len(blocks) // config.batch_size)
            for loss in block_losses(self._lm, behind, blocks, config, start=len(losses)):
                losses.append(loss)
                self._emit(Progress(f"perplexity, {label}", len(losses), total, "block"))
                if workspace.checkpoint.due():
                    elapsed = time.perf_counter() - started
                    workspace.checkpoint.save({"losses": [asdict(item) for item in losses], "seconds": elapsed})

        def make(workspace: Workspace) -> None:
            saved = workspace.checkpoint.load()
            state: dict[str, Any] = {"losses": [], "seconds": 0.0} if saved is None else saved[0]
            losses = [BlockLoss(**loss) for loss in state["losses"]]
            started = time.perf_counter() - state["seconds"]
            if quantizer is None:
                measure(losses, workspace, started)
            else:
                with quantized(self._lm, quantizer, None if calibrated is None else calibrated.ranges):
                    measure(losses, workspace, started)
            record = {
                "perplexity": perplexity(losses),
                "losses": [asdict(loss) for loss in losses],
                "seconds": time.perf_counter() - started,
            }
            write_json(workspace.folder / "perplexity.json", record)

        folder, _ = self._store.get_or_make("perplexity", depends_on, make)
        with _damaged(folder):
            record = read_json(folder / "perplexity.json")
            seconds = float(record["seconds"]) + (0.0 if calibrated is None else calibrated.seconds)
            return float(record["perplexity"]), seconds

    def _depends_on(self, step: str, **others: Any) -> dict[str, Any]:
        """What every artifact depends on, and what this one depends on besides."""
        return {
            "code": code_version(step),
            "runtime": runtime(self._lm.device.type),
            "model": self._lm.fingerprint,
            **others,
        }

    def _grid(self) -> dict[str, Any]:
        search = self._config.search
        return {"bits": search.bits, "symmetric": search.symmetric, "levels": search.levels}

    def _log_series(self, kind: str, steps: list[dict[str, Any]]) -> None:
        """Emit each step of a series once: live while it is computed, afterwards where it came from the cache."""
        for step in steps:
            if (kind, step["step"]) not in self._logged:
                self._logged.add((kind, step["step"]))
                self._emit(Record(kind, step["step"], _without(step, "step")))


@contextmanager
def _damaged(folder: Path) -> Iterator[None]:
    """Turn what reading a damaged artifact raises into an `ArtifactError` that says which folder to delete."""
    try:
        yield
    except (ArtifactError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"the cached step in {folder} is damaged ({error}): delete that folder") from error


def _quantizer_identity(quantizer: QuantizerConfig, calibrated: Calibration | None) -> dict[str, Any]:
    identity = _without(to_dict(quantizer), "name", "calibration")
    return identity if calibrated is None else {**identity, "calibration": calibrated.depends_on}


def _without(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in keys}
