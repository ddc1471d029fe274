"""A finished run's own quantized model, made again from its configuration, its files and its cached steps."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cushion.config import EvalConfig
from cushion.errors import ArtifactError
from cushion.export.finished import FinishedRun, config_of
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.preparation import choose_device, prepare
from cushion.progress import ProgressBars
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.learned import Learned
from cushion.schema import FOUND, LEARNED, RECONSTRUCTED, TUNED
from cushion.steps import Steps

BLOCKS = 8
"""Blocks of the evaluation text, at most, on which an export is compared with the simulation."""


_BLOCKS_OF = ("block_length", "blocks", "batch_size", "predict_first", "prefix_in_block")
"""What of `eval` says which blocks a row is measured on: nothing else of it is wanted here."""


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

    """

    lm: LanguageModel
    prefix: Prefix
    fitted: FittedQuantizer
    corpus: str
    blocks: Tensor
    batch_size: int
    first: int


def refit(run: FinishedRun) -> Refitted:
    """Load the model and fit the quantizer of a run's last row as the run did.

    Steps that the run has left in its cache are read from there; others are done again.

    Raises:
        ArtifactError: model or calibration text are not those of the run any more, or a file of it is missing.

    """
    config = config_of(run)
    measured = config.eval
    config.eval = EvalConfig(**{key: getattr(measured, key) for key in _BLOCKS_OF})
    prepared = prepare(config, choose_device(config))
    _check_same(run, "model.path", config.model.path, prepared.lm.fingerprint, run.record["model"].get("fingerprint"))
    if "calibration" in prepared.corpora:
        now, then = prepared.corpora["calibration"].provenance, run.record["data"].get("calibration")
        _check_same(run, "data.calibration", config.data.calibration.source, _plain(now), _plain(then))
    prefix = run.prefix() if run.record["prefix"] else Prefix.empty()
    row, stage = run.record["rows"][-1], run.record["rows"][-1]["stage"]
    is_learned, is_reconstructed = row.get("learned_ranges", False), row.get("reconstructed", False)
    learned = None
    if is_learned or is_reconstructed:
        learned = Learned.load(run.folder / (RECONSTRUCTED if is_reconstructed else LEARNED))
    keep = frozenset[str]()
    if config.quantizer.uses_qfem:
        chosen = FOUND if stage == TUNED and config.tuning.ranges != "dynamic" else stage
        keep = frozenset(run.record["qfem"][chosen]["kept"])
    with ProgressBars() as bars:
        steps = Steps(config, prepared, bars, run.folder)
        behind = prefix
        if is_learned:  # ranges were learned on a quantizer that was fitted behind the prefix as it was found
            found = steps.search()
            assert found is not None and found.prefix is not None
            behind = found.prefix
        fitted = steps.fit(behind, config.quantizer, keep, learned)
    corpus, blocks = next(iter(prepared.blocks_behind(config.eval, len(prefix)).items()))
    first = 2 if prepared.bos and not config.eval.predict_first else 1
    size = min(config.eval.batch_size, BLOCKS)
    return Refitted(prepared.lm, prefix, fitted, corpus, blocks[:BLOCKS], size, first)


def _check_same(run: FinishedRun, key: str, value: str, now: Any, then: Any) -> None:
    if now != then:
        raise ArtifactError(
            f"{key}={value!r} is not what it was when RUN={str(run.folder)!r} was made: run it again, then export it"
        )


def _plain(record: Any) -> Any:
    """A record as it stands in a JSON file."""
    return json.loads(json.dumps(record))
