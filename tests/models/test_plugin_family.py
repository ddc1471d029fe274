"""A family that a user's package registers: its entry is held to what Cushion's own are held to."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from helpers import calibrated, random_texts
from installed_plugins import PLUGINS

from cushion.config import ActivationConfig, ModelConfig, PathsConfig, QuantizerConfig, WeightConfig
from cushion.errors import ConfigError, ModelNotFoundError, UnsupportedModelError
from cushion.models import LanguageModel
from cushion.models.architectures import ARCHITECTURES, Architecture, find_architecture, register
from cushion.models.language_model import load_language_model
from cushion.prefix import Prefix
from cushion.quantization.rotation import rotated
from cushion.quantization.simulate import quantized

Tiny = Callable[..., LanguageModel]
NAME = "phi_family"
TEXTS = random_texts(3, 20)
LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2"]


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The plugin, imported; afterwards the table is what it was."""
    monkeypatch.syspath_prepend(PLUGINS)
    before = dict(ARCHITECTURES.items())
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME)
    ARCHITECTURES._items.clear()
    ARCHITECTURES._items.update(before)


@torch.no_grad()
def logits(lm: LanguageModel) -> torch.Tensor:
    return lm.model(TEXTS).logits


def test_its_tiny_model_has_the_parts_that_the_entry_names(plugin: ModuleType, tiny: Tiny) -> None:
    lm = tiny("phi")
    assert (lm.model.config.model_type, len(lm.blocks)) == ("phi", 3)
    assert list(lm.linears()) == [f"model.layers.{index}.{name}" for index in range(3) for name in LINEARS]
    prefix = Prefix.from_tokens(lm.model, [17, 42])
    assert len(prefix.cache(lm.model).layers) == 3


def test_smoothing_and_rotation_by_its_entry_leave_the_function_unchanged(plugin: ModuleType, tiny: Tiny) -> None:
    lm = tiny("phi")
    untouched, ranges = logits(lm), calibrated(lm, TEXTS)
    nothing = QuantizerConfig(
        weights=WeightConfig(bits=None), activations=ActivationConfig(bits=None), smoothing_alpha=0.5
    )
    with quantized(lm, nothing, ranges):
        assert not torch.equal(logits(lm), untouched)
        torch.testing.assert_close(logits(lm), untouched, rtol=0, atol=1e-4)
    with rotated(lm, "hadamard", 0):
        assert not torch.equal(logits(lm), untouched)
        torch.testing.assert_close(logits(lm), untouched, rtol=0, atol=1e-4)


def test_an_edited_entry_is_another_model_to_the_cache(plugin: ModuleType, tiny: Tiny) -> None:
    before = tiny("phi").fingerprint
    assert tiny("phi").fingerprint == before
    (entry,) = ARCHITECTURES["phi"]
    ARCHITECTURES._items["phi"] = (replace(entry, smoothing=()),)
    assert tiny("phi").fingerprint != before


def test_variants_are_tried_in_order(plugin: ModuleType) -> None:
    entry = Architecture("mine", "model.layers", ())
    register(replace(entry, requires=(("is_new", True),)), replace(entry, blocks="model.blocks"))
    for is_new, blocks in ((True, "model.layers"), (False, "model.blocks")):
        config = type("Config", (), {"model_type": "mine", "is_new": is_new})
        assert find_architecture(config, "me/mine").blocks == blocks


def test_a_family_is_registered_once_and_alone(plugin: ModuleType) -> None:
    (entry,) = ARCHITECTURES["phi"]
    with pytest.raises(ConfigError, match="model_type=phi is registered twice: all entries of a family"):
        register(entry)
    with pytest.raises(ConfigError, match="model_type=phi, other: register the entries of one family"):
        register(entry, replace(entry, model_type="other"))


def test_without_the_plugin_the_family_is_refused_with_the_way_out() -> None:
    config = type("Config", (), {"model_type": "phi"})
    with pytest.raises(UnsupportedModelError, match=r"a plugin of one file adds it, see docs/extending\.md"):
        find_architecture(config, "me/mine")
    with pytest.raises(ModelNotFoundError, match="'tiny:phi' does not exist: known are tiny:llama, "):
        load_language_model(ModelConfig(path="tiny:phi"), PathsConfig())
