"""QFeM: ratios recomputed by plain loops, siblings by the tensor they read, planted modules kept, nothing left."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from helpers import calibrated, random_texts
from planted_linears import DOWN, GATES, PLANTED, QUERIES, own_texts, plant
from torch import Tensor, nn
from torch.nn import functional

from cushion.activations import ChannelRanges
from cushion.config import ActivationConfig, QFeMConfig, QuantizerConfig, WeightConfig
from cushion.errors import CalibrationError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.input_statistics import observe_fitted
from cushion.quantization.linear import QuantizedLinear
from cushion.quantization.numerics import Grid, quantize_weight
from cushion.quantization.parts.registry import without_rounding
from cushion.quantization.qfem import ModuleRatios, RatioObserver
from cushion.quantization.simulate import quantized

Tiny = Callable[..., LanguageModel]
EMPTY = Prefix.empty()


def make_texts(seed: int = 0, rows: int = 3, length: int = 17) -> Tensor:
    return random_texts(rows, length, seed)


def quantizer(**changes: Any) -> QuantizerConfig:
    dynamic = {"activations": ActivationConfig(range="dynamic"), "qfem": QFeMConfig(alpha=10.0)}
    return QuantizerConfig("under_test", **{**dynamic, **changes})


def measured(
    lm: LanguageModel,
    texts: Tensor,
    behind: Prefix = EMPTY,
    config: QuantizerConfig | None = None,
    calibration: ChannelRanges | None = None,
) -> ModuleRatios:
    observer = RatioObserver()
    steps = list(observe_fitted(lm, behind, texts, FittedQuantizer(config or quantizer(), calibration), [observer]))
    assert steps == list(range(1, len(texts) + 1))
    return observer.ratios()


@torch.no_grad()
def inputs_of(lm: LanguageModel, tokens: Tensor) -> dict[str, Tensor]:
    """The input of every linear over one text that is run whole and without a cache: name -> (tokens, channels)."""
    seen: dict[str, Tensor] = {}
    handles = []
    for name, module in lm.linears().items():
        hook = lambda _module, args, name=name: seen.update({name: args[0].flatten(0, -2).clone()})  # noqa: E731
        handles.append(module.register_forward_pre_hook(hook))
    lm.model(tokens[None])
    for handle in handles:
        handle.remove()
    return seen


def plain_ratio(values: Tensor, divisors: Tensor | None = None) -> float:
    """max / median of the abs-max of every token, by loops over numbers."""
    scales = []
    for token in values.tolist():
        parts = token if divisors is None else [a / s for a, s in zip(token, divisors.tolist(), strict=True)]
        scales.append(max(abs(part) for part in parts))
    return max(scales) / sorted(scales)[(len(scales) - 1) // 2]


# ---- the ratios ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix", [[], [17, 42]], ids=["no prefix", "prefix"])
def test_ratios_are_those_of_plain_loops_over_whole_texts(tiny: Tiny, family: str, prefix: list[int]) -> None:
    lm, texts = tiny(family), make_texts()
    behind = Prefix.from_tokens(lm.model, prefix) if prefix else EMPTY
    found = measured(lm, texts, behind).ratios
    expected: dict[str, list[float]] = {name: [] for name in lm.linears()}
    for text in texts:
        for name, values in inputs_of(lm, torch.cat([torch.tensor(prefix, dtype=torch.long), text])).items():
            if len(values) == len(prefix) + len(text):
                expected[name].append(plain_ratio(values[len(prefix) :]))
            elif len(values) and not prefix:  # an expert: which of its tokens are the prefix's cannot be told
                expected[name].append(plain_ratio(values))
    assert found.keys() <= expected.keys()
    for name, ratios in expected.items():
        if len(ratios) == len(texts) or (ratios and not prefix):
            assert found[name] == pytest.approx(sum(ratios) / len(ratios), rel=2e-4)
    assert sum(map(len, expected.values())) >= 3 * 4 * len(texts), "at least four linears in every block"


@pytest.mark.parametrize("family", ["llama", "opt", "bloom"])
def test_with_smoothing_the_ratios_are_those_of_the_smoothed_inputs(tiny: Tiny, family: str) -> None:
    lm, texts = tiny(family), make_texts()
    pairs = {
        f"{lm.architecture.blocks}.{block}.{name}": [f"{lm.architecture.blocks}.{block}.{other}" for other in names]
        for block in range(3)
        for _, names in lm.architecture.smoothing
        for name in names
    }
    for block in lm.blocks:
        for norm, _ in lm.architecture.smoothing:
            block.get_submodule(norm).weight[5] *= 40
    unsmoothed = [inputs_of(lm, text) for text in texts]
    scales = {}
    for name, group in pairs.items():
        top = torch.stack([inputs[name].abs().amax(0) for inputs in unsmoothed]).amax(0)
        weight = torch.cat([lm.model.get_submodule(other).weight for other in group]).abs().amax(0)
        scales[name] = top**0.8 / weight**0.2
    ranges = calibrated(lm, texts)
    plain = measured(lm, texts).ratios
    found = measured(lm, texts, EMPTY, quantizer(smoothing_alpha=0.8), ranges).ratios
    static = measured(lm, texts, EMPTY, quantizer(smoothing_alpha=0.8, activations=ActivationConfig()), ranges).ratios
    assert static == found, "ranges do not matter to what would be rounded"
    changed = 0
    for name in lm.linears():
        ratios = [plain_ratio(inputs[name], scales.get(name)) for inputs in unsmoothed]
        assert found[name] == pytest.approx(sum(ratios) / len(ratios), rel=1e-3)
        changed += abs(found[name] / plain[name] - 1) > 0.01
        assert name in pairs or found[name] == pytest.approx(plain[name], rel=1e-3)
    assert changed > 0


def test_rotation_and_smoothing_alone_are_in_place_while_ratios_are_measured() -> None:
    function_preserving: dict[str, Any] = {"smoothing_alpha": 0.25, "rotation": "hadamard", "rotation_seed": 3}
    plain = without_rounding(quantizer(**function_preserving))
    assert {name: getattr(plain, name) for name in function_preserving} == function_preserving
    assert without_rounding(quantizer()).is_full_precision
    assert not plain.uses_qfem


def test_an_input_that_is_not_finite_is_refused(tiny: Tiny) -> None:
    lm = tiny("llama")
    lm.model.get_submodule("model.layers.1.mlp.up_proj").weight.fill_(float("inf"))
    with pytest.raises(CalibrationError, match=r"input of model\.layers\.1\.mlp\.down_proj is not finite .*bfloat16"):
        measured(lm, make_texts())


def test_a_median_of_zero_gives_the_largest_number_that_json_can_hold() -> None:
    observer = RatioObserver()
    observer("a", torch.tensor([[[0.0, 0.0], [0.0, 0.0], [3.0, -4.0]]]))
    observer("silent", torch.zeros(1, 3, 2))
    found = observer.ratios()
    assert found.ratios == {"a": sys.float_info.max, "silent": 1.0}
    assert json.loads(json.dumps(found.ratios, allow_nan=False)) == found.ratios
    assert found.above(1e300) == ["a"]
    assert found.above(found.thresholds()[0]) == []


# ---- siblings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_siblings_are_those_that_read_one_tensor(tiny: Tiny, family: str) -> None:
    lm, texts = tiny(family), make_texts()
    readers: list[tuple[Tensor, set[str]]] = []  # all inputs of a forward pass, kept alive

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def call(_module: nn.Module, args: tuple[Tensor]) -> None:
            for values, names in readers:
                if values is args[0]:
                    names.add(name)
                    return
            readers.append((args[0], {name}))

        return call

    handles = [linear.register_forward_pre_hook(hook(name)) for name, linear in lm.linears().items()]
    with torch.no_grad():
        lm.model(texts[:1])
    for handle in handles:
        handle.remove()
    found = measured(lm, texts[:1])
    assert sorted(map(sorted, found.groups)) == sorted(sorted(names) for _, names in readers)
    for group in found.groups:
        assert len({found.ratios[name] for name in group}) == 1


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "opt", "bloom"])
def test_siblings_are_those_that_the_architecture_table_says_read_one_norm(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    found = measured(lm, make_texts())
    expected, alone = [], set(lm.linears())
    for block in range(3):
        for _, names in lm.architecture.smoothing:
            group = {f"{lm.architecture.blocks}.{block}.{name}" for name in names}
            expected.append(group)
            alone -= group
    assert sorted(map(sorted, found.groups)) == sorted(map(sorted, [*expected, *({name} for name in alone)]))


def test_siblings_are_known_by_the_tensor_itself_not_by_its_name_or_its_values() -> None:
    observer = RatioObserver()
    for seed in range(2):
        shared = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(seed))
        twin = shared.clone()
        for name, values in (("a", shared), ("twin", twin), ("b", shared), ("c", shared)):
            observer(name, values)
    assert observer.ratios().groups == [["a", "b", "c"], ["twin"]]


def test_memory_that_is_used_again_makes_no_siblings() -> None:
    observer, memory = RatioObserver(), torch.empty(20)
    for index in range(20):
        values = memory.fill_(index + 1).view(1, 5, 4)
        observer(f"linear{index}", values)
        del values  # the next tensor has the same address, and mostly the same id
    assert [len(group) for group in observer.ratios().groups] == [1] * 20


def test_thresholds_keep_every_set_once_and_targets_limit_them() -> None:
    ratios = ModuleRatios({"q": 3.0, "k": 3.0, "o": 7.0, "down": 5.0}, [["q", "k"], ["o"], ["down"]])
    assert ratios.thresholds() == [7.0, 5.0, 3.0, 0.0]
    assert [ratios.above(alpha) for alpha in ratios.thresholds()] == [[], ["o"], ["o", "down"], ["q", "k", "o", "down"]]
    limited = ratios.of(["k", "down", "never_run"])
    assert limited == ModuleRatios({"k": 3.0, "down": 5.0}, [["k"], ["down"]])


# ---- planted modules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [[], [17, 42]], ids=["no prefix", "prefix"])
def test_exactly_the_planted_modules_have_large_ratios(tiny: Tiny, prefix: list[int]) -> None:
    lm = plant(tiny("llama"))
    behind = Prefix.from_tokens(lm.model, prefix) if prefix else EMPTY
    found = measured(lm, own_texts(lm), behind)
    assert set(found.above(10.0)) == PLANTED
    by_ratio = sorted({ratio for name, ratio in found.ratios.items() if name in PLANTED}, reverse=True)
    assert [set(found.above(alpha)) for alpha in (*by_ratio[1:], 10.0)] == [{*DOWN}, {*DOWN, *GATES}, PLANTED]
    assert set(QUERIES) == PLANTED - {*DOWN, *GATES}


def test_a_prefix_that_is_the_outlier_itself_leaves_its_positions_out(tiny: Tiny) -> None:
    lm = plant(tiny("llama"))
    texts = own_texts(lm)
    clean = torch.cat([texts[:, :1], texts[:, 2:]], dim=1)  # without the token that stands out
    behind = Prefix.from_tokens(lm.model, texts[0, 1:2].tolist())
    assert measured(lm, clean, behind).above(10.0) == []


# ---- what a kept module does --------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True])
def test_kept_modules_see_their_very_input_and_have_quantized_weights(tiny: Tiny, static: bool) -> None:
    lm = plant(tiny("llama"))
    texts, originals = own_texts(lm), {name: linear.weight.clone() for name, linear in lm.linears().items()}
    config = quantizer(activations=ActivationConfig(range="static" if static else "dynamic"))
    values = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))
    with quantized(lm, config, calibrated(lm, texts) if static else None, keep=frozenset(PLANTED)), torch.no_grad():
        for name, original in originals.items():
            module = lm.model.get_submodule(name)
            assert isinstance(module, QuantizedLinear)
            weight = quantize_weight(original, Grid(8, True), "per_tensor").dequantize()
            assert torch.equal(module.weight, weight) and not torch.equal(weight, original)
            assert (module.activation is None) == (name in PLANTED)
            if module.in_features == 32:
                exact = functional.linear(values, weight)
                assert torch.equal(module(values), exact) == (name in PLANTED)


def test_keeping_nothing_is_the_quantizer_without_qfem_and_keeping_all_quantizes_weights_alone(tiny: Tiny) -> None:
    lm, texts = tiny("llama"), make_texts()

    @torch.no_grad()
    def logits(config: QuantizerConfig, keep: frozenset[str] | None = None) -> Tensor:
        with quantized(lm, config, keep=keep):
            return lm.model(texts).logits

    off, weights_only = QFeMConfig(), ActivationConfig(bits=None)
    assert torch.equal(logits(quantizer(), frozenset()), logits(quantizer(qfem=off)))
    everything = logits(quantizer(), frozenset(lm.linears()))
    assert torch.equal(everything, logits(quantizer(qfem=off, activations=weights_only)))
    assert not torch.equal(everything, logits(quantizer(qfem=off)))


def test_what_is_missing_or_unknown_is_refused(tiny: Tiny) -> None:
    lm = tiny("llama")
    with pytest.raises(CalibrationError, match=r"quantizer=under_test uses QFeM, .* measure their ratios"):
        quantized(lm, quantizer()).__enter__()
    unknown = frozenset({"model.layers.0.mlp.down_proj", "model.layers.9.mlp.down_proj"})
    with pytest.raises(CalibrationError, match=r"model\.layers\.9\.mlp\.down_proj .* tiny_llama has no such linear"):
        quantized(lm, quantizer(), keep=unknown).__enter__()


@pytest.mark.parametrize("how", ["through", "closed", "broken"])
def test_everything_comes_off_bit_for_bit(tiny: Tiny, how: str) -> None:
    lm, texts = tiny("llama"), make_texts()
    config = quantizer(smoothing_alpha=0.5, weights=WeightConfig(bits=4))
    ranges = calibrated(lm, texts)
    modules = [(name, id(module)) for name, module in lm.model.named_modules()]
    weights = [(name, id(weight), weight.clone()) for name, weight in lm.model.named_parameters()]
    hooks = sum(len(module._forward_pre_hooks) for module in lm.model.modules())
    steps = observe_fitted(lm, EMPTY, texts, FittedQuantizer(config, ranges), [RatioObserver()])
    next(steps)
    if how == "through":
        list(steps)
    elif how == "closed":
        steps.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            steps.throw(KeyboardInterrupt)  # type: ignore[attr-defined]
    with quantized(lm, config, ranges, keep=frozenset(["model.layers.1.mlp.down_proj"])):
        pass
    assert [(name, id(module)) for name, module in lm.model.named_modules()] == modules
    assert sum(len(module._forward_pre_hooks) for module in lm.model.modules()) == hooks
    for (name, identity, weight), (now_name, now) in zip(weights, lm.model.named_parameters(), strict=True):
        assert (name, identity) == (now_name, id(now))
        assert torch.equal(weight, now)
