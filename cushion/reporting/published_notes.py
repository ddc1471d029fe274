"""What stands below a published table: its source, and everything in which our runs are not what was published."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cushion.config import RunConfig, to_dict
from cushion.errors import ArtifactError, did_you_mean
from cushion.flat import flatten
from cushion.reporting.collect import Run

SETTING = "setting"
"""The key of a table.yaml that holds the published configuration, as far as it is known."""


def check_setting(specification: Mapping[str, Any], path: object) -> None:
    """Every key of `setting` is one of a configuration.

    Raises:
        ArtifactError: it is not; it names the file, the key and the nearest one that there is.

    """
    setting = specification.get(SETTING, {})
    if not isinstance(setting, dict):
        raise ArtifactError(f"{path}: {SETTING}={written(setting)} is not a record of keys of the configuration")
    known = flatten(to_dict(RunConfig()))
    for key in setting:
        if key not in known:
            raise ArtifactError(
                f"{path}: {SETTING} names {key!r}, which no configuration has{did_you_mean(key, known)}"
            )


def notes_of(
    specification: Mapping[str, Any],
    models: Mapping[str, str],
    runs: Sequence[Run],
    corpora: Iterable[str],
    scored: Iterable[tuple[str, ...]],
) -> list[str]:
    """The notes of a table, those that were written for it first.

    Args:
        specification: the content of its table.yaml.
        models: the published models, their titles by the label that runs have for them.
        runs: of the experiment.
        corpora: what perplexities of ours in it were measured on.
        scored: the tasks that accuracies of ours in it are means of.

    """
    ran = dict.fromkeys(run.model for run in runs)
    notes = [f"Published: {specification['source']}", *specification.get("notes", [])]
    if absent := [title for label, title in models.items() if label not in ran]:
        notes.append(f"Not run: {', '.join(absent)}.")
    if others := [label for label in ran if label not in models]:
        notes.append(f"Not published, ours alone: {', '.join(others)}.")
    wanted = specification.get("corpus")
    if wanted and (unlike := sorted(set(corpora) - {wanted})):
        notes.append(f"Ours is measured on {', '.join(unlike)}, not on {wanted}.")
    published = specification.get("tasks")
    if published and (other := sorted(tasks for tasks in scored if set(tasks) != set(published))):
        means = " or ".join(", ".join(tasks) for tasks in other)
        notes.append(f"The published accuracy is the mean of {', '.join(published)}; ours of {means}.")
    if differing := differences(specification.get(SETTING, {}), [run.config for run in runs]):
        said = "; ".join(f"{key} {ours} (published {theirs})" for key, (ours, theirs) in differing.items())
        notes.append(f"Ours differs in: {said}.")
    return notes


def differences(setting: Mapping[str, Any], configs: Iterable[Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """The keys in which configurations are not as published: by key, our values and the published ones, in words.

    Args:
        setting: by key of the configuration (`eval.block_length`) the published value, or a list of them.
        configs: of our runs, nested. A key that a configuration does not have, an older one, is not asked of it.

    """
    found: dict[str, dict[str, None]] = {}
    for config in configs:
        values = flatten(dict(config))
        for key, published in setting.items():
            if key in values and values[key] not in _allowed(published):
                found.setdefault(key, {})[written(values[key])] = None
    return {
        key: (" or ".join(found[key]), " or ".join(map(written, _allowed(published))))
        for key, published in setting.items()
        if key in found
    }


def written(value: object) -> str:
    """A value as YAML writes it."""
    return value if isinstance(value, str) else json.dumps(value)


def _allowed(published: Any) -> list[Any]:
    return published if isinstance(published, list) else [published]
