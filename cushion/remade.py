"""The models that a finished run measured its rows on, made again.

Prefix, learned ranges and kept linears come from the run's folder, all that a quantizer was fitted to from the cache of
the run's steps. What the cache lacks, the run's own steps compute anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from cushion.config import QuantizerConfig, RunConfig
from cushion.errors import ArtifactError, ConfigError
from cushion.events import Event
from cushion.prefix import Prefix
from cushion.preparation import choose_device, prepare
from cushion.quantization.lazily import QuantizedLazily
from cushion.quantization.learned import Learned
from cushion.schema import FOUND, LEARNED, NO_PREFIX, RECONSTRUCTED, TUNED
from cushion.steps import Steps

TITLES = {NO_PREFIX: "no prefix", FOUND: "found prefix", TUNED: "tuned prefix"}
"""What progress bars call a stage."""


def run_config(folder: Path, record: dict[str, Any]) -> RunConfig:
    """The configuration of a finished run, as this version of Cushion has it.

    Paths that were relative when it ran are those above its folder, wherever the user stands now.

    Args:
        folder: of the run, `<output_dir>/<experiment>/<model>/<row>/<hash>` unless it was moved.
        record: the content of its result.json.

    Raises:
        ArtifactError: it has keys or values that this version does not know.

    """
    try:
        config = RunConfig.from_dict(record["config"])
    except ConfigError as error:
        raise ArtifactError(
            f"{folder} is of a run whose configuration this version does not read ({error}): run it again"
        ) from error
    above = folder.resolve().parents
    if len(above) > 3 and above[2].name == config.experiment:
        config.paths = replace(config.paths, output_dir=str(above[3]))
    return config


class RemadeRun:
    """The rows of a finished run, ready to run again.

    Args:
        folder: the run's folder.
        record: the content of its result.json.
        final: the run's final prefix, empty for a run without one.
        emit: called with the progress of what is computed anew.
        device: where to compute; None for the run's own choice.
        measures: whether its evaluation text is needed in full. Its tasks are left out either way.

    Attributes:
        config: the run's configuration, without tasks.
        prepared: the model and the texts.

    Raises:
        CushionError: what the run needed is not there any more, or is something else now.

    """

    def __init__(
        self,
        folder: Path,
        record: dict[str, Any],
        final: Prefix,
        emit: Callable[[Event], None],
        device: str | None = None,
        measures: bool = True,
    ) -> None:
        self._folder, self._record, self._final = folder, record, final
        config = run_config(folder, record)
        config = replace(config, device=device or config.device)
        asked = config.eval
        if not measures:
            asked = replace(asked, perplexity=True, blocks=1)
        self.config = replace(config, eval=replace(asked, tasks=[]))
        self.prepared = prepare(self.config, choose_device(self.config))
        self._check_same(
            "model.path", config.model.path, self.prepared.lm.fingerprint, record["model"].get("fingerprint")
        )
        for purpose, corpus in self.prepared.corpora.items():
            was, now = record["data"].get(purpose), corpus.provenance
            if was is not None:
                self._check_same(f"data.{purpose}", now["source"], now["sha256"], was["sha256"])
        self._steps = Steps(self.config, self.prepared, emit, folder)

    def _check_same(self, key: str, value: str, now: str, then: str | None) -> None:
        if now != then:
            raise ArtifactError(
                f"{key}={value!r} is not what it was for the run in {self._folder} (hash {now}, and it was {then}): "
                "run it again"
            )

    @cached_property
    def _found(self) -> Prefix:
        """The prefix that was found or given, before any tuning."""
        if not self._final.tuned:
            return self._final
        found = self._steps.search()
        assert found is not None and found.prefix is not None, "a prefix was tuned"
        if list(found.prefix.token_ids) != self._record["prefix"]["token_ids"]:
            raise ArtifactError(
                f"the search of the run in {self._folder} finds other tokens by now ({list(found.prefix.token_ids)}, "
                f"and it was {self._record['prefix']['token_ids']}): run it again"
            )
        return found.prefix

    def prefix(self, stage: str) -> Prefix:
        """The prefix of a stage, of `cushion.schema.STAGES`."""
        return {NO_PREFIX: Prefix.empty, FOUND: lambda: self._found, TUNED: lambda: self._final}[stage]()

    def model(self, row: dict[str, Any]) -> QuantizedLazily:
        """What a row was measured on.

        Args:
            row: one of `rows` of result.json, or as little of it as `stage` and `quantized`.

        """
        stage, quantizer = row["stage"], self.config.quantizer
        behind = self.prefix(stage)
        if not row["quantized"]:
            return self._steps.model(behind, None)
        has_learned, config = row.get("learned_ranges", False), self.config
        fitted = self._found if has_learned else behind
        keep = self._keep(FOUND if stage == TUNED and config.tuning.ranges != "dynamic" else stage)
        learned = Learned.load(self._folder / LEARNED) if has_learned else None
        if row.get("reconstructed", False):
            learned = self._reconstructed(row, quantizer, keep, learned, fitted)
        return self._steps.model(behind, quantizer, keep, learned, fitted)

    def _keep(self, stage: str) -> frozenset[str]:
        """The linears that QFeM kept behind the prefix of a stage."""
        if not self.config.quantizer.uses_qfem:
            return frozenset()
        return frozenset(self._record["qfem"][stage]["kept"])

    def _reconstructed(
        self,
        row: dict[str, Any],
        quantizer: QuantizerConfig,
        keep: frozenset[str],
        start: Learned | None,
        fitted: Prefix,
    ) -> Learned:
        """What was learned block by block: of the run's own row it lies in the folder."""
        stage = row["stage"]
        if stage == self._record["rows"][-1]["stage"]:
            return Learned.load(self._folder / RECONSTRUCTED)
        return self._steps.reconstruct(self.prefix(stage), quantizer, TITLES[stage], keep, start, fitted).learned
