"""Static ranges searched by the block's output: the best factor, found again another way, and what it goes with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from helpers import random_texts
from torch import Tensor, nn

from cushion.activations import observe_outputs
from cushion.config import (
    ActivationConfig,
    KvCacheConfig,
    ModelConfig,
    PathsConfig,
    QuantizerConfig,
    ReconstructionConfig,
    WeightConfig,
)
from cushion.errors import CalibrationError, ConfigError
from cushion.models import LanguageModel, load_language_model
from cushion.prefix import Prefix
from cushion.quantization import block_output
from cushion.quantization.block_output import COARSE, FINE
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.fitting import fit_blocks
from cushion.quantization.input_statistics import fitted_behind
from cushion.quantization.learned import Learned
from cushion.quantization.linear import QuantizedLinear

Tiny = Callable[..., LanguageModel]
TEXTS = random_texts(3, 16, seed=5)
START = [256, 10]
SEARCHED = ActivationConfig(4, estimator="block_output", estimator_options={"texts": 2})
W4A4 = QuantizerConfig(weights=WeightConfig(4, "per_channel"), activations=SEARCHED)
PREFIXQUANT = replace(
    W4A4,
    kv_cache=KvCacheConfig(4, "per_head", symmetric=True, range="static"),
    rotation="hadamard",
    head_rotation="all",
    input_rotation="down",
)
FIRST = "model.layers.0."


def searched(lm: LanguageModel, config: QuantizerConfig, keep: frozenset[str] = frozenset()) -> FittedQuantizer:
    prefix = Prefix.from_tokens(lm.model, START)
    with torch.no_grad():
        fitted = replace(fitted_behind(lm, prefix, config, TEXTS, keep), fits={"block_output": {}})
        list(fit_blocks(lm, prefix, fitted, TEXTS))
    return fitted


@pytest.fixture(scope="module")
def found() -> FittedQuantizer:
    """What is found for W4A4 on the tiny LLaMA, which is the same wherever it is made."""
    return searched(load_language_model(ModelConfig(path="tiny:llama"), PathsConfig()), W4A4)


@torch.no_grad()
def outputs(lm: LanguageModel, prefix: Prefix, block: int, texts: Tensor) -> Tensor:
    """The outputs of a block behind the prefix, (texts, tokens, features)."""
    found = list[Tensor]()
    for text in texts:
        with observe_outputs({"": lm.blocks[block]}, lambda _, output: found.append(output[0])):
            lm.body(text[None], past_key_values=prefix.cache(lm.model), use_cache=True)
    return torch.stack(found)


class Rounded(nn.Module):
    """A linear that reads codes of 4 bits, -7 to 7, times a scale; no code of Cushion."""

    def __init__(self, linear: nn.Module, scale: float) -> None:
        super().__init__()
        self.linear, self.scale = linear, scale

    def forward(self, values: Tensor) -> Tensor:
        rounded: Tensor = self.linear((values / self.scale).round().clamp(-7, 7) * self.scale)
        return rounded


@pytest.mark.parametrize("names", [("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.down_proj",)])
def test_the_factor_is_the_best_by_the_output_of_the_first_block(
    tiny: Tiny, found: FittedQuantizer, names: tuple[str, ...]
) -> None:
    """One input rounded, all else in full precision: the inputs of the first block depend on nothing before it."""
    lm = tiny()
    prefix = Prefix.from_tokens(lm.model, START)
    assert found.ranges is not None
    low, high = (ends[FIRST + names[0]] for ends in (found.ranges.minimum, found.ranges.maximum))
    largest = max(float(high.max()), -float(low.min()))
    target = outputs(lm, prefix, 0, TEXTS[:2])
    linears = {name: lm.model.get_submodule(FIRST + name) for name in names}

    def error(factor: float) -> float:
        for name, linear in linears.items():
            lm.model.set_submodule(FIRST + name, Rounded(linear, largest * factor / 7))
        difference = outputs(lm, prefix, 0, TEXTS[:2]) - target
        for name, linear in linears.items():
            lm.model.set_submodule(FIRST + name, linear)
        return float(difference.double().square().mean())

    errors = {factor: error(factor) for factor in COARSE}
    best = min(errors, key=lambda factor: errors[factor])
    errors |= {factor: error(factor) for factor in (round(best + step, 2) for step in FINE) if factor <= 1}
    best = min(errors, key=lambda factor: errors[factor])
    for name in names:
        factor, before, after = found.fits["block_output"][FIRST + name].tolist()
        assert factor == pytest.approx(best)
        assert before == pytest.approx(errors[1.0], rel=1e-4)
        assert after == pytest.approx(errors[best], rel=1e-4)
    assert best < 1


def test_the_range_on_the_model_is_min_max_times_the_factor(tiny: Tiny, found: FittedQuantizer) -> None:
    lm = tiny()
    plain = replace(found, config=replace(W4A4, activations=ActivationConfig(4)), fits={})
    own, other = dict[str, Tensor](), dict[str, Tensor]()
    for scales, quantizer in ((own, found), (other, plain)):
        with quantizer.on(lm):
            for name, module in lm.model.named_modules():
                if isinstance(module, QuantizedLinear):
                    assert module.activation is not None and module.activation.parameters is not None
                    scales[name] = module.activation.parameters[0]
    assert own.keys() == lm.linears().keys()
    for name, scale in own.items():
        torch.testing.assert_close(scale, other[name] * found.fits["block_output"][name][0])
    name = FIRST + "mlp.down_proj"
    learned = Learned({name: (torch.tensor(-7.0), torch.tensor(7.0))})
    with replace(found, learned=learned).on(lm):
        assert lm.model.get_submodule(name).activation.parameters[0] == 1.0  # type: ignore[union-attr]


def test_it_goes_with_all_rotations_static_caches_and_a_kept_input_and_makes_the_output_better(tiny: Tiny) -> None:
    lm, kept = tiny(), FIRST + "mlp.down_proj"
    prefix, last = Prefix.from_tokens(lm.model, START), len(lm.blocks) - 1
    fitted = searched(lm, PREFIXQUANT, frozenset({kept}))
    assert fitted.fits["block_output"].keys() == lm.linears().keys() - {kept}
    with fitted.surroundings(lm):
        target = outputs(lm, prefix, last, TEXTS)
    plain = replace(fitted, config=replace(PREFIXQUANT, activations=ActivationConfig(4)), fits={})
    errors = []
    for quantizer in (fitted, plain):
        with quantizer.on(lm):
            assert lm.model.get_submodule(kept).activation is None
            errors.append(float((outputs(lm, prefix, last, TEXTS) - target).square().mean()))
    assert errors[0] < errors[1]


def test_the_passes_are_bounded_whatever_the_number_of_experts(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four searches for a block, as without experts: the norms before attention and experts, o_proj, and all w2."""
    lm, calls = tiny("mixtral"), list[int]()
    monkeypatch.setattr(block_output, "_error", lambda turn, *_: calls.append(turn.index) or 1.0)
    fitted = searched(lm, W4A4)
    passes = len(COARSE) + 4  # those of FINE above 1 are not tried, and 0.95 was
    assert calls == [index for index in range(len(lm.blocks)) for _ in range(4 * passes)]
    assert fitted.fits["block_output"].keys() == lm.linears().keys()
    assert all(torch.equal(fit, torch.ones(3)) for fit in fitted.fits["block_output"].values())


