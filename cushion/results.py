"""The result of a run, and its one file: result.json, schema version 2, written atomically.

docs/results.md describes every field for readers of the file; tables and figures are made from it alone.
"""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cushion
from cushion.artifacts import read_json, write_json
from cushion.errors import ArtifactError
from cushion.integrity import FIGURES_FOLDER, OF_A_RUN, SAMPLES, SET_ASIDE, misfit, sealed
from cushion.metrics.columns import parts
from cushion.schema import FILE_NAME as FILE_NAME
from cushion.schema import SCHEMA_VERSION as SCHEMA_VERSION
from cushion.schema import current, way_out

logger = logging.getLogger(__name__)

_PACKAGES = ("torch", "transformers", "datasets", "lm_eval", "hydra-core", "omegaconf", "wandb", "accelerate")


@dataclass
class Row:
    """One line of the comparison: a model with or without quantizer and prefix, and what was measured on it.

    `stage` says whose prefix it has (`cushion.schema.STAGES`); `values` holds its numbers by the key of their column
    (`cushion.metrics`), None where one was not measured; `tokens` by corpus the number of tokens that a perplexity was
    averaged over; `tasks` by task or group of tasks the fields of `evaluation.task_scores.TaskScore`. A row that is
    `reconstructed` has ranges, and perhaps weights or scales, that were learned for it, one with `learned_ranges` those that were
    learned with its prefix: neither is one of the frozen model (`cushion.schema.is_frozen`).

    | field | content |
    |---|---|
    | `name` | `full_precision` or `quantized`, with `_found` or `_tuned`, and `_reconstructed`, appended |
    | `label` | as in the table, for example `per_tensor_static W8A8 + tuned prefix`, with `+ learned ranges` and `+ reconstruction` where they are |
    | `prefix` | text of the prefix |
    | `quantized` | true or false |
    | `stage` | whose prefix it has: `none`, `found` or `tuned` |
    | `reconstructed` | whether ranges, and perhaps weights or scales, were learned for this row block by block. Absent, as in older files: false |
    | `learned_ranges` | whether its ranges were learned with its prefix (`tuning.ranges=learned`); a row that is neither this nor `reconstructed` is of the frozen model. Absent: false |
    | `values` | numbers by column, below; null where one was not measured or is not finite |
    | `tokens` | by corpus: tokens whose loss is averaged, one less per block without `predict_first` |
    | `tasks` | by task, group or tag: `metric` (the one that enters the mean, or null), its `value` and `stderr`, `samples` (records asked), `version`, all `metrics` with `value` and `stderr` each, and `truncated`, the number of requests that lost the start of their context (a record is several requests where there are choices) |
    """  # noqa: E501

    name: str
    label: str
    prefix: str
    quantized: bool
    stage: str
    values: dict[str, float | None]
    tokens: dict[str, int] = field(default_factory=dict)
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    reconstructed: bool = False
    learned_ranges: bool = False

    def under(self, key: str) -> dict[str, float | None]:
        """The values below a key by what follows it: `under("perplexity")` has one for each corpus."""
        return parts({"values": self.values}, key)


