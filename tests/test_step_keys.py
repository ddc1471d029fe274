"""The keys of cached steps are made of what docs/results.md says they are made of."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from helpers import registered
from tiny_run import small_config, tuning_config
from tiny_tasks import own_tasks
from torch import Tensor

import cushion.search.greedy_prefix
import cushion.search.rule_prefix
import cushion.steps  # noqa: F401 - with the two above, every step is defined
from cushion import pipeline
from cushion.config import (
    ActivationConfig,
    CalibrationConfig,
    EvalConfig,
    QFeMConfig,
    QuantizerConfig,
    ReconstructionConfig,
    RunConfig,
    SearchConfig,
)
from cushion.config.latency import LatencyConfig
from cushion.quantization.effect import Effect, Turn
from cushion.quantization.parts.base import Part
from cushion.quantization.parts.registry import PARTS
from cushion.step import Step

PAGE = Path(__file__).parent.parent / "docs" / "results.md"
OF_EVERY_STEP = {"step", "code", "runtime", "model"}


def documented() -> dict[str, set[str]]:
    """By step, the names in its key, `config.tau` for what stands in a record, as the page has them."""
    rows = re.findall(r"^\| `(\w+)` \| .* \| (`[^|]*`) \| [^|]*\|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    return {step: set(re.findall(r"`([\w.]+)`", names)) for step, names in rows}


def names_in(key: dict[str, object]) -> set[str]:
    """The names in a key as the page writes them."""
    found = key.keys() - OF_EVERY_STEP - {"config"}
    options = key.get("config")
    return found | ({f"config.{name}" for name in options} if isinstance(options, dict) else set())


class _Codes(Effect):
    """A part that is fitted block by block."""

    def fit(self, turn: Turn) -> dict[str, Tensor]:
        return {name: torch.zeros(1) for name in turn.sites}


CODES = _Codes()


@dataclass
class _Options: ...


class _Part(Part):
    name, config, effect, blockwise = "codes", _Options, f"{__name__}:CODES", True


def runs(text: Path, folder: Path) -> list[RunConfig]:
    """Runs that together have every step."""
    everything = tuning_config(text, folder / "out")
    everything.search = replace(everything.search, proposal="outlier", scoring="full", max_length=1)
    everything.tuning.lambda_q = 0.1
    everything.quantizer = QuantizerConfig(
        "qfem",
        activations=ActivationConfig(range="dynamic"),
        calibration=CalibrationConfig(2, 16),
        smoothing_alpha=0.5,
        qfem=QFeMConfig(search=True, target=1.5, curve=0),
    )
    everything.eval = EvalConfig(
        block_length=32, blocks=2, activation_blocks=2, controls=False, limit=2, tasks=["tiny_generation"],
        sparsity_texts=1, sparsity_ppl=50.0, spike_texts=1,
        include_path=own_tasks(folder / "tasks"),
    )  # fmt: skip
    found = [everything]
    for method in ("qfep", "prefixquant"):
        config = small_config(text, folder / "out")
        config.search = SearchConfig(name=method, method=method, texts=2, text_length=20)
        config.reconstruction = ReconstructionConfig(name="weights", method="blockwise", weights=True, epochs=1)
        config.eval = replace(config.eval, controls=False, prefix_as_tokens=True)
        found.append(config)
    config = small_config(text, folder / "out")
    config.quantizer = replace(
        config.quantizer,
        plugins={"codes": {}},
        input_rotation="down",
        rotation_sites="adaptive",
        smoothing_search="awq",
    )
    timing = LatencyConfig([1], [4], new_tokens=2, repeats=3, warmup=1)
    config.eval = replace(config.eval, controls=False, latency=timing)
    return [*found, config]


def test_every_key_is_made_of_what_the_page_says(text_file: Path, tmp_path: Path) -> None:
    made: dict[str, set[str]] = {}
    with registered(PARTS, "codes", _Part()):
        for config in runs(text_file, tmp_path):
            pipeline.run(config)
    for path in (tmp_path / "out" / "cache").glob("*/*/depends_on.json"):
        key = json.loads(path.read_text(encoding="utf-8"))
        assert key.keys() >= OF_EVERY_STEP
        made.setdefault(path.parent.parent.name, set()).update(names_in(key))
    assert made == documented()


def every_step() -> set[str]:
    """The names of all cached steps of Cushion's own."""

    def below(kind: type[Step]) -> set[str]:
        found = {
            step.name
            for step in kind.__subclasses__()
            if "name" in vars(step) and step.__module__.startswith("cushion.")
        }
        return found.union(*(below(step) for step in kind.__subclasses__()))

    return below(Step)


def test_the_page_has_every_step() -> None:
    assert every_step() <= set(documented())


@pytest.mark.parametrize(
    ("key", "names"),
    [
        ({"prefix": "p", "step": "s", "code": "c", "runtime": {}, "model": "m"}, {"prefix"}),
        ({"config": {"tau": 1.0, "grid": None}, "texts": "t"}, {"config.tau", "config.grid", "texts"}),
    ],
)
def test_names_are_those_of_the_records(key: dict[str, object], names: set[str]) -> None:
    assert names_in(key) == names
