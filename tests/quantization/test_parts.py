"""The parts of a quantizer: every field has one, what is off does nothing, and whoever asks, asks all of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from helpers import registered
from torch import Tensor

from cushion.checks import at_least
from cushion.config import (
    ActivationConfig,
    AttentionConfig,
    CompensationConfig,
    KvCacheConfig,
    QFeMConfig,
    QuantizerConfig,
    RunConfig,
    TuningConfig,
    WeightConfig,
)
from cushion.config_warnings import options_without_effect
from cushion.errors import CalibrationError, ConfigError
from cushion.models import LanguageModel
from cushion.quantization.effect import Effect, Site, Work
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.identity import quantizer_identity
from cushion.quantization.parts.activations import EXTREMES
from cushion.quantization.parts.base import RANGES, Part
from cushion.quantization.parts.qfem import RATIOS
from cushion.quantization.parts.registry import PARTS, SHARED, parts, turned_off, unread, without_rounding
from cushion.quantization.parts.rotation_sites import LEFT_ALONE
from cushion.quantization.parts.smoothing_search import SEARCHED
from cushion.tuning_ranges import tuning_quantizer

FULL_PRECISION = TuningConfig(method="prefix", steps=1, prediction_model="full_precision")
EVERYTHING = QuantizerConfig(
    "everything",
    weights=WeightConfig(4, "per_group", 16, "output", method="gptq"),
    activations=ActivationConfig(6, symmetric=False, estimator="block_output"),
    compensation=CompensationConfig("aser", 8),
    kv_cache=KvCacheConfig(4, "per_tensor"),
    attention=AttentionConfig(5),
    levels="paper",
    zero_point="integer",
    smoothing_alpha=0.25,
    smoothing_pairs="up",
    rotation="hadamard",
    rotation_seed=3,
    head_rotation="all",
    input_rotation="all",
    rotation_sites="adaptive",
    targets=["q_proj"],
    qfem=QFeMConfig(alpha=3.0, texts=2),
)
SEARCHING = replace(EVERYTHING, smoothing_alpha=None, smoothing_search="awq", smoothing_steps=7, input_rotation="down")
"""With the one part that some of the others exclude."""


WITHOUT_FIELD = {"gptq": ("weights",), "clipping": ("weights",), "block_output": ("activations",)}
"""Parts that are a method of another one, and whose field they are chosen in."""


def test_every_field_of_a_quantizer_belongs_to_exactly_one_part() -> None:
    owned = [name for part in parts() for name in part.fields]
    assert sorted([*owned, *SHARED, "name", "calibration", "plugins"]) == sorted(
        field.name for field in fields(QuantizerConfig)
    )


@pytest.mark.parametrize("name", PARTS)
def test_a_part_turned_off_is_off_and_leaves_all_others_as_they_are(name: str) -> None:
    everything = SEARCHING if name == "smoothing_search" else EVERYTHING
    part, off = PARTS[name], PARTS[name].off(everything)
    assert part.is_on(everything)
    assert not part.is_on(off)
    changed = [one.name for one in fields(off) if getattr(off, one.name) != getattr(everything, one.name)]
    assert set(changed) == set(part.fields or WITHOUT_FIELD[name])
    assert part.statistics(off) == part.reads(off) == frozenset()
    assert not part.spans_batch(off)
    assert part.off(off) == off


@pytest.mark.parametrize(
    ("part", "statistics", "reads", "spans_batch", "label"),
    [
        ("weights", set(), {"levels", "targets"}, False, "W4"),
        ("activations", {EXTREMES}, {"levels", "zero_point", "targets"}, False, "A6 block_output"),
        ("compensation", set(), set(), False, " ASER 8"),
        ("kv_cache", set(), {"levels", "zero_point"}, True, "KV4"),
        ("attention", set(), {"levels"}, True, " attention 5"),
        ("smoothing", {RANGES}, set(), False, ""),
        ("smoothing_pairs", {RANGES}, set(), False, " up scaled"),
        ("smoothing_search", {SEARCHED}, set(), False, " awq"),
        ("rotation", set(), set(), False, " rotated"),
        ("head_rotation", set(), set(), False, " values and keys rotated"),
        ("rotation_sites", {LEFT_ALONE}, set(), False, " adaptive"),
        ("input_rotation", set(), {"targets"}, False, " all inputs rotated"),
        ("qfem", {RATIOS}, set(), False, ""),
    ],
)
def test_what_a_part_declares(part: str, statistics: set[Any], reads: set[str], spans_batch: bool, label: str) -> None:
    one, everything = PARTS[part], SEARCHING if part == "smoothing_search" else EVERYTHING
    assert one.statistics(everything) == statistics
    assert one.reads(everything) == reads
    assert one.spans_batch(everything) == spans_batch
    assert one.label(everything) == label


CHANGES: dict[str, list[Any]] = {
    "weights": [WeightConfig(5, "per_group", 16), WeightConfig(4), WeightConfig(4, "per_group", 8),
                WeightConfig(4, "per_group", 16, "mse")],
    "activations": [ActivationConfig(5, symmetric=False), ActivationConfig(6, symmetric=False),
                    ActivationConfig(6, symmetric=False, estimator="block_output", estimator_options={"texts": 9}),
                    ActivationConfig(6), ActivationConfig(6, range="dynamic"),
                    ActivationConfig(6, "per_token", "dynamic", False), ActivationConfig(6, estimator="mse"),
                    ActivationConfig(6, estimator="percentile"),
                    ActivationConfig(6, estimator="percentile", estimator_options={"percentile": 99})],
    "compensation": [CompensationConfig("aser", 9), CompensationConfig("lqer", 8), CompensationConfig("l2qer", 8),
                     CompensationConfig("aser", 8, 0.5), CompensationConfig("aser", 8, damping=0.1)],
    "kv_cache": [KvCacheConfig(5, "per_tensor"), KvCacheConfig(4), KvCacheConfig(4, "per_tensor", True),
                 KvCacheConfig(8, "per_tensor", True), KvCacheConfig(8, "per_tensor", True, format="fp8_e4m3"),
                 KvCacheConfig(8, "per_tensor", True, "static")],
    "attention": [AttentionConfig(4), AttentionConfig(5, "per_token"), AttentionConfig(5, symmetric=False)],
    "smoothing_alpha": [None, 0.5], "rotation": ["none"], "rotation_seed": [4],
    "smoothing_pairs": ["none"], "smoothing_search": [], "smoothing_steps": [],
    "head_rotation": ["none", "values", "keys"], "input_rotation": ["none"], "rotation_sites": ["all"],
    "levels": ["full"], "zero_point": ["real"], "shared_exponent": [], "targets": [["all"]],
}  # fmt: skip


def test_everything_that_decides_is_in_the_identity() -> None:
    assert CHANGES.keys() == {*SHARED, *(name for part in parts() for name in part.fields)} - {"qfem"}
    changed = [EVERYTHING, *(replace(EVERYTHING, **{key: value}) for key in CHANGES for value in CHANGES[key])]
    changed += [SEARCHING, replace(SEARCHING, smoothing_steps=9), replace(SEARCHING, smoothing_search="none")]
    identities = [json.dumps(quantizer_identity(quantizer), sort_keys=True) for quantizer in changed]
    assert len(set(identities)) == len(changed)


def test_a_quantizer_is_what_its_parts_are_together() -> None:
    assert EVERYTHING.statistics == {RANGES, EXTREMES, RATIOS, LEFT_ALONE}
    assert EVERYTHING.gathered == {EXTREMES, RATIOS, LEFT_ALONE}
    assert EVERYTHING.spans_batch
    assert EVERYTHING.scheme == (
        "everything W4A6KV4 GPTQ ASER 8 block_output attention 5 rotated adaptive values and keys rotated up scaled "
        "all inputs rotated"
    )
    nothing = turned_off(EVERYTHING, lambda part: True)
    assert nothing == QuantizerConfig("everything", WeightConfig(bits=None), ActivationConfig(bits=None))
    assert nothing.is_full_precision
    assert nothing.statistics == frozenset()
    assert nothing.scheme == "everything W16A16"
    assert replace(nothing, name="rotation", rotation="hadamard").scheme == "rotation W16A16"
    assert unread(nothing) == SHARED


@pytest.mark.parametrize(
    ("name", "activations", "scheme"),
    [
        ("mine", ActivationConfig(), "mine W8A8KV4"),
        ("mine", ActivationConfig(estimator="percentile"), "mine W8A8KV4 percentile"),
        ("mine", ActivationConfig(estimator="mse", range="dynamic"), "mine W8A8KV4"),
        ("mse_static", ActivationConfig(estimator="mse"), "mse_static W8A8KV4"),
        ("mse_static", ActivationConfig(), "mse_static W8A8KV4 minmax"),
    ],
)
def test_a_scheme_says_the_estimator_that_its_name_does_not(name: str, activations: Any, scheme: str) -> None:
    assert QuantizerConfig(name, activations=activations, kv_cache=KvCacheConfig(4)).scheme == scheme


def test_what_no_part_reads_has_no_effect() -> None:
    rotated = QuantizerConfig(
        "rotation", WeightConfig(bits=None), ActivationConfig(bits=None),
        levels="paper", zero_point="integer", rotation="hadamard", targets=["q_proj"],
    )  # fmt: skip
    assert options_without_effect(RunConfig(quantizer=rotated)) == [
        "quantizer.levels='paper' has no effect without quantized weights, activations, cache or attention on integers",
        "quantizer.zero_point='integer' has no effect without an asymmetric grid",
        "quantizer.targets=['q_proj'] has no effect without quantized weights or activations",
    ]
    with_cache = replace(rotated, kv_cache=KvCacheConfig(4))
    assert [warning.partition("=")[0] for warning in options_without_effect(RunConfig(quantizer=with_cache))] == [
        "quantizer.targets"
    ]


# ---- a part of somebody else's --------------------------------------------------------------------------------------


@dataclass
class NoiseConfig:
    bits: int = 4

    def __post_init__(self) -> None:
        at_least("quantizer.plugins.noise.bits", self.bits, 1)


class Noise(Part):
    name = "noise"
    config = NoiseConfig

    def statistics(self, quantizer: Any) -> frozenset[Any]:
        return frozenset({RANGES})

    def spans_batch(self, quantizer: Any) -> bool:
        return self.is_on(quantizer)

    def label(self, quantizer: Any) -> str:
        return f" noisy {self.of(quantizer).bits}" if self.is_on(quantizer) else ""

    def warnings(self, quantizer: Any) -> list[str]:
        return ["noise is loud"] if self.is_on(quantizer) else []


@pytest.fixture
def noise() -> Iterator[Part]:
    with registered(PARTS, "noise", Noise()) as part:
        yield part


@pytest.mark.usefixtures("noise")
def test_a_part_that_is_added_is_asked_and_turned_off_with_nothing_else_changed() -> None:
    plain = QuantizerConfig("plain", WeightConfig(bits=None), ActivationConfig(bits=None))
    noisy = replace(plain, plugins={"noise": {"bits": 3}})
    assert noisy.plugins == {"noise": NoiseConfig(3)}
    assert plain.is_full_precision
    assert not noisy.is_full_precision
    assert noisy.needs_calibration
    assert noisy.spans_batch
    assert noisy.scheme == "plain W16A16 noisy 3"
    assert options_without_effect(RunConfig(quantizer=noisy)) == ["noise is loud"]
    assert without_rounding(noisy) == plain
    assert tuning_quantizer(FULL_PRECISION, noisy) == plain
    assert without_rounding(replace(noisy, rotation="hadamard")) == replace(plain, rotation="hadamard")
    assert quantizer_identity(noisy)["noise"] == {"bits": 3}


@pytest.mark.usefixtures("noise")
@pytest.mark.parametrize(
    ("plugins", "message"),
    [
        ({"noise": {"bit": 3}}, r"quantizer.plugins.noise={'bit': 3} is not allowed: .*bit.*; its keys are: bits"),
        ({"noise": {"bits": "many"}}, r"quantizer.plugins.noise={'bits': 'many'} is not allowed: .*many"),
        ({"noise": {"bits": 0}}, r"quantizer.plugins.noise.bits=0 is not allowed: it must be at least 1"),
        ({"nois": {}}, r"quantizer.plugins='nois' is not allowed: choose one of .*did you mean 'noise'"),
        ({"qfem": {"alpha": 1}}, r"quantizer.plugins.qfem=.* this part is Cushion's own, set quantizer.qfem"),
    ],
)
def test_options_of_a_part_that_is_added_are_checked(plugins: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizerConfig(plugins=plugins)


@pytest.mark.usefixtures("noise")
def test_null_turns_a_part_that_is_added_off_and_targets_count_for_one_that_is_on() -> None:
    plain = QuantizerConfig("plain", WeightConfig(bits=None), ActivationConfig(bits=None))
    assert replace(plain, plugins={"noise": None}) == plain
    noisy = replace(plain, plugins={"noise": {}})
    assert unread(noisy) == ("levels", "zero_point", "shared_exponent")
    assert quantizer_identity(noisy) != quantizer_identity(replace(noisy, targets=["q_proj"]))


class Halving(Effect):
    """Leaves half of every targeted weight, as numbers."""

    def at(self, work: Work, site: Site) -> None:
        assert isinstance(site.weight, Tensor)
        site.weight = site.weight / 2


HALVING = Halving()


class Half(Part):
    name = "half"
    config = NoiseConfig
    effect = f"{__name__}:HALVING"


def test_a_part_may_change_a_weight_and_leave_it_in_full_precision(tiny: Callable[..., LanguageModel]) -> None:
    lm = tiny()
    before = {name: linear.weight for name, linear in lm.linears().items()}
    with registered(PARTS, "half", Half()):
        config = QuantizerConfig(
            "half", WeightConfig(bits=None), ActivationConfig(bits=None), targets=["q_proj"], plugins={"half": {}}
        )
        with FittedQuantizer(config).on(lm):
            for name, weight in before.items():
                now = lm.model.get_submodule(name).weight
                assert torch.equal(now, weight / 2) if name.endswith("q_proj") else now is weight
    assert all(linear.weight is before[name] for name, linear in lm.linears().items())


def test_an_estimator_without_its_statistic_is_refused(tiny: Callable[..., LanguageModel]) -> None:
    config = QuantizerConfig(activations=ActivationConfig(estimator="mse"))
    message = r"needs statistics of the linears' inputs .*histogram:Histogram"
    with pytest.raises(CalibrationError, match=message), FittedQuantizer(config).on(tiny()):
        pass


def test_the_configuration_needs_no_torch() -> None:
    script = "import sys, cushion.config_warnings; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)