@dataclass
class RunResult:
    """Everything a run found out. All fields are plain JSON.

    | field | content |
    |---|---|
    | `schema_version` | 2 |
    | `status` | `completed` or `failed` |
    | `error` | null, or `{type, message}` of a failed run. What was found before the failure is in the other fields |
    | `config` | the whole configuration |
    | `environment` | below |
    | `model` | below |
    | `data` | below, by purpose that the run needed |
    | `evaluation` | below |
    | `integrity` | the seal: `content`, a digest of everything else in the file; `run`, the name of the run's folder; `files`, the SHA-256 of the prefix, of what was learned and of the samples, by path. Results from before have none |
    | `prefix` | below; null without a prefix |
    | `search` | below; null with `search=none` |
    | `tuning` | below; null without tuning |
    | `qfem` | below; null without QFeM |
    | `reconstruction` | below; null without reconstruction |
    | `activations` | below |
    | `attention` | below; null with `eval.attention_texts=0` |
    | `metrics` | by column, as in `values` of a row: perplexities, accuracies with their mean and its standard error, `largest_activation` and `quantization_error` of the last row, which is the run's own |
    | `rows` | the comparison, a list, below |
    | `timings` | seconds: `total` of this process, `search`, `tuning`, `qfem, <title of the stage>`, `reconstruction, <title of the stage>`, `evaluation, <label>` |
    | `warnings` | texts of the warnings |
    """  # noqa: E501

    status: str
    config: dict[str, Any]
    environment: dict[str, Any]
    model: dict[str, Any] = field(default_factory=dict)
    """`model`:

    | field | content |
    |---|---|
    | `path`, `label` | `model.path`; its last part |
    | `architecture` | `model_type` in transformers |
    | `fingerprint` | 16 hex digits: source, dtype, and the hub commit, or, where there is none, all weights |
    | `dtype` | dtype of the weights |
    | `blocks` | number of decoder blocks |
    | `vocabulary` | number of tokens that have an embedding and that the tokenizer knows |
    """
    data: dict[str, Any] = field(default_factory=dict)
    """`data`:

    | field | content |
    |---|---|
    | `source`, `split` | as configured; `split` is null for `embedded`, `file`, and `c4` out of `paths.data_dir` |
    | `origin` | file, or set on the hub |
    | `shared_by` | the purposes that divide this origin, also those that the run did not need |
    | `documents`, `characters` | what this purpose got |
    | `duplicates_dropped` | documents dropped because an earlier purpose has them |
    | `sha256` | of the documents joined with blank lines |
    | `held_out` | of `tuning`, where there is one: `split` is `document`, or `position` where there were too few documents to hold any out; `documents`, from how many the held-out texts come (null with `position`) |
    """  # noqa: E501
    evaluation: dict[str, Any] = field(default_factory=dict)
    """`evaluation`:

    | field | content |
    |---|---|
    | `corpus` | the name of the first corpus: the source, or a file's name without ending |
    | `corpora` | `blocks`, the number of blocks, by corpus |
    | `block_length` | tokens of a block |
    | `bos` | whether every text of the run, and every context of a task, began with BOS |
    | `predict_first`, `prefix_in_block` | as configured |
    | `asked`, `in_mean` | `eval.tasks`, and those of them that the mean is over: an entry that is part of another one does not count twice |
    | `tasks` | by single task (groups taken apart): `origin`, file or set on the hub, `shots`, the number of examples, and `prepared`, whether its records were taken to be prepared already ([data.md](data.md#tasks)) |
    | `limit`, `accuracy` | as configured |
    | `losses.<row>.<corpus>` | what a perplexity is the mean of: `nats`, the summed loss of each batch of blocks in order, and `tokens`, how many were predicted in it |
    | `ceilings.<row>` | the name of the full-precision row with the very same prefix, which the row is compared with; null for rows in full precision, and where it was not measured |
    | `task_batch_size` | requests per forward pass of the run's own quantizer (1 with one dynamic range per tensor; `auto` where a GPU takes as many as fit); rows in full precision have 8 where none is configured |
    """  # noqa: E501
    prefix: dict[str, Any] | None = None
    search: dict[str, Any] | None = None
    tuning: dict[str, Any] | None = None
    """`tuning`:

    | field | content |
    |---|---|
    | `steps[].step` | number, from 0 |
    | `steps[].loss` | `prediction_loss + lambda_q * error` |
    | `steps[].prediction_loss` | nats per token: cross entropy, or the divergence with `tuning.loss=kl` |
    | `steps[].error` | L_q of the batch, summed over sites, in the unit of `tuning.reduction` |
    | `steps[].learning_rate`, `gradient_norm` | the norm before clipping |
    | `steps[].held_out_loss` | the whole loss on the held-out sequences after this step; null where not measured |
    | `steps[].seconds` | held-out measurements included |
    | `best_step` | how many steps the kept prefix has had; 0 means that tuning brought nothing and the found prefix was kept |
    | `best_loss`, `initial_loss` | held-out loss of the kept prefix and of the found one |
    | `seconds` | wall time of the whole tuning: putting on the quantizer and the first held-out measurement included |
    """  # noqa: E501
    qfem: dict[str, Any] | None = None
    """`qfem`:

    | field | content |
    |---|---|
    | `alpha` | as configured, or found. A found alpha is the smallest one that keeps these linears: given as `quantizer.qfem.alpha`, it keeps them again |
    | `kept` | names of the linears that keep full-precision activations: those with a ratio above `alpha` |
    | `ratios` | max/median ratio of the token scales at every quantized linear's input, mean over the calibration texts, by name. A linear that no token reached (an expert that was never chosen) has none |
    | `groups` | lists of names that read the very same tensor, so that they have one ratio |
    | `alpha_search` | null with `quantizer.qfem.alpha` |
    | `alpha_search.target`, `texts` | as configured; number of texts that the perplexities are over |
    | `alpha_search.reference_perplexity` | of per-token dynamic scales, with the same weights, smoothing and prefix |
    | `alpha_search.points` | the trade-off curve, in the order of linears kept |
    | `alpha_search.points[].alpha`, `kept_groups`, `kept_modules` | the smallest alpha that keeps this set; how many groups and linears that are |
    | `alpha_search.points[].perplexity` | on calibration text; null where it is not finite |
    | `alpha_search.found` | which of the points was chosen, from 0 |
    | `alpha_search.reached` | whether its perplexity is at most `target * reference_perplexity`; if not, all linears are kept |
    | `alpha_search.contradictions` | points (from 0) that contradict the assumption that the perplexity falls with every linear that is kept |
    | `alpha_search.seconds`, `seconds` | of the search; of ratios and search |
    """  # noqa: E501
    reconstruction: dict[str, Any] | None = None
    """`reconstruction`:

    | field | content |
    |---|---|
    | `blocks` | a list, in order: `block`, its number; `before` and `after`, the mean squared error of its output over the texts before and after learning; `kept`, whether what was learned there is used (where `after` is smaller) |
    | `seconds` | wall time of the whole reconstruction |
    """  # noqa: E501
    activations: dict[str, Any] = field(default_factory=dict)
    """`activations`:

    | field | content |
    |---|---|
    | `texts`, `text_length` | how many blocks of how many tokens, BOS included where the run has it |
    | `curves.<stage>` | `top1`, `top2`, `top3`, `top10_percent`, `median`, `maximum`: lists with one value per block |
    | `quantization_error.<stage>` | L_q, mean over the texts |
    | `titles.<stage>` | how the stage is called in tables and figures |
    | `map.block` | the block, from 0, whose `top1` is largest without a prefix |
    | `map.channels`, `positions` | the (at most) 16 channels that have the largest magnitudes there without a prefix, ascending; how many of the first text's tokens the map has, at most 64 |
    | `map.values.<stage>` | the magnitude at the block's input: a list per position, behind the prefix where there is one, with one value per channel, to 4 significant digits (CushionCache, Figure 1) |
    | `sparsity` | null with `eval.sparsity_texts=0`, else `texts`, `text_length`, the CETTs asked for (`cett`) and the percent of perplexity (`ppl`), and `stages.<stage>` ([method.md](method.md#activation-sparsity)) |
    | `sparsity.stages.<stage>.levels` | for each CETT: `cett`, and by block `ratios`, the share of active neurons, and `thresholds`, eps |
    | `sparsity.stages.<stage>.within_perplexity`, `perplexity_ratio` | the same at the largest CETT whose perplexity is within `ppl` percent, and that perplexity over the dense one; null with `eval.sparsity_ppl=null` |
    | `spikes` | null with `eval.spike_texts=0`, else `texts`, `text_length`, `ratio`, and by block for each stage `counts`, spike tokens per text, `cosines`, the mean cosine between them behind the norm (null with fewer than two), and `others`, that between all other tokens ([method.md](method.md#spike-tokens-behind-the-norm)) |
    """  # noqa: E501
    attention: dict[str, Any] | None = None
    """`attention`:

    | field | content |
    |---|---|
    | `texts`, `text_length`, `first` | how many texts of how many tokens, BOS included where the run has it; how many tokens count as the first |
    | `stages.<stage>.prefix` | share of attention on all positions of the prefix, a list per block with one value per head |
    | `stages.<stage>.first` | share on the first tokens of the text, likewise |
    | `stages.<stage>.sinks_in_prefix` | how many of the five positions that get the most attention are the prefix's, averaged over the texts; null without a prefix |
    """  # noqa: E501
    metrics: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    error: dict[str, str] | None = None
    schema_version: int = SCHEMA_VERSION

    def write(self, folder: Path) -> Path:
        """Write `folder/result.json` with a seal over it and the run's other files there; returns its path."""
        path = folder / FILE_NAME
        write_json(path, sealed(asdict(self), folder))
        return path

    @classmethod
    def read(cls, path: Path) -> RunResult:
        """Read a result.json, of this schema version or an older one.

        Raises:
            ArtifactError: the file is damaged or of another schema version.

        """
        return cls._of(read_json(path), path)

    @classmethod
    def _of(cls, content: Any, path: Path) -> RunResult:
        """The result that a file has as its content."""
        record = current(content, path)
        try:
            return cls(**{**record, "rows": [Row(**row) for row in record["rows"]]})
        except (TypeError, KeyError) as error:
            raise ArtifactError(f"{path} is damaged ({error}): {way_out(path)}") from error