def test_what_cannot_work_is_refused(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"estimator_options.texts=0 .*a whole number, 1 and more"):
        replace(SEARCHED, estimator_options={"texts": 0})
    with pytest.raises(ConfigError, match=r"estimator='block_output' is not allowed: with .*format=nvfp4"):
        ActivationConfig(4, "per_block", estimator="block_output", format="nvfp4")
    message = r"quantizer.activations.estimator=block_output, which was not fitted: fit it block by block"
    lm = tiny()
    fitted = fitted_behind(lm, Prefix.empty(), W4A4, TEXTS)
    with pytest.raises(CalibrationError, match=message), fitted.on(lm):
        pass
    monkeypatch.setattr(block_output, "_error", lambda *_: float("nan"))
    with pytest.raises(CalibrationError, match=r"block 0 is not finite when the input of model.layers.0.self_attn.q"):
        searched(lm, W4A4)


def test_weights_may_learn_behind_it_but_not_behind_gptq() -> None:
    config = ReconstructionConfig("weights", "blockwise", weights=True)
    config.check(PREFIXQUANT)
    with_gptq = replace(W4A4, weights=replace(W4A4.weights, method="gptq"))
    with pytest.raises(ConfigError, match=r"reconstruction.weights=true cannot be used with quantizer.weights.method"):
        config.check(with_gptq)
