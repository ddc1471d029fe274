"""Activation sparsity of planted feed-forward parts, and against a recomputation neuron by neuron."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from helpers import random_texts
from tiny_run import small_config
from torch import Tensor, nn
from torch.nn import functional

from cushion import pipeline
from cushion.config import SearchConfig
from cushion.evaluation import sparsity as module
from cushion.evaluation.sparsity import activation_ratios, feed_forward, truncated, within_perplexity
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.reporting.figures import FIGURES, figures_of

Tiny = Callable[..., LanguageModel]
NEURONS, PROMPT = 64, [256, 10, 65]


class Planted(nn.Module):
    """A feed-forward part whose first neurons give outputs of known length at right angles, and the rest nothing."""

    def __init__(self, lengths: list[float]) -> None:
        super().__init__()
        self.down_proj = nn.Linear(NEURONS, 32, bias=False)
        self.h = torch.zeros(NEURONS)
        with torch.no_grad():
            self.down_proj.weight.fill_(0.0)
            for i, length in enumerate(lengths):  # written by large columns and small values, or the other way round
                self.down_proj.weight[i, i] = column = (-7.0) ** (i % 3 - 1)
                self.h[i] = length / column
            self.down_proj.weight[:, -1] = 5.0  # a large column that no token uses

    def forward(self, hidden: Tensor) -> Tensor:
        return cast(Tensor, self.down_proj(self.h.expand(*hidden.shape[:-1], NEURONS)))


def test_the_tail_of_a_planted_output_is_cut_where_its_error_says(tiny: Tiny) -> None:
    """Lengths 8, 4, 2, 1: the whole is sqrt(85), without 1 the error is 1/sqrt(85), without 2 and 1 sqrt(5/85), ..."""
    lm = tiny()
    lm.blocks[1].mlp = Planted([4.0, 1.0, 8.0, 2.0])
    wanted = {0.0: 4, 0.108: 4, 0.109: 3, 0.24: 3, 0.25: 2, 0.49: 2, 0.5: 1, 0.99: 1}
    for level in activation_ratios(lm, Prefix.empty(), random_texts(2, 9), list(wanted)):
        assert level.ratios[1] == wanted[level.cett] / NEURONS, level.cett
        assert level.thresholds[1] == pytest.approx([0.0, 4.0, 2.0, 1.0, 0.0][wanted[level.cett]])


def test_a_part_that_gives_nothing_has_no_active_neuron(tiny: Tiny) -> None:
    lm = tiny()
    lm.blocks[0].mlp = Planted([])
    (level,) = activation_ratios(lm, Prefix.empty(), random_texts(1, 9), [0.2])
    assert (level.ratios[0], level.thresholds[0]) == (0.0, 0.0)
    assert 0 < level.ratios[1] < 1


@torch.no_grad()
def neurons_of(lm: LanguageModel, prompt: list[int], texts: Tensor) -> list[list[tuple[Tensor, Tensor]]]:
    """By block, h of the texts' own tokens and W_down of every part, in float64, from plain sequences."""
    parts: dict[str, list[Tensor]] = {}
    linears = {name: lm.model.get_submodule(name) for names in feed_forward(lm).values() for name in names}
    hooks = [
        linear.register_forward_pre_hook(lambda _, args, name=name: parts.setdefault(name, []).append(args[0]))
        for name, linear in linears.items()
    ]
    for text in texts.tolist():
        lm.model(input_ids=torch.tensor([prompt + text]), use_cache=False)
    for hook in hooks:
        hook.remove()
    behind = len(prompt)
    found = []
    for names in feed_forward(lm).values():
        h = {n: torch.cat([p.flatten(0, -2)[behind:] for p in parts[n]]).double() for n in names if n in parts}
        found.append([(values, cast(Any, linears[n]).weight.double()) for n, values in h.items()])
    return found


def mean_error(parts: list[tuple[Tensor, Tensor]], eps: float) -> float:
    errors = []
    for values, weight in parts:
        outputs = values[:, :, None] * weight.T  # n_i of every token: (tokens, neurons, features)
        inactive = outputs.norm(dim=-1, keepdim=True) <= eps * (1 + 1e-6)
        lost, whole = (outputs * inactive).sum(1).norm(dim=-1), outputs.sum(1).norm(dim=-1)
        errors.append(torch.where(lost == 0, 0, lost / whole))
    return float(torch.cat(errors).mean())