def finished_result(folder: Path) -> RunResult | None:
    """The completed result in `folder`, or None when the run has not been done, failed, or left what does not fit."""
    return _finished(folder)[0]


def _finished(folder: Path) -> tuple[RunResult | None, str | None]:
    """The completed result in a run's folder, if it is what the run left there, and in words why it is not."""
    path = folder / FILE_NAME
    if not os.path.lexists(path):
        return None, None
    try:
        content = read_json(path)
        result = RunResult._of(content, path)
    except ArtifactError as error:
        return None, str(error).removesuffix(f": {way_out(path)}")
    if result.status != "completed":
        return None, None
    reason = misfit(content, folder)
    return (result, None) if reason is None else (None, f"{path} {reason}")


def make_room(folder: Path) -> RunResult | None:
    """The completed result in a run's folder; what does not fit is moved out of it, with a warning.

    Call it with the folder's lock. Without a result the run is done, or done again. Its cached steps stay: each is
    checked for itself when it is read.
    """
    for left_over in folder.glob(".*.json-*"):  # of a process that was killed while it wrote
        left_over.unlink()
    result, reason = _finished(folder)
    names: Sequence[str] = (FILE_NAME, *OF_A_RUN)
    if reason is None and result is None:
        names = [name for name in OF_A_RUN if _is_in_the_way(folder / name)]
        reason = f"{folder / names[0]} is not what a run leaves there" if names else None
    if reason is None:
        return result
    place = folder / SET_ASIDE / str(time.time_ns())
    place.mkdir(parents=True)
    for name in (FIGURES_FOLDER, *names):  # the figures first: killed here, the rest still does not fit
        if os.path.lexists(folder / name):
            (folder / name).rename(place / name)
    logger.warning("%s: it was moved to %s, and the run is done again", reason, place)
    return None


