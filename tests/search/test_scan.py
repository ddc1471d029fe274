"""The pass over the search texts: what it reads, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cushion.activations import TokenScales, observe_inputs
from cushion.errors import NotFiniteError, UnsupportedModelError
from cushion.models import LanguageModel
from cushion.search.scan import Scanned, ratios, scan_texts, token_scales

Tiny = Callable[..., LanguageModel]
TEXTS = torch.arange(30).reshape(3, 10)


@torch.no_grad()
def test_only_the_linears_named_are_read_and_every_text_is_reported(tiny: Tiny) -> None:
    lm, scales = tiny(), dict[str, Tensor]()
    wanted = [name for name in lm.linears() if name.endswith("down_proj")]
    events = list(scan_texts(lm, wanted, TEXTS, scales))
    assert events == [Scanned(done, 3, "text") for done in (1, 2, 3)]
    assert list(scales) == wanted
    expected = TokenScales(texts=3)
    with observe_inputs(lm.linears(), expected):
        lm.body(TEXTS)
    for name in wanted:
        torch.testing.assert_close(scales[name], expected.scales(name))
    means = expected.ratios()
    assert ratios(scales) == pytest.approx({name: means[name] for name in wanted}, rel=1e-4)


@torch.no_grad()
def test_what_experts_read_is_put_back_in_the_places_of_its_tokens(tiny: Tiny) -> None:
    lm = tiny("mixtral")
    linears = list(lm.linears())
    together, apart = token_scales(lm, linears, TEXTS), dict[str, Tensor]()
    list(scan_texts(lm, linears, TEXTS, apart))
    read: dict[str, Tensor] = {}
    shared: dict[str, Tensor] = {}
    experts = {f"model.layers.{index}": block.mlp.experts for index, block in enumerate(lm.blocks)}  # type: ignore
    with observe_inputs(lm.linears(), read.__setitem__), observe_inputs(experts, shared.__setitem__):
        lm.body(TEXTS)
    routed = torch.zeros(3, *TEXTS.shape)
    for name, values in together.items():
        torch.testing.assert_close(values, apart[name], equal_nan=True)
        if not name.endswith("gate_proj"):
            assert values.isnan().any() == (".experts." in name)
            continue
        block = name.partition(".mlp")[0]
        rows = read[name].tolist() if name in read else []
        expected = [max(map(abs, row)) if row in rows else None for row in shared[block].tolist()]
        found = [None if math.isnan(value) else value for value in values.flatten().tolist()]
        assert found == pytest.approx(expected)
        routed[int(block.rpartition(".")[2])] += ~values.isnan()
    assert (routed == 2).all(), "every token is read by two experts of each block"
    assert not any(module._forward_pre_hooks for module in lm.model.modules())


def test_the_ratio_of_an_expert_is_over_the_tokens_that_it_reads() -> None:
    nan = math.nan
    scales = torch.tensor([[nan, 6.0, nan, 2.0, 3.0], [nan, nan, nan, nan, nan], [8.0, nan, 2.0, nan, nan]])
    assert ratios({"expert": scales, "idle": scales[1:2]}) == {"expert": (6 / 3 + 8 / 2) / 2, "idle": 1.0}


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused_with_the_linear(tiny: Tiny, fault: float) -> None:
    lm = tiny()
    with torch.no_grad():
        lm.model.get_submodule("model.layers.1.mlp.up_proj").weight[3, 5] = fault  # type: ignore[index]
    with pytest.raises(NotFiniteError, match=r"input of model\.layers\.1\.mlp\.down_proj .*model\.dtype=float32"):
        list(scan_texts(lm, list(lm.linears()), TEXTS, {}))


class _Routed(nn.Linear):
    """A linear that is given some of the tokens only, as an expert is."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return super().forward(values)


class _Router(nn.Module):
    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.expert = _Routed(inner.in_features, inner.out_features, bias=False)
        self.expert.weight = inner.weight

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        result = values.new_zeros(*values.shape[:-1], self.expert.out_features)
        result[:, ::2] = self.expert(values[:, ::2])
        return result


def test_a_linear_that_reads_some_tokens_only_is_refused_by_name(tiny: Tiny) -> None:
    lm = tiny()
    mlp = lm.model.get_submodule("model.layers.2.mlp")
    mlp.down_proj = _Router(mlp.down_proj)  # type: ignore[arg-type]
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.mlp\.down_proj\.expert .*does not read every token"):
        list(scan_texts(lm, list(lm.linears()), TEXTS, {}))
