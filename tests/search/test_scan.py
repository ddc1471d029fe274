"""The pass over the search texts: what it reads, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from cushion.activations import TokenScales, observe_inputs
from cushion.errors import NotFiniteError, UnsupportedModelError
from cushion.models import LanguageModel
from cushion.search.scan import Scanned, scan_texts

Tiny = Callable[..., LanguageModel]
TEXTS = torch.arange(30).reshape(3, 10)


@torch.no_grad()
def test_only_the_linears_named_are_read_and_every_text_is_reported(tiny: Tiny) -> None:
    lm, scales = tiny(), TokenScales()
    wanted = [name for name in lm.linears() if name.endswith("down_proj")]
    events = list(scan_texts(lm, wanted, TEXTS, scales))
    assert events == [Scanned(done, 3, "text") for done in (1, 2, 3)]
    assert scales.names == wanted
    expected = TokenScales(texts=3)
    with observe_inputs(lm.linears(), expected):
        lm.body(TEXTS)
    for name in wanted:
        torch.testing.assert_close(scales.scales(name), expected.scales(name))


@pytest.mark.parametrize("fault", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_are_refused_with_the_linear(tiny: Tiny, fault: float) -> None:
    lm = tiny()
    with torch.no_grad():
        lm.model.get_submodule("model.layers.1.mlp.up_proj").weight[3, 5] = fault  # type: ignore[index]
    with pytest.raises(NotFiniteError, match=r"input of model\.layers\.1\.mlp\.down_proj .*model\.dtype=float32"):
        list(scan_texts(lm, lm.linears(), TEXTS, TokenScales()))


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
        list(scan_texts(lm, lm.linears(), TEXTS, TokenScales()))