def _is_in_the_way(path: Path) -> bool:
    """Whether what stands where a run writes a file of its own, or its folder of samples, is something else."""
    if not os.path.lexists(path):
        return False
    if path.name != SAMPLES:
        return not path.is_file()
    return not (
        path.is_dir() and all(row.is_dir() for row in path.iterdir()) and all(one.is_file() for one in path.glob("*/*"))
    )


def make_folder(folder: Path) -> None:
    """Make a run's folder; what stands in its place and is not a folder is moved beside it, with a warning."""
    if os.path.lexists(folder) and not folder.is_dir():
        place = folder.with_name(f"{SET_ASIDE}-{folder.name}-{time.time_ns()}")
        folder.rename(place)
        logger.warning("%s is not a folder: it was moved to %s, and the run is done again", folder, place)
    folder.mkdir(parents=True, exist_ok=True)


def environment(device: str) -> dict[str, Any]:
    """Versions, git state and device: what else a number may depend on.

    | field | content |
    |---|---|
    | `cushion`, `python`, `platform` | versions |
    | `packages` | versions of torch, transformers, datasets, lm_eval, hydra-core, omegaconf, wandb, accelerate; null where not installed |
    | `git` | `{commit, dirty}` of the checkout that Cushion runs from; null for an installed package |
    | `device` | `cpu`, `cuda`, ... |
    | `seed` | the seed |
    | `machine` | only with `eval.latency`: host, processor or GPU, instructions, threads and torch that it was measured with |
    """  # noqa: E501
    return {
        "cushion": cushion.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": dict(_versions()),
        "git": _git_state(Path(__file__).resolve().parent.parent),
        "device": device,
    }


@cache
def _versions() -> dict[str, str | None]:
    """Of the packages in this process: what is installed later on is not what its runs use."""
    versions: dict[str, str | None] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return versions


@cache
def _git_state(source: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout Cushion runs from; None for an installed package or without git.

    As they are at the first run of a process: its later ones run the same code.
    """
    if not (source / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "-C", str(source), "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
        status = subprocess.run(
            ["git", "-C", str(source), "status", "--porcelain"], capture_output=True, text=True, check=True, timeout=10
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(status.strip())}
