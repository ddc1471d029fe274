"""The expensive steps of a run, each an artifact under a key made of everything it depends on.

A step that another run has done already is read from the cache; one that was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

import inspect
import math
import sys
import time
from collections.abc import Callable, Iterator, Set
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cushion import activations, checks, prefix, row, tuning
from cushion import config as config_module
from cushion.activations import ChannelRanges, MagnitudeCurve, MagnitudeStatistics, observe_inputs
from cushion.artifacts import ArtifactStore, Workspace, read_json, reading, write_json
from cushion.config import QuantizerConfig, RunConfig, SearchConfig, to_dict
from cushion.data import Corpus
from cushion.errors import ArtifactError, NotFiniteError, TuningError
from cushion.evaluation import activation_map as activation_map_module
from cushion.evaluation import attention, harness, perplexity, tasks
from cushion.evaluation.activation_map import MAP_POSITIONS, ActivationMap, activation_map
from cushion.evaluation.attention import AttentionShares, attention_shares
from cushion.events import Event, Progress, Record
from cushion.execution import registry as execution_registry
from cushion.execution import simulated
from cushion.hashing import digest, tensor_digest
from cushion.models import LanguageModel, architectures, experts, language_model
from cushion.prefix import Prefix
from cushion.preparation import Prepared
from cushion.quantization import (
    alpha_search,
    calibration,
    check,
    fitted,
    hadamard,
    linear,
    numerics,
    qfem,
    replacements,
    rotation,
    smoothing,
    smoothquant,
)
from cushion.quantization import attention as attention_quantizer
from cushion.quantization import quantizer as quantizer_module
from cushion.quantization.alpha_search import AlphaSearch, search_alpha
from cushion.quantization.calibration import calibrate
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.parts import activations as activations_part
from cushion.quantization.parts import attention as attention_part
from cushion.quantization.parts import base, grids, kv_cache, registry, weights
from cushion.quantization.parts import qfem as qfem_part
from cushion.quantization.parts import rotation as rotation_part
from cushion.quantization.parts import smoothing as smoothing_part
from cushion.quantization.qfem import ModuleRatios, RatioObserver, measure_ratios, without_rounding
from cushion.quantization.rotation import rotated
from cushion.row import Measured, RowMeasurement
from cushion.search import batching, blockwise, greedy, objective, prefixquant, proposals, qfep, replicas, rounds, scan
from cushion.search.greedy import Scored, SearchState, greedy_search
from cushion.search.objective import Objective
from cushion.search.prefixquant import PrefixQuantRecord, prefixquant_rule
from cushion.search.proposals import Proposal, propose
from cushion.search.qfep import QfepRecord, qfep_search
from cushion.search.scan import Scanned
from cushion.tuning import TuningState, tune_prefix, tuning_quantizer

_ROTATION = (hadamard, replacements, rotation)
_QUANTIZED = (
    *_ROTATION,
    attention_quantizer,
    linear,
    smoothquant,
    smoothing,
    check,
    fitted,
    execution_registry,
    simulated,
)
_PARTS = (base, grids, registry, weights, activations_part, kv_cache, attention_part)
_CONFIG = (config_module, checks, quantizer_module, *_PARTS, smoothing_part, rotation_part, qfem_part)
_COMMON = (sys.modules[__name__], *_CONFIG, architectures, experts, language_model, prefix, numerics)
CODE: dict[str, tuple[ModuleType, ...]] = {
    "search": (*_COMMON, activations, blockwise, objective, rounds, proposals, batching, replicas, greedy),
    "proposal": (*_COMMON, activations, blockwise, objective, rounds, proposals),
    "qfep": (*_COMMON, activations, scan, qfep),
    "prefixquant": (*_COMMON, activations, scan, prefixquant),
    "calibration": (*_COMMON, *_ROTATION, activations, calibration),
    "tuning": (*_COMMON, activations, *_QUANTIZED, tuning),
    "activations": (*_COMMON, activations, blockwise, objective),
    "activation_map": (*_COMMON, activations, blockwise, activation_map_module),
    "attention": (*_COMMON, attention),
    "perplexity": (*_COMMON, *_QUANTIZED, row, perplexity),
    "task": (*_COMMON, *_QUANTIZED, row, harness, tasks),
    "ratios": (*_COMMON, activations, *_QUANTIZED, qfem),
    "alpha": (*_COMMON, *_QUANTIZED, perplexity, qfem, alpha_search),
}
"""The modules whose source decides the outcome of a step: their text is part of the step's cache keys."""

