"""Timing what `torch.compile` makes of a decoder: in its context alone, with the same numbers, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import pytest
import torch
from helpers import random_texts
from torch import Tensor, nn

from cushion.config import ActivationConfig, QuantizerConfig
from cushion.config.latency import LatencyConfig
from cushion.errors import ConfigError
from cushion.evaluation import latency
from cushion.evaluation.compiling import compiled
from cushion.evaluation.latency import Timing, Variant, check_latency, rounds
from cushion.execution.int8 import Int8Linear
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.linear import ActivationQuantizer
from cushion.quantization.numerics import Grid, quantize_weight

Tiny = Callable[..., LanguageModel]
DYNAMIC = QuantizerConfig("dynamic", activations=ActivationConfig(range="dynamic"))


class _Pair(nn.Module):
    """Two linears that read the very same input."""

    def __init__(self, activation: ActivationQuantizer) -> None:
        super().__init__()
        grid, generator = Grid(8, True), torch.Generator().manual_seed(0)
        self.first, self.second = (
            Int8Linear(quantize_weight(torch.randn(8, 16, generator=generator), grid, "per_channel"), None, activation)
            for _ in range(2)
        )

    def forward(self, values: Tensor) -> Tensor:
        return self.first(values) - self.second(values)


@pytest.mark.parametrize("static", [False, True])
def test_linears_on_codes_are_one_graph_and_compute_what_they_did(static: bool) -> None:
    values = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    activation = ActivationQuantizer(Grid(8, True), "per_tensor", (values.min(), values.max()) if static else None)
    activation.readers = 2
    pair, graphs = _Pair(activation), list[Any]()

    def kept(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        plain = pair(values)
        assert torch.equal(torch.compile(pair, backend=kept, fullgraph=True)(values), plain)
    (graph,) = graphs
    assert sum("_int_mm" in str(node.target) for node in graph.graph.nodes) == 2


def test_the_decoder_is_compiled_within_the_context_alone(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, texts, seen = tiny("llama"), random_texts(1, 5), list[nn.Module]()

    def fake(module: nn.Module) -> None:
        seen.append(module)
        module._compiled_call_impl = lambda *_, **__: "compiled"

    monkeypatch.setattr(nn.Module, "compile", fake)
    with compiled(lm):
        assert lm.body(texts) == "compiled"
    assert seen == [lm.model.base_model]
    assert lm.body(texts).last_hidden_state.shape[:2] == (1, 5)


def test_every_variant_is_compiled_where_it_is_asked_for(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, log = tiny("llama"), list[str]()

    @contextmanager
    def on(name: str) -> Iterator[None]:
        log.append(name)
        yield

    monkeypatch.setattr(latency, "timed", lambda *_: Timing(1.0, 1.0))
    monkeypatch.setattr(latency, "compiled", lambda _: on("compiled"))
    variants = [Variant(Prefix.empty(), lambda name=name: on(name)) for name in "AB"]
    for compiles in (False, True):
        list(rounds(lm, variants, random_texts(1, 4), LatencyConfig([1], repeats=3, warmup=1, compile=compiles)))
    assert log == ["A", "B", "B", "A"] * 2 + [part for name in "ABBA" * 2 for part in (name, "compiled")]


def test_without_a_compiler_it_is_refused_before_anything_runs(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", absent)
    lm = tiny("llama")
    check_latency(lm, LatencyConfig([1]), DYNAMIC, 0)
    check_latency(lm, LatencyConfig(compile=True), DYNAMIC, 0)  # nothing is timed
    with pytest.raises(ConfigError, match=r"eval\.latency\.compile=true .* on cpu it fails: no compiler; install"):
        check_latency(lm, LatencyConfig([1], compile=True), DYNAMIC, 0)
