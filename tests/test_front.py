"""What `import cushion` gives: the names, and a configuration composed without the command line."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest
from composing import composed
from hydra.core.global_hydra import GlobalHydra

import cushion
from cushion.errors import ConfigError


@pytest.mark.parametrize("name", sorted(cushion._PLACES))
def test_a_name_is_that_of_its_module(name: str) -> None:
    module, _, attribute = cushion._PLACES[name].partition(":")
    assert getattr(cushion, name) is getattr(importlib.import_module(module), attribute)
    assert attribute == name
    assert name in dir(cushion)


def test_other_names_are_refused_as_ever() -> None:
    with pytest.raises(AttributeError, match="module 'cushion' has no attribute 'runn'"):
        _ = cushion.runn


def test_importing_cushion_imports_no_torch() -> None:
    told = "import sys, cushion; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", told], check=False).returncode == 0


def test_composing_gives_what_the_command_line_gives() -> None:
    overrides = ("model=tiny", "search=bos", "quantizer=w4a4", "seed=3")
    assert cushion.compose(*overrides) == composed(*overrides)
    one = cushion.compose("experiment=ablation_tau", "search.tau=0.5")
    assert (one.experiment, one.search.tau) == ("ablation_tau", 0.5)


def test_what_is_refused_says_the_key_and_a_sweep_is_not_one_run() -> None:
    for overrides, message in (
        (("search.tua=0.3",), "tua.*did you mean .tau"),
        (("quantizer=nonne",), "did you mean .none"),
        (("search.tau=2",), r"search\.tau"),
        (("experiment=ablation_tau",), "a sweep over search.tau: give each one value"),
        (("search.tau=0.3,0.5",), "a sweep over search.tau: give each one value"),
    ):
        with pytest.raises(ConfigError, match=message):
            cushion.compose(*overrides)


def test_a_program_that_hydra_started_keeps_its_hydra() -> None:
    before = GlobalHydra.instance().hydra
    cushion.compose("model=tiny")
    assert GlobalHydra.instance().hydra is before