_RULES: dict[str, tuple[Callable[..., Iterator[Any]], type[QfepRecord | PrefixQuantRecord], tuple[str, ...]]] = {
    "qfep": (qfep_search, QfepRecord, ("contexts", "outlier_tokens")),
    "prefixquant": (prefixquant_rule, PrefixQuantRecord, ("eta", "max_length")),
}
"""Per rule: its search, the record of what it found, and the configuration that it depends on."""


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
class Kept:
    """The linears that keep full-precision activations behind one prefix, how they were chosen, and the seconds."""

    names: frozenset[str]
    record: dict[str, Any]
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
        self._prepared = prepared
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
        proposal = self._propose(config, texts)
        candidates = proposal.token_ids
        depends_on = self._depends_on(
            "search",
            config=_without(
                to_dict(config),
                "name",
                "method",
                "tokens",
                "token_ids",
                "seed",
                "candidates",
                "frequent",
                "user_tokens",
                *(() if config.budget_seconds else ("replicas",)),  # they decide how far a search gets in its seconds
            ),
            candidates=digest(candidates),
            texts=tensor_digest([texts]),
        )

        def make(workspace: Workspace) -> None:
            saved = workspace.checkpoint.load()
            if saved is None:
                state = SearchState(
                    list(self._start_tokens),
                    proposal_token_forwards=proposal.token_forwards,
                    proposal_seconds=proposal.seconds,
                )
            else:
                state = SearchState.from_dict(saved[0])
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
        with reading(folder):
            state = SearchState.from_dict(read_json(folder / "search.json"))
            found = Prefix.load(folder / "prefix") if state.token_ids else Prefix.empty()
        self._log_series("search", [asdict(step) for step in state.steps])
        text = self._lm.decode(state.token_ids)
        return state, replace(found, metadata={**metadata, "text": text})

    def _propose(self, config: SearchConfig, texts: Tensor) -> Proposal:
        """The candidates of the greedy search; an artifact of its own where the model is run to name them."""

        def name_tokens() -> Proposal:
            return propose(self._lm, config, self._count_search_tokens, texts, self._config.search_seed)

        if config.proposal != "outlier":
            return name_tokens()
        depends_on = self._depends_on("proposal", candidates=config.candidates, texts=tensor_digest([texts]))

        def make(workspace: Workspace) -> None:
            self._emit(Progress("outlier tokens", 0, 1, "pass"))
            write_json(workspace.folder / "proposal.json", asdict(name_tokens()))
            self._emit(Progress("outlier tokens", 1, 1, "pass"))

        folder, _ = self._store.get_or_make("proposal", depends_on, make)
        with reading(folder):
            return Proposal(**read_json(folder / "proposal.json"))

    def _count_search_tokens(self) -> Tensor:
        return self._corpora["search"].token_counts(self._lm.encode, self._lm.vocabulary_size)

    def search_by_rule(self, metadata: dict[str, Any]) -> tuple[dict[str, Any], Prefix]:
        """Run QFeP or PrefixQuant's rule; its record, and the prefix found (empty where nothing was).

        Args:
            metadata: kept with the prefix.
        """
        config, texts = self._config.search, self._texts.search
        assert texts is not None
        find, kind, keys = _RULES[config.method]
        depends_on = self._depends_on(
            config.method, config={key: getattr(config, key) for key in keys}, texts=tensor_digest([texts])
        )

        def make(workspace: Workspace) -> None:
            for event in find(self._lm, config, texts):
                if isinstance(event, Scanned):
                    self._emit(Progress(f"{config.method}, {event.unit}s", event.done, event.total, event.unit))
                else:
                    write_json(workspace.folder / "search.json", asdict(event))
                    if event.token_ids:
                        Prefix.from_tokens(self._lm.model, event.token_ids).save(workspace.folder / "prefix")

        folder, _ = self._store.get_or_make(config.method, depends_on, make)
        with reading(folder):
            stored = read_json(folder / "search.json")
            record = {field.name: stored[field.name] for field in fields(kind)}
            found = Prefix.load(folder / "prefix") if record["token_ids"] else Prefix.empty()
        text = self._lm.decode(record["token_ids"])
        return record, replace(found, metadata={**metadata, "text": text})

    def tune(self, found: Prefix) -> Tuned:
        """Tune the keys and values of a prefix.

        Raises:
            TuningError: the loss is not finite any more; the message says where the last good prefix is kept.
        """
        config, quantizer = self._config.tuning, self._config.quantizer
        texts, held_out = self._texts.tuning, self._texts.held_out
        assert texts is not None and held_out is not None
        under = tuning_quantizer(config, quantizer)
        calibrated = self.calibrate(found, under) if under.needs_calibration else None
        modules = self.keep(found, quantizer, "found prefix").names if under.uses_qfem else None
        depends_on = self._depends_on(
            "tuning",
            prefix=found.fingerprint,
            config=_without(to_dict(config), "name", "method"),
            objective=self._grid(),
            quantizer=_quantizer_identity(under, calibrated, modules or frozenset()),
            texts=tensor_digest([texts, held_out]),
            seed=self._config.seed,
        )

        def make(workspace: Workspace) -> None:
            saved = workspace.checkpoint.load()
            state = None if saved is None else TuningState.from_checkpoint(*saved, found)
            self._log_series("tuning", [] if state is None else [asdict(step) for step in state.steps])
            started = time.perf_counter() - (0.0 if saved is None else saved[0]["seconds"])
            steps = tune_prefix(
                self._lm,
                found,
                config,
                FittedQuantizer(quantizer, None if calibrated is None else calibrated.ranges, modules),
                self._config.search,
                texts,
                held_out,
                seed=self._config.seed,
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
        with reading(folder):
            stored = read_json(folder / "tuning.json")
            record = {key: stored[key] for key in ("steps", "best_step", "best_loss", "initial_loss", "seconds")}
            tuned = replace(Prefix.load(folder / "prefix"), metadata={**found.metadata, "tuning": config.name})
            seconds = float(record["seconds"])
        self._log_series("tuning", record["steps"])
        return Tuned(tuned, record, seconds)

    def calibrate(self, behind: Prefix, quantizer: QuantizerConfig) -> Calibration:
        """Ranges of every linear's input over the calibration texts behind a prefix, rotated as the quantizer says."""
        texts = self._texts.calibration
        assert texts is not None
        turned = (quantizer.rotation, 0 if quantizer.rotation == "none" else quantizer.rotation_seed)
        depends_on = self._depends_on(
            "calibration", prefix=behind.fingerprint, rotation=list(turned), texts=tensor_digest([texts])
        )

        def make(workspace: Workspace) -> None:
            started = time.perf_counter()
            ranges = ChannelRanges()
            with rotated(self._lm, *turned):
                for done in calibrate(self._lm, behind, texts, ranges):
                    self._emit(Progress("calibration", done, len(texts), "text"))
            tensors = {f"minimum.{name}": low.cpu() for name, low in ranges.minimum.items()}
            tensors |= {f"maximum.{name}": high.cpu() for name, high in ranges.maximum.items()}
            save_file(tensors, workspace.folder / "ranges.safetensors")
            write_json(workspace.folder / "calibration.json", {"seconds": time.perf_counter() - started})

        folder, _ = self._store.get_or_make("calibration", depends_on, make)
        with reading(folder):
            seconds = float(read_json(folder / "calibration.json")["seconds"])
        ranges = self._read_ranges(folder)
        ranges.rotation = turned
        return Calibration(ranges, depends_on, seconds)

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
        with reading(folder):
            record = read_json(folder / "activations.json")
            return MagnitudeCurve(**record["curve"]), float(record["quantization_error"])

    def map_activations(self, behind: Prefix, block: int, channels: list[int] | None, title: str) -> ActivationMap:
        """Magnitudes at a block's input in the first activation text behind a prefix, on the full-precision model.

        Args:
            channels: which channels; None for those with the largest magnitudes behind this prefix.

        """
        text = self._texts.activations[0, :MAP_POSITIONS]
        depends_on = self._depends_on(
            "activation_map",
            prefix=behind.fingerprint,
            block=block,
            channels=channels,
            texts=tensor_digest([text]),
        )

        def make(workspace: Workspace) -> None:
            self._emit(Progress(f"activation map, {title}", 0, 1, "pass"))
            write_json(
                workspace.folder / "activation_map.json",
                asdict(activation_map(self._lm, behind, text, block, channels)),
            )
            self._emit(Progress(f"activation map, {title}", 1, 1, "pass"))

        folder, _ = self._store.get_or_make("activation_map", depends_on, make)
        with reading(folder):
            return ActivationMap(**read_json(folder / "activation_map.json"))

    def keep(self, behind: Prefix, quantizer: QuantizerConfig, title: str) -> Kept:
        """QFeM: the linears that keep full-precision activations behind a prefix, by their ratios and alpha.

        The record has the fields of `qfem.<stage>` in result.json.
        """
        ratios, ratios_from, seconds = self._ratios(behind, quantizer, title)
        ratios = ratios.of(list(self._lm.linears(quantizer.targets)))
        alpha, search = quantizer.qfem.alpha, None
        if alpha is None:
            search = self._search_alpha(behind, quantizer, ratios, ratios_from, title)
            alpha = float(search["points"][search["found"]]["alpha"])
            seconds += search["seconds"]
        kept = ratios.above(alpha)
        record = {
            "alpha": alpha,
            "kept": kept,
            "ratios": ratios.ratios,
            "groups": ratios.groups,
            "alpha_search": search,
            "seconds": seconds,
        }
        return Kept(frozenset(kept), record, seconds)

    def _ratios(
        self, behind: Prefix, quantizer: QuantizerConfig, title: str
    ) -> tuple[ModuleRatios, dict[str, Any], float]:
        texts, plain = self._texts.calibration, without_rounding(quantizer)
        assert texts is not None
        calibrated = self.calibrate(behind, quantizer) if plain.needs_calibration else None
        depends_on = self._depends_on(
            "ratios",
            prefix=behind.fingerprint,
            quantizer=_quantizer_identity(plain, calibrated),
            texts=tensor_digest([texts]),
        )

        def make(workspace: Workspace) -> None:
            started, observer = time.perf_counter(), RatioObserver()
            fitted = FittedQuantizer(quantizer, None if calibrated is None else calibrated.ranges)
            for done in measure_ratios(self._lm, behind, texts, fitted, observer):
                self._emit(Progress(f"ratios, {title}", done, len(texts), "text"))
            record = {**asdict(observer.ratios()), "seconds": time.perf_counter() - started}
            write_json(workspace.folder / "ratios.json", record)

        folder, _ = self._store.get_or_make("ratios", depends_on, make)
        with reading(folder):
            record = read_json(folder / "ratios.json")
            return ModuleRatios(record["ratios"], record["groups"]), depends_on, float(record["seconds"])

    def _search_alpha(
        self, behind: Prefix, quantizer: QuantizerConfig, ratios: ModuleRatios, ratios_from: dict[str, Any], title: str
    ) -> dict[str, Any]:
        settings, texts = quantizer.qfem, self._texts.calibration
        assert texts is not None
        texts = texts[: settings.texts]
        calibrated = self.calibrate(behind, quantizer) if quantizer.needs_calibration else None
        depends_on = self._depends_on(
            "alpha",
            prefix=behind.fingerprint,
            quantizer=_quantizer_identity(quantizer, calibrated),
            ratios=ratios_from,
            texts=tensor_digest([texts]),
            target=settings.target,
            curve=settings.curve,
        )

        def make(workspace: Workspace) -> None:
            saved = workspace.checkpoint.load()
            state, before = AlphaSearch(), 0.0
            if saved is not None:
                state.reference, before = saved[0]["reference"], saved[0]["seconds"]
                state.points = {int(number): value for number, value in saved[0]["points"].items()}
            started, kept_points = time.perf_counter() - before, -1
            fitted = FittedQuantizer(quantizer, None if calibrated is None else calibrated.ranges)
            for done, at_most in search_alpha(self._lm, behind, fitted, ratios, texts, state):
                self._emit(Progress(f"alpha search, {title}", done, at_most, "text"))
                if state.reference is not None and len(state.points) != kept_points:
                    seconds = time.perf_counter() - started
                    progress = {"reference": state.reference, "points": state.points, "seconds": seconds}
                    workspace.checkpoint.save(progress)
                    kept_points = len(state.points)
            record = _alpha_record(state, ratios, settings.target, len(texts), time.perf_counter() - started)
            write_json(workspace.folder / "alpha.json", record)

        folder, _ = self._store.get_or_make("alpha", depends_on, make)
        with reading(folder):
            record = read_json(folder / "alpha.json")
            float(record["points"][record["found"]]["alpha"]), float(record["seconds"])
            return {key: record[key] for key in _ALPHA_KEYS}

    def measure_attention(self, behind: Prefix, title: str) -> AttentionShares | None:
        """Where attention goes behind a prefix, on the full-precision model; None where it is not asked for."""
        count, first = self._config.eval.attention_texts, self._config.eval.attention_first
        if count == 0:
            return None
        texts = self._texts.activations[:count]
        depends_on = self._depends_on("attention", prefix=behind.fingerprint, first=first, texts=tensor_digest([texts]))

        def make(workspace: Workspace) -> None:
            self._emit(Progress(f"attention, {title}", 0, 1, "pass"))
            shares = attention_shares(self._lm, behind, texts, first)
            write_json(workspace.folder / "attention.json", asdict(shares))
            self._emit(Progress(f"attention, {title}", 1, 1, "pass"))

        folder, _ = self._store.get_or_make("attention", depends_on, make)
        with reading(folder):
            return AttentionShares(**read_json(folder / "attention.json"))

    def measure_row(
        self,
        behind: Prefix,
        quantizer: QuantizerConfig | None,
        label: str,
        keep: Set[str] = frozenset(),
        samples: Path | None = None,
    ) -> Measured:
        """Perplexities and task scores behind a prefix, quantized or not; the seconds include its calibration.

        Args:
            keep: the linears whose input stays in full precision, where the quantizer uses QFeM.
            samples: folder for lm-eval's record of every sample, None for none.

        """
        calibrated = None
        if quantizer is not None and quantizer.needs_calibration:
            calibrated = self.calibrate(behind, quantizer)
        identity = None if quantizer is None else _quantizer_identity(quantizer, calibrated, keep)

        def depends_on(step: str, **others: Any) -> dict[str, Any]:
            return self._depends_on(step, prefix=behind.fingerprint, quantizer=identity, **others)

        fitted = None
        if quantizer is not None:
            fitted = FittedQuantizer(quantizer, None if calibrated is None else calibrated.ranges, frozenset(keep))
        row = RowMeasurement(
            self._lm,
            self._config.eval,
            behind,
            fitted,
            label,
            self._store,
            depends_on,
            self._emit,
        )
        blocks = self._prepared.blocks_behind(self._config.eval, len(behind))
        measured = row.measure(blocks, self._prepared.tasks, samples)
        return measured if calibrated is None else replace(measured, seconds=measured.seconds + calibrated.seconds)

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


def _alpha_record(
    state: AlphaSearch, ratios: ModuleRatios, target: float, texts: int, seconds: float
) -> dict[str, Any]:
    """What a finished search for alpha found, as `qfem.<stage>.alpha_search` of result.json has it."""
    alphas, points = ratios.thresholds(), []
    for number, value in sorted(state.points.items()):
        kept = ratios.above(alphas[number])
        groups = sum(set(group) <= set(kept) for group in ratios.groups)
        point = {"alpha": alphas[number], "kept_groups": groups, "kept_modules": len(kept), "perplexity": value}
        points.append((number, point))
    numbers = [number for number, _ in points]
    assert state.found is not None
    return {
        "target": target,
        "texts": texts,
        "reference_perplexity": state.reference,
        "points": [point for _, point in points],
        "found": numbers.index(state.found),
        "reached": state.reached,
        "contradictions": [numbers.index(number) for number in state.contradictions(target)],
        "seconds": seconds,
    }


_ALPHA_KEYS = (
    "target",
    "texts",
    "reference_perplexity",
    "points",
    "found",
    "reached",
    "contradictions",
    "seconds",
)


def _quantizer_identity(
    quantizer: QuantizerConfig, calibrated: Calibration | None, keep: Set[str] = frozenset()
) -> dict[str, Any]:
    """What of a quantizer decides an outcome; of QFeM, the linears that it keeps."""
    identity = {**_without(to_dict(quantizer), "name", "calibration", "qfem"), "keep": sorted(keep)}
    return identity if calibrated is None else {**identity, "calibration": calibrated.depends_on}


def _without(record: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in keys}