@pytest.mark.parametrize(
    ("family", "prompt"), [("llama", PROMPT), ("opt", []), ("qwen2_moe", [])], ids=["gated", "relu", "experts"]
)
def test_ratios_are_those_of_the_neurons_one_by_one(tiny: Tiny, family: str, prompt: list[int]) -> None:
    lm, texts, targets = tiny(family), random_texts(2, 12), [0.0, 0.05, 0.2, 0.6]
    prefix = Prefix.from_tokens(lm.model, prompt)
    levels = activation_ratios(lm, prefix, texts, targets)
    for block, parts in enumerate(neurons_of(tiny(family), prompt, texts)):
        norms = torch.cat([(values.abs() * weight.norm(dim=0)).flatten() for values, weight in parts])
        for level in levels:
            eps = level.thresholds[block]
            assert level.ratios[block] == pytest.approx(float((norms > eps * (1 + 1e-6)).double().mean()), abs=1e-9)
            assert mean_error(parts, eps) <= level.cett + 1e-6
            further = norms[norms > eps * (1 + 1e-6)].sort().values
            beyond = float(further[2 * math.ceil(len(norms) / module.CANDIDATES)])
            assert mean_error(parts, beyond) > level.cett, "one candidate further, the error is larger"
        ratios = [level.ratios[block] for level in levels]
        assert ratios == sorted(ratios, reverse=True)
        assert ratios[0] == pytest.approx(float((norms > 0).double().mean()))
        assert (ratios[0] < 0.7) == (family == "opt"), "ReLU alone has zeros"


def loss_without(lm: LanguageModel, texts: Tensor, thresholds: list[float] | None) -> float:
    """The mean loss of the plain model, its feed-forward parts without the neurons that are inactive."""
    hooks = []
    for index, block in enumerate(lm.blocks):
        if thresholds is not None:
            linear, eps = cast(Any, block).mlp.down_proj, thresholds[index]
            hooks.append(
                linear.register_forward_pre_hook(
                    lambda linear, args, eps=eps: (args[0] * (args[0].abs() * linear.weight.norm(dim=0) > eps),)
                )
            )
    with torch.no_grad():
        logits = lm.model(input_ids=texts, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), texts[:, 1:].flatten()).item()


def test_the_perplexity_is_as_near_to_the_bound_as_halving_comes(tiny: Tiny) -> None:
    lm, texts, percent = tiny("phi3"), random_texts(3, 40), 0.1
    *_, (level, ratio) = within_perplexity(lm, Prefix.empty(), texts, percent)
    assert 0 < level.cett < 0.5, "the bound is reached on the way"
    assert level == activation_ratios(lm, Prefix.empty(), texts, [level.cett])[0]
    plain, dense = tiny("phi3"), loss_without(tiny("phi3"), texts, None)
    assert ratio == pytest.approx(math.exp(loss_without(plain, texts, level.thresholds) - dense), abs=1e-6)
    assert 1 < ratio <= 1 + percent / 100
    (beyond,) = activation_ratios(lm, Prefix.empty(), texts, [level.cett + 2**-module.BISECTIONS])
    assert math.exp(loss_without(plain, texts, beyond.thresholds) - dense) > 1 + percent / 100


def test_truncation_ends_with_its_block(tiny: Tiny) -> None:
    lm, texts = tiny(), random_texts(1, 9)
    with torch.no_grad():
        before = lm.model(input_ids=texts).logits
        with truncated(lm, [math.inf] * 3):
            assert not torch.equal(lm.model(input_ids=texts).logits, before)
        assert torch.equal(lm.model(input_ids=texts).logits, before)


def test_a_run_keeps_and_draws_sparsity_and_spikes_of_every_stage(text_file: Path, tmp_path: Path) -> None:
    config = small_config(text_file, tmp_path)
    config.eval.sparsity_texts, config.eval.sparsity_ppl, config.eval.spike_texts = 5, 50.0, 1
    config.eval.spike_ratio = 1.0
    config.search = SearchConfig(name="tokens", method="tokens", token_ids=PROMPT)
    result = pipeline.run(config)
    sparsity, spikes = result.activations["sparsity"], result.activations["spikes"]
    assert (sparsity["texts"], sparsity["text_length"], spikes["texts"]) == (2, 32, 1), "no more than there are texts"
    assert list(sparsity["stages"]) == list(spikes["stages"]) == ["none", "found"]
    before, after = sparsity["stages"].values()
    assert before != after
    assert [level["cett"] for level in before["levels"]] == [0.1, 0.2, 0.3]
    assert before["perplexity_ratio"] <= 1.5
    folder = pipeline.run_folder(config)
    record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    for name in ("activation_ratios", "spike_cosines"):
        path = figures_of(record, folder)[name].with_suffix(".svg")
        FIGURES[name](record, path)
        assert path.stat().st_size > 1000
