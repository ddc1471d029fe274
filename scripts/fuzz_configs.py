"""Give keys of the configuration values that a user may give them, sensible or not, misspelt ones too.

A case ends well where the run ends with its result, or is refused in one line that names a key or value of the case.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

from fuzz_report import Case, Limits
from fuzz_runs import KINDS, Ended, Runs

from cushion.cli import config_folder
from cushion.config import RunConfig, to_dict
from cushion.flat import flatten

DEADLINE = 120.0
"""Seconds of the processor, or of waiting, after which a run is said to hang, if nothing else is asked for."""

VALUES = (
    "-1", "0", "1", "2", "3", "7", "0.5", "1.5", "-0.5", "true", "false", "null", "none", "abc", "''", "' '", "[]",
    "[0]", "[1,2]", "[[1]]", "[a]", "{}", "{a: 1}", "nan", "inf", "-inf", "1e400", "1e-400", "9223372036854775808",
    "-9223372036854775809", "99999999999999999999", "0x10", "1_000", '"\\ud800"', "~nobody-of-this-name/x", ".",
    "a" * 300, "a/b", "é", "cpu", "cuda:7", "auto", "static", "dynamic", "tensor", "token", "channel", "minmax", "mse",
    "percentile", "[216]", "[999999]",
)  # fmt: skip
"""What keys are given, as it is written on a command line. Not the large numbers that ask for hours of work."""

_SENSIBLE = 0.7
"""How often a number or a switch gets a value of its own kind."""

_GROUPS = ("quantizer", "search", "tuning", "reconstruction", "tracking", "eval")
_FEW = ["eval.block_length=32", "eval.blocks=2", "search.candidates=8", "search.text_length=16", "tuning.steps=2"]


def cases(limits: Limits, given: argparse.Namespace) -> Iterator[Case]:
    """One configuration after the other."""
    runs = Runs(limits.folder / "inputs", given.deadline)
    keys = flatten(to_dict(RunConfig()))
    options = {
        group: sorted(path.stem for path in (config_folder() / group).glob("*.yaml") if path.stem != "wandb")
        for group in _GROUPS
    }
    for index, draw in limits.draws():
        kind, folder = list(KINDS)[index % len(KINDS)], limits.folder / f"case-{index}"
        words = drawn(draw, keys, options)
        ended = runs.run(kind, folder, words)
        yield judged(f"case {index}: {kind} {' '.join(words)}", words, ended, folder)
        shutil.rmtree(folder)


def sensible(default: object) -> tuple[str, ...]:
    """Values of a key's own kind."""
    if isinstance(default, bool):
        return "true", "false"
    return ("0", "1", "2", "3", "4", "8") if isinstance(default, int) else ("0.01", "0.5", "0.9", "1.0", "2.5")


def drawn(draw: random.Random, keys: dict[str, object], options: dict[str, list[str]]) -> list[str]:
    """One to three overrides: a value for a key, an option of a group, or something misspelt."""
    words = []
    for _ in range(draw.randint(1, 3)):
        way = draw.random()
        if way < 0.15:
            group = draw.choice(sorted(options))
            words.append(f"{group}={draw.choice(options[group])}")
            continue
        key, value = draw.choice(sorted(keys)), draw.choice(VALUES)
        if isinstance(keys[key], int | float) and draw.random() < _SENSIBLE:
            value = draw.choice(sensible(keys[key]))
        if way < 0.2:
            at = draw.randrange(len(key))
            key = key[:at] + key[at + 1 :]
        elif way < 0.25:
            key = draw.choice(["+", "++", "~"]) + key
        words.append(f"{key}={value}")
    # an option of a group brings its own sizes, which are those of real models
    return [*(word for word in words if word.partition("=")[0] in options), *_FEW,
            *(word for word in words if word.partition("=")[0] not in options)]  # fmt: skip


def judged(name: str, words: list[str], ended: Ended, folder: Path) -> Case:
    """How a case ended."""
    if ended.status is None:
        return Case(name, "hang", True, ended.printed[-2000:])
    if ended.has_traceback or ended.status not in (0, 1):
        return Case(name, "traceback", True, ended.told)
    if ended.status == 0:
        last = Path(ended.printed.splitlines()[-1])
        return Case(name, "done", not last.is_file(), ended.printed[-500:])
    errors = [line for line in ended.told.splitlines() if line.startswith("cushion: error: ")]
    if len(errors) != 1:
        return Case(name, f"{len(errors)} errors", True, ended.printed[-2000:])
    if not any(word.partition("=")[0].lstrip("+~").rpartition(".")[2] in errors[0] for word in words):
        return Case(name, "refused without naming a key of the case", True, errors[0])
    return Case(name, "refused in one line")
