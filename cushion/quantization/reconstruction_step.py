"""The cached block-wise reconstruction; an interrupted one goes on with the next block."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from cushion.artifacts import Workspace, read_json, write_json
from cushion.config import QuantizerConfig, ReconstructionConfig
from cushion.hashing import tensor_digest
from cushion.prefix import Prefix
from cushion.quantization.calibration import Calibration
from cushion.quantization.effect import Turn
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.fitting import walk
from cushion.quantization.identity import quantizer_identity
from cushion.quantization.learned import Learned
from cushion.quantization.omniquant import learn_block
from cushion.quantization.reconstruction import BlockRecord, reconstruct_block
from cushion.schema import LEARNED
from cushion.step import Context, Step


@dataclass(frozen=True)
class Reconstructed:
    """What was learned, and the record of its making."""

    learned: Learned
    record: dict[str, Any]
    seconds: float


@dataclass(frozen=True, eq=False)
class ReconstructionStep(Step[Reconstructed]):
    """Block-wise reconstruction of a quantizer behind a prefix.

    Args:
        behind: the prefix.
        quantizer: with static ranges of activations, or for OmniQuant with dynamic ones or none.
        calibration: what was measured behind the same prefix, from which the ranges start; None where nothing was.
        keep: the linears that QFeM keeps in full precision; nothing is learned for their inputs.
        config: what learns, and how.
        texts: token ids that it learns from, (texts, tokens).
        seed: of the order of the texts.
        title: how progress calls the prefix.
        start: ranges that were learned before, with the prefix, and from which this one goes on.

    """

    name = "reconstruction"
    """Files: `learned.safetensors`, `reconstruction.json`
    Key: `prefix`, `quantizer`, `config.weights`, `config.epochs`, `config.batch_size`,
        `config.scale_learning_rate`, `config.weight_learning_rate`, `texts`, `seed`
    Of that: a rate only where it is used, and with `omniquant` its own keys; the texts that it learns from
    """
    behind: Prefix
    quantizer: QuantizerConfig
    calibration: Calibration | None
    keep: frozenset[str]
    config: ReconstructionConfig
    texts: Tensor
    seed: int
    title: str
    start: Learned | None = None

    def key(self, context: Context) -> dict[str, Any]:
        """Prefix, quantizer with what it was calibrated to, what learns and how, texts and seed."""
        return {
            "prefix": self.behind.fingerprint,
            "quantizer": quantizer_identity(self.quantizer, self.calibration, self.keep, learned=self.start),
            "config": {key: getattr(self.config, key) for key in self.config.read},
            "texts": tensor_digest([self.texts]),
            "seed": self.seed,
        }

    def make(self, context: Context, workspace: Workspace) -> None:
        """Reconstruct one block after another, from the checkpoint on where there is one."""
        saved = workspace.checkpoint.load()
        state = _State(_copy(self.start)) if saved is None else _State.of(*saved)
        known, started = len(state.blocks), time.perf_counter() - state.seconds
        fitted = FittedQuantizer.of(self.quantizer, self.calibration, self.keep, state.learned)

        def take(turn: Turn) -> None:
            if turn.index >= known:
                learn = learn_block if self.config.method == "omniquant" else reconstruct_block
                state.blocks.append(learn(turn, self.config, self.seed))

        for done in walk(context.lm, self.behind, fitted, self.texts, take):
            context.progress(f"reconstruction, {self.title}", done, len(context.lm.blocks), "block")
            if done > known and workspace.checkpoint.due():
                state.seconds = time.perf_counter() - started
                workspace.checkpoint.save(*state.to_checkpoint())
        state.learned.save(workspace.folder / LEARNED)
        record = {"blocks": [asdict(block) for block in state.blocks], "seconds": time.perf_counter() - started}
        write_json(workspace.folder / "reconstruction.json", record)

    def read(self, context: Context, folder: Path) -> Reconstructed:
        """What was learned, and the errors by block."""
        stored = read_json(folder / "reconstruction.json")
        record = {key: stored[key] for key in ("blocks", "seconds")}
        return Reconstructed(Learned.load(folder / LEARNED), record, float(record["seconds"]))


@dataclass
class _State:
    """How far a reconstruction is."""

    learned: Learned
    blocks: list[BlockRecord] = field(default_factory=list)
    seconds: float = 0.0

    def to_checkpoint(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The state as plain data and tensors."""
        return {"blocks": [asdict(block) for block in self.blocks], "seconds": self.seconds}, self.learned.tensors()

    @classmethod
    def of(cls, state: dict[str, Any], tensors: dict[str, Tensor]) -> _State:
        """The state that `to_checkpoint` described."""
        blocks = [BlockRecord(**block) for block in state["blocks"]]
        return cls(Learned.of(tensors), blocks, float(state["seconds"]))


def _copy(start: Learned | None) -> Learned:
    if start is None:
        return Learned()
    return Learned(dict(start.ranges), dict(start.weights), dict(start.shares), dict(start.divisors))
