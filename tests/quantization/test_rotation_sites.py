"""RoSTE's choice of sites: the errors recomputed, a site left alone where a rotation hurts, the function as it was."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import UNLIKE
from helpers import random_texts
from torch import Tensor
from untouched import assert_untouched, snapshot

from cushion.config import ActivationConfig, KvCacheConfig, QuantizerConfig, RunConfig, WeightConfig
from cushion.config_warnings import options_without_effect
from cushion.errors import CalibrationError, ConfigError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.hadamard import HadamardTransform, randomized_hadamard
from cushion.quantization.input_statistics import fitted_behind, observe_sites
from cushion.quantization.numerics import Grid, fake_quantize
from cushion.quantization.parts.rotation_sites import LEFT_ALONE
from cushion.quantization.rotation_sites import SiteErrors, better_alone

Tiny = Callable[..., LanguageModel]
TEXTS = random_texts(3, 16)
GRID = Grid(4, True)


def adaptive(**changes: Any) -> QuantizerConfig:
    values: dict[str, Any] = {
        "weights": WeightConfig(4, "per_channel"),
        "activations": ActivationConfig(4, "per_token", "dynamic"),
        "input_rotation": "down",
        "head_rotation": "values",
        "rotation_sites": "adaptive",
    }
    return QuantizerConfig(name="under_test", **{**values, **changes})


def errors_of(lm: LanguageModel, config: QuantizerConfig, behind: Prefix) -> dict[str, tuple[float, float]]:
    *_, (done, errors) = observe_sites(lm, behind, TEXTS, config, None)
    assert done == len(TEXTS)
    return errors.errors


def rounding(values: Tensor, grid: Grid = GRID) -> float:
    """The squared error of rounding with one scale for each vector of the last dimension."""
    parameters = grid.parameters(values.amin(-1, keepdim=True), values.amax(-1, keepdim=True))
    return float((fake_quantize(values, *parameters, grid) - values).square().sum())


def clipped_rounding(values: Tensor, lowest: int) -> float:
    """The same where codes go from `lowest` to 7 and 0.9 of the range is kept."""
    scale = 0.9 * values.abs().amax(-1, keepdim=True) / 7
    return float((scale * (values / scale).round().clamp(lowest, 7) - values).square().sum())


def test_the_error_where_heads_are_mixed(tiny: Tiny) -> None:
    lm, name = tiny("llama"), "model.layers.1.self_attn.o_proj"
    config = adaptive(input_rotation="down_and_heads", head_rotation="none")
    found, seen = errors_of(lm, config, Prefix.empty()), list[Tensor]()
    hook = lm.linears()[name].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    with torch.no_grad():
        for text in TEXTS:
            lm.body(text[None])
    hook.remove()
    matrix, weight = torch.kron(randomized_hadamard(4), torch.eye(8)).float(), lm.linears()[name].weight
    expected = [
        rounding(weight @ by) + sum(rounding(one @ by) for one in seen) / len(TEXTS) for by in (torch.eye(32), matrix)
    ]
    assert found[f"input of {name}"] == pytest.approx(expected, rel=1e-3)


@torch.no_grad()
def test_the_errors_are_those_of_the_grid_that_the_run_has(tiny: Tiny) -> None:
    lm, seen = tiny("llama"), list[Tensor]()
    activations = ActivationConfig(4, "per_token", "dynamic", narrow_range=False, clip_ratio=0.9)
    config = adaptive(weights=WeightConfig(None), activations=activations, head_rotation="none")
    found = errors_of(lm, config, Prefix.empty())
    name, matrix = "model.layers.1.mlp.down_proj", randomized_hadamard(64).float()
    hook = lm.linears()[name].register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    for text in TEXTS:
        lm.body(text[None])
    hook.remove()
    versions = seen, [one @ matrix for one in seen]
    expected, narrow = (
        [sum(clipped_rounding(one, lowest) for one in version) / len(TEXTS) for version in versions]
        for lowest in (-8, -7)
    )
    assert found[f"input of {name}"] == pytest.approx(expected, rel=1e-3)
    assert narrow != pytest.approx(expected, rel=1e-2), "the lowest code is used"


def test_the_errors_recomputed(tiny: Tiny) -> None:
    lm, transform, layer = tiny("llama"), HadamardTransform(), 1
    prefix = Prefix.from_tokens(lm.model, [17, 42])
    config = adaptive(kv_cache=KvCacheConfig(4))
    found, block = errors_of(lm, config, prefix), lm.blocks[1]
    seen: dict[str, list[Tensor]] = {"down": [], "o": []}
    modules = {"down": block.mlp.down_proj, "o": block.self_attn.o_proj}
    hooks = [
        module.register_forward_pre_hook(lambda _m, args, name=name: seen[name].append(args[0]))
        for name, module in modules.items()
    ]
    values = []
    for text in TEXTS:
        cache: Any = prefix.cache(lm.model)
        with torch.no_grad():
            lm.body(text[None], past_key_values=cache, use_cache=True)
        values.append(cache.layers[layer].values[:, :, 2:])
    for hook in hooks:
        hook.remove()

    def mean(tensors: list[Tensor], grid: Grid = GRID) -> float:
        return sum(rounding(tensor, grid) for tensor in tensors) / len(TEXTS)

    down, matrix = block.mlp.down_proj.weight, randomized_hadamard(64).float()
    expected = (
        rounding(down) + mean(seen["down"]),
        rounding(down @ matrix) + mean([transform(x) for x in seen["down"]]),
    )
    assert found["input of model.layers.1.mlp.down_proj"] == pytest.approx(expected, rel=1e-3)

    v, o, matrix = block.self_attn.v_proj.weight, block.self_attn.o_proj.weight, randomized_hadamard(8).float()
    turned = torch.block_diag(*[matrix] * 4)
    cached = mean(values, Grid(4, False)), mean([x @ matrix for x in values], Grid(4, False))
    expected = (
        rounding(v) + rounding(o) + mean(seen["o"]) + cached[0],
        rounding(turned[:16, :16].T @ v) + rounding(o @ turned) + mean([x @ turned for x in seen["o"]]) + cached[1],
    )
    assert found[f"values of layer {layer}"] == pytest.approx(expected, rel=1e-3)
    assert len(found) == 2 * len(lm.blocks)


@torch.no_grad()
def test_cached_values_are_judged_by_the_scales_that_the_run_has(tiny: Tiny) -> None:
    """Static scales of heads, without the positions that are protected; one scale for all heads says otherwise."""
    lm, transform, seen = tiny("llama"), HadamardTransform(), list[Tensor]()
    lm.blocks[1].self_attn.v_proj.weight[:8] *= 30
    bits = {"weights": WeightConfig(None), "activations": ActivationConfig(None), "input_rotation": "none"}
    config = adaptive(**bits, kv_cache=KvCacheConfig(3, "per_head", range="static", protect=2))
    found = errors_of(lm, config, Prefix.empty())["values of layer 1"]
    for text in TEXTS:
        cache: Any = Prefix.empty().cache(lm.model)
        lm.body(text[None], past_key_values=cache, use_cache=True)
        seen.append(cache.layers[1].values[:, :, 2:])
    versions, grid = (seen, [transform(one) for one in seen]), Grid(3, False)
    by_head = [sum(rounding(head.flatten(), grid) for one in of for head in one[0]) / len(TEXTS) for of in versions]
    assert found == pytest.approx(by_head, rel=1e-3)
    together = [sum(rounding(one.flatten(), grid) for one in of) / len(TEXTS) for of in versions]
    assert together != pytest.approx(by_head, rel=0.1)
    whole = replace(config, kv_cache=KvCacheConfig(3, "per_tensor", protect=TEXTS.shape[1], range="static"))
    assert errors_of(lm, whole, Prefix.empty())["values of layer 1"] == (0.0, 0.0), "nothing is rounded"
    with pytest.raises(ConfigError, match=r"rotation_sites=adaptive compares .*layout=kivi has groups .*sites=all"):
        adaptive(kv_cache=KvCacheConfig(4, layout="kivi"))


def test_a_site_is_rotated_only_where_that_lowers_its_error(tiny: Tiny) -> None:
    """Weights that lie on the grid already lose nothing unless they are rotated; those with an outlier column gain."""
    lm = tiny("llama")
    with torch.no_grad():
        for block in lm.blocks[1:]:
            for linear in (block.mlp.down_proj, block.self_attn.v_proj, block.self_attn.o_proj):
                rows = linear.weight.amin(1, keepdim=True), linear.weight.amax(1, keepdim=True)
                linear.weight.copy_(fake_quantize(linear.weight, *GRID.parameters(*rows), GRID))
        for linear in (lm.blocks[0].mlp.down_proj, lm.blocks[0].self_attn.o_proj):
            linear.weight[:, 5] *= 30
    config, before = adaptive(activations=ActivationConfig(None)), snapshot(lm)
    fitted = fitted_behind(lm, Prefix.empty(), config, TEXTS)
    alone = fitted.inputs[LEFT_ALONE]
    assert alone == {
        f"{site} {of}"
        for layer in (1, 2)
        for site, of in (("values of layer", layer), ("input of", f"model.layers.{layer}.mlp.down_proj"))
    }
    with fitted.on(lm):
        for layer, linear in enumerate(block.mlp.down_proj for block in lm.blocks):
            assert bool(linear._forward_pre_hooks) == (layer == 0)
        cache: Any = Prefix.empty().cache(lm.model)
        lm.body(TEXTS[:1], past_key_values=cache, use_cache=True)
    assert_untouched(lm, before)
    errors = errors_of(lm, config, Prefix.empty())
    assert better_alone(errors) == alone
    assert all((rotated < plain) == (site not in alone) for site, (plain, rotated) in errors.items())


@pytest.mark.parametrize("family", UNLIKE)
@pytest.mark.parametrize("prompt", [[], [17, 42]], ids=["plain", "prefix"])
def test_any_choice_leaves_the_function_as_it_was(tiny: Tiny, family: str, prompt: list[int]) -> None:
    lm = tiny(family)
    prefix = Prefix.from_tokens(lm.model, prompt)

    @torch.no_grad()
    def logits() -> tuple[Tensor, Any]:
        cache = prefix.cache(lm.model, len(TEXTS))
        return lm.model(TEXTS, past_key_values=cache, use_cache=True).logits, cache

    untouched, plain = logits()
    down = [name for names in lm.down_projections().values() for name in names]
    config = adaptive(weights=WeightConfig(None), activations=ActivationConfig(None))
    alone = frozenset({"values of layer 1", f"input of {down[0]}"})
    with FittedQuantizer(config, inputs={LEFT_ALONE: alone}).on(lm):
        found, cache = logits()
        turned = [bool(lm.model.get_submodule(name)._forward_pre_hooks) for name in down]
    torch.testing.assert_close(found, untouched, rtol=0, atol=1e-4)
    assert turned == [False] + [True] * (len(down) - 1)
    same = [
        torch.allclose(own.values, its.values, rtol=0, atol=1e-3)
        for own, its in zip(cache.layers, plain.layers, strict=True)
    ]
    assert same == [False, True, False]
    assert fitted_behind(lm, prefix, config, TEXTS).inputs[LEFT_ALONE] == {
        *(f"values of layer {layer}" for layer in range(3)),
        *(f"input of {name}" for name in down),
    }, "where nothing is rounded no rotation helps"


def test_what_is_written_is_what_decides(tiny: Tiny, tmp_path: Path) -> None:
    lm = tiny("llama")
    *_, (_, errors) = observe_sites(lm, Prefix.empty(), TEXTS, adaptive(), None)
    errors.write(tmp_path)
    assert SiteErrors.read(tmp_path, torch.device("cpu")) == better_alone(errors.errors)
    with torch.no_grad():
        lm.blocks[0].mlp.down_proj.weight[0, 0] = float("inf")
    with pytest.raises(CalibrationError, match="not finite"):
        errors_of(lm, adaptive(), Prefix.empty())


def test_codes_are_multiplied_behind_every_rotation(tiny: Tiny) -> None:
    lm = tiny("llama")
    prefix = Prefix.from_tokens(lm.model, [17, 42])
    bits = {"weights": WeightConfig(8, "per_channel"), "activations": ActivationConfig(8)}
    fitted, found = fitted_behind(lm, prefix, adaptive(rotation="hadamard", **bits), TEXTS), []
    assert len(fitted.inputs[LEFT_ALONE]) < 6, "some site is rotated"
    for execution in ("simulated", "int8"):
        with fitted.on(lm, execution=execution), torch.no_grad():
            found.append(lm.model(TEXTS, past_key_values=prefix.cache(lm.model, len(TEXTS))).logits)
    with torch.no_grad():
        plain = lm.model(TEXTS, past_key_values=prefix.cache(lm.model, len(TEXTS))).logits
    assert (found[0] - found[1]).square().mean() < (found[0] - plain).square().mean() / 4


def test_it_composes_with_static_ranges_and_smoothing_and_needs_its_errors(tiny: Tiny) -> None:
    lm = tiny("llama")
    config = adaptive(activations=ActivationConfig(8, estimator="mse"), smoothing_alpha=0.5, rotation="hadamard")
    fitted = fitted_behind(lm, Prefix.empty(), config, TEXTS)
    assert fitted.inputs.keys() == config.gathered and LEFT_ALONE in config.gathered
    with fitted.on(lm), torch.no_grad():
        assert lm.model(TEXTS).logits.isfinite().all()
    with pytest.raises(CalibrationError, match="SiteErrors"), FittedQuantizer(adaptive()).on(lm):
        pytest.fail("the body must not run")
    with pytest.raises(ConfigError, match=r"quantizer\.rotation_sites='adaptiv' is not allowed.*mean 'adaptive'"):
        adaptive(rotation_sites="adaptiv")
    nothing = replace(adaptive(), input_rotation="none", head_rotation="none")
    (warning,) = options_without_effect(RunConfig(quantizer=nothing))
    assert warning.startswith("quantizer.rotation_sites='adaptive' has no effect with quantizer.input_rotation=none")
    assert not nothing.gathered
