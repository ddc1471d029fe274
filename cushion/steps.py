"""The cached steps of one run, each given what it works on: the run's texts, options and model.

What a step computes, and what its key is made of, stands beside the computation; here is only which step gets what.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cushion.activations import MagnitudeCurve
from cushion.artifacts import ArtifactStore
from cushion.config import QuantizerConfig, RunConfig
from cushion.evaluation.activation_map import ActivationMap, ActivationMapStep
from cushion.evaluation.alpha_step import AlphaStep
from cushion.evaluation.attention import AttentionShares, AttentionStep
from cushion.evaluation.magnitudes import MagnitudesStep
from cushion.evaluation.sparsity import SPARSITY_TOKENS, SparsityStep
from cushion.evaluation.spikes import SpikesStep
from cushion.events import Event
from cushion.hashing import digest
from cushion.prefix import Prefix
from cushion.preparation import Prepared
from cushion.quantization.calibration import Calibration, CalibrationStep
from cushion.quantization.fitting_step import FittingStep
from cushion.quantization.identity import rotation_of
from cushion.quantization.input_statistics import InputStatistics, InputStatisticsStep
from cushion.quantization.lazily import QuantizedLazily
from cushion.quantization.learned import Learned
from cushion.quantization.parts.qfem import RATIOS
from cushion.quantization.parts.registry import without_rounding
from cushion.quantization.parts.rotation_sites import LEFT_ALONE
from cushion.quantization.parts.smoothing_search import SEARCHED
from cushion.quantization.reconstruction_step import Reconstructed, ReconstructionStep
from cushion.quantization.rotation_sites_step import RotationSitesStep
from cushion.quantization.smoothing_search_step import SmoothingSearchStep
from cushion.row import Measured, measure_row
from cushion.search.methods import METHODS, Found, SearchContext
from cushion.step import Context, compute
from cushion.tuning_ranges import tuning_quantizer
from cushion.tuning_step import Tuned, TuningRun


@dataclass(frozen=True)
class Kept:
    """The linears that keep full-precision activations behind one prefix, how they were chosen, and the seconds."""

    names: frozenset[str]
    record: dict[str, Any]
    seconds: float


class Steps:
    """The steps of one run.

    Args:
        emit: called with progress and with every point of a series.
        folder: the run's own folder, where a tuning that diverges leaves its last good prefix.
    """

    def __init__(self, config: RunConfig, prepared: Prepared, emit: Callable[[Event], None], folder: Path) -> None:
        self._config, self._prepared, self._folder = config, prepared, folder
        self._lm, self._texts = prepared.lm, prepared.texts
        self._context = Context(prepared.lm, ArtifactStore(config.paths.cache), emit)

    def search(self) -> Found | None:
        """Find the prefix by the method of the configuration; None for a run without one."""
        config, prepared = self._config, self._prepared
        metadata = {
            "model": config.model.path,
            "model_fingerprint": self._lm.fingerprint,
            "search": config.search.name,
        }

        def count_tokens() -> Tensor:
            return prepared.corpora["search"].token_counts(self._lm.encode, self._lm.vocabulary_size)

        context = SearchContext(
            config, self._lm, prepared.start_tokens, metadata, self._texts.search, count_tokens, self._context
        )
        return METHODS[config.search.method].run(context)

    def tune(self, found: Prefix) -> Tuned:
        """Tune the keys and values of a prefix.

        Raises:
            TuningError: the loss is not finite any more; the message says where the last good prefix is kept.
        """
        config, quantizer = self._config.tuning, self._config.quantizer
        texts, held_out = self._texts.tuning, self._texts.held_out
        assert texts is not None and held_out is not None
        under = tuning_quantizer(config, quantizer)
        keep = self.keep(found, quantizer, "found prefix").names if under.uses_qfem else None
        step = TuningRun(
            found,
            config,
            quantizer,
            self._config.search,
            texts,
            held_out,
            self._config.seed,
            self._folder,
            self._calibrate_if_needed(found, under, keep or frozenset()),
            keep,
            self._texts.calibration if config.ranges == "static" else None,
        )
        return compute(step, self._context)

    def calibrate(self, behind: Prefix, quantizer: QuantizerConfig) -> Calibration:
        """Ranges of every linear's input over the calibration texts behind a prefix, rotated as the quantizer says."""
        texts = self._texts.calibration
        assert texts is not None
        rotation, seed = rotation_of(quantizer)
        return compute(CalibrationStep(behind, (rotation, seed), texts), self._context)

    def _ranges_if_needed(self, behind: Prefix, quantizer: QuantizerConfig) -> Calibration | None:
        return self.calibrate(behind, quantizer) if quantizer.needs_calibration else None

    def _calibrate_if_needed(
        self, behind: Prefix, quantizer: QuantizerConfig, keep: frozenset[str] = frozenset()
    ) -> Calibration | None:
        """Everything that the quantizer has to know before it goes on the model; None where that is nothing.

        Args:
            keep: the linears whose input stays in full precision, where the quantizer uses QFeM.

        """
        seen = self._see_inputs(behind, quantizer)
        if not quantizer.blockwise:
            return seen
        texts = self._texts.calibration
        assert texts is not None
        under = quantizer.fitted_under
        if under is quantizer:
            step = FittingStep(behind, quantizer, seen, keep, texts)
        else:
            step = FittingStep(behind, under, self._seen_of_weights(behind, under, seen), frozenset(), texts)
        fitted = compute(step, self._context)
        seen = seen or Calibration(None, "", 0.0)
        return replace(
            seen, key=digest([seen.key, fitted.key]), seconds=seen.seconds + fitted.seconds, fits=fitted.fits
        )

    def _seen_of_weights(self, behind: Prefix, under: QuantizerConfig, seen: Calibration | None) -> Calibration | None:
        """What a quantizer of weights alone has to know; it transforms the model as `seen` found for the whole one."""
        if SEARCHED in under.gathered:
            return seen
        if LEFT_ALONE not in under.gathered:
            return self._see_inputs(behind, under)
        assert seen is not None
        ranges, sites = self._ranges_if_needed(behind, under), seen.inputs[LEFT_ALONE]
        key = digest([None if ranges is None else ranges.key, sorted(sites)])
        return Calibration(None if ranges is None else ranges.ranges, key, 0.0, {LEFT_ALONE: sites})

    def _see_inputs(self, behind: Prefix, quantizer: QuantizerConfig) -> Calibration | None:
        ranges = self._ranges_if_needed(behind, quantizer)
        if not quantizer.gathered - {RATIOS}:
            return ranges
        gathered = self._gather(behind, quantizer, "prefix" if len(behind) else "no prefix")
        found = (None, [], 0.0) if ranges is None else (ranges.ranges, [ranges.key], ranges.seconds)
        key = digest([*found[1], gathered.key])
        own_seconds = 0.0 if RATIOS in quantizer.gathered else gathered.seconds  # else they are counted with QFeM's
        return Calibration(found[0], key, found[2] + own_seconds, gathered.found)

    def _gather(self, behind: Prefix, quantizer: QuantizerConfig, title: str) -> InputStatistics:
        """All that the parts of a quantizer need to know of the inputs as they find them, in one pass."""
        texts = self._texts.calibration
        assert texts is not None
        plain = self._ranges_if_needed(behind, without_rounding(quantizer))
        first = plain
        if SEARCHED in quantizer.gathered:
            first = compute(SmoothingSearchStep(behind, quantizer, first, texts), self._context)
        if LEFT_ALONE in quantizer.gathered:
            first = compute(RotationSitesStep(behind, quantizer, first, texts), self._context)
        found = compute(InputStatisticsStep(behind, quantizer, first, texts, title), self._context)
        own = (0.0 if first is None else first.seconds) - (0.0 if plain is None else plain.seconds)
        return replace(found, seconds=found.seconds + own)

    def measure_activations(self, behind: Prefix, title: str) -> tuple[MagnitudeCurve, float]:
        """The magnitude curve and the mean L_q per text behind a prefix, on the full-precision model."""
        return compute(MagnitudesStep(behind, self._config.search, self._texts.activations, title), self._context)

    def map_activations(self, behind: Prefix, block: int, channels: list[int] | None, title: str) -> ActivationMap:
        """Magnitudes at a block's input in the first activation text behind a prefix, on the full-precision model.

        Args:
            channels: which channels; None for those with the largest magnitudes behind this prefix.

        """
        step = ActivationMapStep(behind, block, channels, self._texts.activations[0], title)
        return compute(step, self._context)

    def keep(self, behind: Prefix, quantizer: QuantizerConfig, title: str) -> Kept:
        """QFeM: the linears that keep full-precision activations behind a prefix, by their ratios and alpha.

        The record has the fields of `qfem.<stage>` in result.json.
        """
        texts = self._texts.calibration
        assert texts is not None
        measured = self._gather(behind, quantizer, title)
        ratios = measured.found[RATIOS].of(list(self._lm.linears(quantizer.targets)))
        alpha, search, seconds = quantizer.qfem.alpha, None, measured.seconds
        if alpha is None:
            calibrated = self._calibrate_if_needed(behind, quantizer)
            search = compute(
                AlphaStep(behind, quantizer, ratios, measured.key, calibrated, texts, title), self._context
            )
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

    def reconstruct(
        self,
        behind: Prefix,
        quantizer: QuantizerConfig,
        title: str,
        keep: frozenset[str],
        start: Learned | None,
        fitted_behind: Prefix,
    ) -> Reconstructed:
        """Block-wise reconstruction of a quantizer behind a prefix; it starts from what the calibration found.

        Args:
            keep: the linears whose input stays in full precision, where the quantizer uses QFeM.
            start: ranges that were learned with this prefix; it starts from these.
            fitted_behind: the prefix behind which the quantizer is calibrated.

        """
        texts, calibrated = self._texts.reconstruction, self._calibrate_if_needed(fitted_behind, quantizer, keep)
        assert texts is not None
        config, seed = self._config.reconstruction, self._config.seed
        step = ReconstructionStep(behind, quantizer, calibrated, keep, config, texts, seed, title, start)
        return compute(step, self._context)

    def measure_attention(self, behind: Prefix, title: str) -> AttentionShares | None:
        """Where attention goes behind a prefix, on the full-precision model; None where it is not asked for."""
        count, first = self._config.eval.attention_texts, self._config.eval.attention_first
        if count == 0:
            return None
        return compute(AttentionStep(behind, self._texts.activations[:count], first, title), self._context)

    def measure_further_activations(self, stages: Mapping[str, tuple[Prefix, str]]) -> dict[str, Any]:
        """Activation sparsity and spike tokens on the full-precision model, each None where it is not asked for.

        Args:
            stages: prefix and title by stage.

        """
        return {"sparsity": self._sparsity(stages), "spikes": self._spikes(stages)}

    def _sparsity(self, stages: Mapping[str, tuple[Prefix, str]]) -> dict[str, Any] | None:
        config, bos = self._config.eval, self._prepared.bos
        if config.sparsity_texts == 0:
            return None
        texts, cett = self._texts.activations[: config.sparsity_texts], config.sparsity_cett
        found = {
            key: compute(SparsityStep(behind, texts, tuple(cett), config.sparsity_ppl, bos, title), self._context)
            for key, (behind, title) in stages.items()
        }
        return {
            "texts": len(texts),
            "text_length": min(texts.shape[1], SPARSITY_TOKENS),
            "cett": list(cett),
            "ppl": config.sparsity_ppl,
            "stages": {key: asdict(sparsity) for key, sparsity in found.items()},
        }

    def _spikes(self, stages: Mapping[str, tuple[Prefix, str]]) -> dict[str, Any] | None:
        config = self._config.eval
        if config.spike_texts == 0:
            return None
        texts = self._texts.activations[: config.spike_texts]
        found = {
            key: compute(SpikesStep(behind, texts, config.spike_ratio, title), self._context)
            for key, (behind, title) in stages.items()
        }
        return {
            "texts": len(texts),
            "text_length": texts.shape[1],
            "ratio": config.spike_ratio,
            "stages": {key: asdict(spikes) for key, spikes in found.items()},
        }

    def model(
        self,
        behind: Prefix,
        quantizer: QuantizerConfig | None,
        keep: frozenset[str] = frozenset(),
        learned: Learned | None = None,
        fitted_behind: Prefix | None = None,
    ) -> QuantizedLazily:
        """What a row is measured on: the model behind a prefix, quantized or not.

        Args:
            keep: the linears whose input stays in full precision, where the quantizer uses QFeM.
            learned: ranges, and weights, that were learned with this prefix, for this quantizer.
            fitted_behind: the prefix behind which the quantizer is calibrated; None for this row's own.

        """
        basis = behind if fitted_behind is None else fitted_behind
        calibrated = None if quantizer is None else self._calibrate_if_needed(basis, quantizer, keep)
        return QuantizedLazily(self._lm, behind, quantizer, calibrated, keep, self._config.execution, learned)

    def measure_row(
        self,
        behind: Prefix,
        quantizer: QuantizerConfig | None,
        label: str,
        keep: frozenset[str] = frozenset(),
        samples: Path | None = None,
        learned: Learned | None = None,
        fitted_behind: Prefix | None = None,
    ) -> Measured:
        """Perplexities and task scores behind a prefix, quantized or not; the seconds include its calibration.

        Args:
            keep, learned, fitted_behind: as in `model`.
            samples: folder for lm-eval's record of every sample, None for none.

        """
        model = self.model(behind, quantizer, keep, learned, fitted_behind)
        blocks = self._prepared.blocks_behind(self._config.eval, len(behind))
        prepared, config = self._prepared, self._config.eval
        measured = measure_row(self._context, model, config, blocks, prepared.tasks, label, samples, prepared.bos)
        calibrated = model.calibration
        return measured if calibrated is None else replace(measured, seconds=measured.seconds + calibrated.seconds)
