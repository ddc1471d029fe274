"""A finished run's own quantized model, made again from its configuration, its files and its cached steps."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor

from cushion.evaluation.perplexity import BlockLoss, first_predicted
from cushion.export.finished import FinishedRun
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.progress import ProgressBars
from cushion.quantization.fitted import FittedQuantizer
from cushion.remade import RemadeRun

BLOCKS = 8
"""Blocks of the evaluation text on which an export is compared with the simulation: at most so many, or one batch."""


@dataclass(frozen=True, eq=False)
class Refitted:
    """The model of a run's own row, the last one of its table.

    Args:
        lm: the model in full precision.
        prefix: what stands before every text; empty where the run has none.
        fitted: the quantizer with all that it needs.
        corpus: the name of the text of `blocks`.
        blocks: the first blocks that the row was measured on: token ids, (blocks, tokens).
        batch_size: how many of them the run measured at a time.
        first: position of the first token that is predicted.
        measured: the losses of the row on `blocks` in the run; empty where its result does not tell.

    """

    lm: LanguageModel
    prefix: Prefix
    fitted: FittedQuantizer
    corpus: str
    blocks: Tensor
    batch_size: int
    first: int
    measured: tuple[BlockLoss, ...] = ()


def refit(run: FinishedRun) -> Refitted:
    """Load the model and fit the quantizer of a run's last row as the run did.

    Steps that the run has left in its cache are read from there; others are done again.

    Raises:
        ArtifactError: model or texts are not those of the run any more, or a file of it is missing.

    """
    prefix = run.prefix() if run.record["prefix"] else Prefix.empty()
    with ProgressBars() as bars:
        remade = RemadeRun(run.folder, run.record, prefix, bars)
        fitted = remade.model(run.record["rows"][-1]).fitted
    prepared, measured = remade.prepared, remade.config.eval
    corpus, blocks = next(iter(prepared.blocks_behind(measured, len(prefix)).items()))
    first = first_predicted(measured, prepared.bos)
    size = measured.batch_size
    chosen = blocks[: size * max(1, BLOCKS // size)]  # whole batches, whose losses the run has kept
    own = run.record["evaluation"].get("losses", {}).get(run.record["rows"][-1]["name"], {}).get(corpus)
    return Refitted(prepared.lm, prefix, fitted, corpus, chosen, size, first, _on(chosen[:, first:].numel(), own))


def _on(tokens: int, own: dict[str, list[Any]] | None) -> tuple[BlockLoss, ...]:
    """The first losses of a row, of so many tokens in all; none where its batches are cut otherwise, or not kept."""
    losses = [] if own is None else [BlockLoss(*one) for one in zip(own["nats"], own["tokens"], strict=True)]
    counts = list(accumulate(one.tokens for one in losses))
    return tuple(losses[: counts.index(tokens) + 1]) if tokens in counts else ()
