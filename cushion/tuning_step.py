"""The cached tuning of a prefix's keys and values; an interrupted one goes on from its last checkpoint."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from cushion.artifacts import Workspace, read_json, write_json
from cushion.config import QuantizerConfig, SearchConfig, TuningConfig
from cushion.errors import TuningError
from cushion.hashing import tensor_digest
from cushion.prefix import Prefix
from cushion.quantization.calibration import Calibration
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.identity import quantizer_identity
from cushion.quantization.learned import Learned
from cushion.quantization.text_errors import error_identity
from cushion.schema import LEARNED
from cushion.step import Context, Step
from cushion.tuning import tune_prefix
from cushion.tuning_ranges import tuning_quantizer
from cushion.tuning_state import TuningState

_KEYS = (
    "sequence_length",
    "batch_size",
    "learning_rate",
    "schedule",
    "warmup_steps",
    "gradient_clip",
    "lambda_q",
    "loss",
    "evaluate_every",
)
"""The keys of `tuning` that decide an outcome always; `_of_error` those that do with an error in the loss."""
_OF_ERROR = ("gradient", "error_site", "reduction")


@dataclass(frozen=True)
class Tuned:
    """A tuned prefix, the record of its making, and the ranges that were learned with it, if any were."""

    prefix: Prefix
    record: dict[str, Any]
    seconds: float
    learned: Learned | None = None


@dataclass(frozen=True, eq=False)
class TuningRun(Step[Tuned]):
    """Quantization-aware tuning of a found prefix.

    Args:
        found: the prefix to start from.
        config: the schedule and the loss.
        quantizer: the run's quantizer; L_pred is computed under it (`tuning.tuning_quantizer`).
        objective: gives the grid of q in L_q.
        texts: training token ids, (sequences, tokens).
        held_out: token ids that decide which step was best.
        seed: of the order of the texts.
        folder: the run's own, where a tuning that diverges leaves its last good prefix.
        calibration: statistics behind `found`, where the quantizer smooths or its ranges are static.
        keep: the linears that QFeM keeps, where the quantizer uses it.
        calibration_texts: what static ranges are estimated on anew, with `tuning.ranges=static`.

    """

    name = "tuning"
    """Files: `prefix.*`, `tuning.json`, and `learned.safetensors` with `tuning.ranges=learned`
    Key: `prefix`, `steps`, `config.sequence_length`, `config.batch_size`, `config.learning_rate`,
        `config.schedule`, `config.warmup_steps`, `config.gradient_clip`, `config.lambda_q`, `config.loss`,
        `config.evaluate_every`, `config.gradient`, `config.error_site`, `config.reduction`, `grid`, `quantizer`,
        `ranges`, `texts`, `seed`
    Of that: the found prefix; the number of steps; where the ranges come from, with `ranges_every` and the
        calibration texts for static ones and `scale_learning_rate` for learned ones; the keys of `tuning`,
        `gradient`, `error_site`, `reduction` and the grid of L_q only with `lambda_q` above 0; texts of training
        and held-out ones
    """
    found: Prefix
    config: TuningConfig
    quantizer: QuantizerConfig
    objective: SearchConfig
    texts: Tensor
    held_out: Tensor
    seed: int
    folder: Path
    calibration: Calibration | None = None
    keep: frozenset[str] | None = None
    calibration_texts: Tensor | None = None

    def key(self, context: Context) -> dict[str, Any]:
        """Prefix, schedule, loss with its grid, quantizer, where its ranges come from, texts and seed."""
        under = tuning_quantizer(self.config, self.quantizer)
        with_error = self.config.lambda_q != 0
        keys = (*_KEYS, *(_OF_ERROR if with_error else ()))
        return {
            "prefix": self.found.fingerprint,
            "steps": self.config.total_steps,
            "config": {key: getattr(self.config, key) for key in keys},
            "grid": error_identity(self.objective) if with_error else None,
            "quantizer": quantizer_identity(under, self.calibration, self.keep or frozenset()),
            "ranges": self._ranges(),
            "texts": tensor_digest([self.texts, self.held_out]),
            "seed": self.seed,
        }

    def _ranges(self) -> list[Any]:
        """Where the ranges come from, with what decides them."""
        ranges: list[Any] = [self.config.ranges]
        if self.config.ranges == "static":
            assert self.calibration_texts is not None
            ranges += [self.config.ranges_every, tensor_digest([self.calibration_texts])]
        if self.config.ranges == "learned":
            ranges.append(self.config.scale_learning_rate)
        return ranges

    def make(self, context: Context, workspace: Workspace) -> None:
        """Tune, from the checkpoint on where there is one.

        Raises:
            TuningError: the loss is not finite any more; the message says where the last good prefix is kept.

        """
        saved = workspace.checkpoint.load()
        state = None if saved is None else TuningState.from_checkpoint(*saved, self.found)
        context.log_series("tuning", [] if state is None else [asdict(step) for step in state.steps])
        started = time.perf_counter() - (0.0 if saved is None else saved[0]["seconds"])
        steps = tune_prefix(
            context.lm,
            self.found,
            self.config,
            FittedQuantizer.of(self.quantizer, self.calibration, self.keep),
            self.objective,
            self.texts,
            self.held_out,
            seed=self.seed,
            state=state,
            calibration_texts=self.calibration_texts,
        )
        try:
            for current in steps:
                state = current
                context.progress("tuning", len(state.steps), self.config.total_steps, "step")
                context.log_series("tuning", [asdict(state.steps[-1])])
                if workspace.checkpoint.due():
                    scalars, tensors = state.to_checkpoint()
                    workspace.checkpoint.save({**scalars, "seconds": time.perf_counter() - started}, tensors)
        except TuningError as error:
            if state is None:
                raise
            kept = self.folder / "last_good_prefix"
            state.best.save(kept)
            raise TuningError(
                f"{error} -- the best prefix before that (step {state.best_step}) is kept in {kept}.safetensors"
            ) from error
        assert state is not None
        state.best.save(workspace.folder / "prefix")
        if state.best_learned is not None:
            state.best_learned.save(workspace.folder / LEARNED)
        record = {
            "steps": [asdict(step) for step in state.steps],
            "best_step": state.best_step,
            "best_loss": state.best_loss,
            "initial_loss": state.initial_loss,
            "seconds": time.perf_counter() - started,
        }
        write_json(workspace.folder / "tuning.json", record)

    def read(self, context: Context, folder: Path) -> Tuned:
        """The best prefix, with the metadata of the one that was found."""
        stored = read_json(folder / "tuning.json")
        record = {key: stored[key] for key in ("steps", "best_step", "best_loss", "initial_loss", "seconds")}
        metadata = {**self.found.metadata, "tuning": self.config.name}
        tuned = replace(Prefix.load(folder / "prefix"), metadata=metadata)
        learned = Learned.load(folder / LEARNED) if self.config.ranges == "learned" else None
        return Tuned(tuned, record, float(record["seconds"]), learned)

    def tell(self, context: Context, outcome: Tuned) -> None:
        """The losses by step."""
        context.log_series("tuning", outcome.record["steps"])
