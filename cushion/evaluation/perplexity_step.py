"""The cached perplexity of a row on one corpus; an interrupted one goes on with the next batch of blocks."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from cushion.artifacts import Workspace, read_json, write_json
from cushion.config import EvalConfig
from cushion.evaluation.perplexity import BlockLoss, block_losses, perplexity
from cushion.hashing import tensor_digest
from cushion.quantization.lazily import QuantizedLazily
from cushion.step import Context, Step


@dataclass(frozen=True)
class MeasuredPerplexity:
    """The perplexity, the loss of each batch of blocks that it is the mean of, and the seconds it took."""

    value: float
    losses: tuple[BlockLoss, ...]
    seconds: float

    @property
    def tokens(self) -> int:
        """The number of tokens that it is averaged over."""
        return sum(loss.tokens for loss in self.losses)


@dataclass(frozen=True, eq=False)
class PerplexityStep(Step[MeasuredPerplexity]):
    """Perplexity over blocks, behind a prefix, quantized or not.

    Args:
        model: with its prefix and quantizer.
        config: batch size, and whether the first token is predicted.
        blocks: token ids, (blocks, block length), or one more with BOS in front.
        stage: what progress bars call it.
        bos: whether the blocks begin with BOS.

    """

    name = "perplexity"
    """Files: `perplexity.json`
    Key: `prefix`, `quantizer`, `config.batch_size`, `config.predict_first`, `bos`, `blocks`
    """
    model: QuantizedLazily
    config: EvalConfig
    blocks: Tensor
    stage: str
    bos: bool = False

    def key(self, context: Context) -> dict[str, Any]:
        """Prefix, quantizer, blocks, batch size, BOS in front and whether the first token is predicted."""
        return {
            **self.model.identity(),
            "config": {key: getattr(self.config, key) for key in ("batch_size", "predict_first")},
            "bos": self.bos,
            "blocks": tensor_digest([self.blocks]),
        }

    def make(self, context: Context, workspace: Workspace) -> None:
        """Run the blocks that are left."""
        config, saved = self.config, workspace.checkpoint.load()
        state: dict[str, Any] = {"losses": [], "seconds": 0.0} if saved is None else saved[0]
        losses = [BlockLoss(**loss) for loss in state["losses"]]
        started = time.perf_counter() - state["seconds"]
        self.model.put_on()
        total = -(-len(self.blocks) // config.batch_size)
        for loss in self.losses(context, len(losses)):
            losses.append(loss)
            context.progress(self.stage, len(losses), total, "block")
            if workspace.checkpoint.due():
                elapsed = time.perf_counter() - started
                workspace.checkpoint.save({"losses": [asdict(item) for item in losses], "seconds": elapsed})
        record = {
            "perplexity": perplexity(losses),
            "losses": [asdict(loss) for loss in losses],
            "seconds": time.perf_counter() - started,
        }
        write_json(workspace.folder / "perplexity.json", record)

    def losses(self, context: Context, start: int) -> Iterator[BlockLoss]:
        """The loss of each batch of blocks from number `start` on."""
        return block_losses(context.lm, self.model.behind, self.blocks, self.config, start, self.bos)

    def read(self, context: Context, folder: Path) -> MeasuredPerplexity:
        """The perplexity and what it was averaged over."""
        record = read_json(folder / "perplexity.json")
        losses = tuple(BlockLoss(float(loss["loss"]), int(loss["tokens"])) for loss in record["losses"])
        return MeasuredPerplexity(float(record["perplexity"]), losses, float(record["seconds"]))
