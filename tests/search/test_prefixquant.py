"""PrefixQuant's rule: counts, length and order against plain loops, and planted spikes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import EXPERTS, UNLIKE, VARIANTS
from helpers import random_texts
from planted import MODULE, plant_spikes
from torch import Tensor

from cushion.activations import observe_inputs
from cushion.config import SearchConfig
from cushion.errors import UnsupportedModelError
from cushion.models import LanguageModel
from cushion.search.prefixquant import PrefixQuantRecord, down_projections, outlier_tokens, prefixquant_rule
from cushion.search.scan import Scanned

Tiny = Callable[..., LanguageModel]
CONFIG = SearchConfig(name="prefixquant", method="prefixquant")
FIRST, SECOND, THIRD = 251, 252, 253


def draw(texts: int = 4, tokens: int = 24, seed: int = 1, below: int = 250) -> Tensor:
    return random_texts(texts, tokens, seed, below)


def rule(lm: LanguageModel, texts: Tensor, config: SearchConfig = CONFIG) -> PrefixQuantRecord:
    record = list(prefixquant_rule(lm, config, texts))[-1]
    assert isinstance(record, PrefixQuantRecord)
    return record


@pytest.mark.parametrize("family", [family for family in UNLIKE if family != "mixtral"])
@pytest.mark.parametrize("eta", [1.05, 1.2])
@torch.no_grad()
def test_the_rule_agrees_with_plain_loops(tiny: Tiny, family: str, eta: float) -> None:
    lm, texts = tiny(family), draw(below=12)
    record = rule(lm, texts, replace(CONFIG, eta=eta))
    last = "fc2" if family == "opt" else "dense_4h_to_h" if family in ("bloom", "gpt_neox", "falcon") else "down_proj"
    counts: dict[str, int] = {}
    frequency: Counter[int] = Counter()
    for text in texts:
        seen: dict[str, Tensor] = {}
        with observe_inputs(lm.linears([last]), seen.__setitem__):
            lm.model(text[None])
        for name, values in seen.items():
            scales = [max(abs(value) for value in token) for token in values.reshape(len(text), -1).tolist()]
            median = sorted(scales)[(len(scales) - 1) // 2]
            for position, scale in enumerate(scales):
                if scale > eta * median:
                    counts[name] = counts.get(name, 0) + 1
                    frequency.update([int(text[position])] * (position > 0))
    means = {name: counts.get(name, 0) / len(texts) for name in record.mean_counts}
    assert len(means) == 3 and record.mean_counts == means
    assert record.length == math.ceil(max(means.values())) > 0
    assert record.mean_counts[record.module] == max(means.values())
    ranked = sorted((token for token in frequency if frequency[token]), key=lambda token: (-frequency[token], token))
    assert record.token_ids == [*ranked[: min(record.length, 8) - 1], lm.bos_token_id]
    assert [(found.token_id, found.count) for found in record.tokens] == [(t, frequency[t]) for t in ranked[:10]]
    assert record.token_forwards == texts.numel()


def test_planted_spikes_are_found_the_most_frequent_first_and_bos_last(tiny: Tiny) -> None:
    lm, texts = tiny(), draw()
    plant_spikes(lm.model, {FIRST: 3.0, SECOND: 6.0, THIRD: 9.0})
    texts[:, 0] = THIRD  # the initial token counts towards the length, not towards the frequencies
    texts[:, 5], texts[:2, 11], texts[:3, 8] = FIRST, FIRST, SECOND
    record = rule(lm, texts)
    assert record.module == MODULE
    assert record.mean_counts[MODULE] == (4 + 4 + 2 + 3) / 4 and record.length == 4
    assert record.initial_share == 1.0
    assert [(found.token_id, found.count) for found in record.tokens] == [(FIRST, 6), (SECOND, 3)]
    assert record.token_ids == [FIRST, SECOND, lm.bos_token_id], "three of the four: there is no third token"
    assert rule(lm, texts, replace(CONFIG, max_length=2)).token_ids == [FIRST, lm.bos_token_id]
    assert rule(lm, texts, replace(CONFIG, max_length=1)).token_ids == [lm.bos_token_id]
    assert rule(lm, texts, replace(CONFIG, max_length=2)).length == 4


@pytest.mark.parametrize(("texts", "kept"), [(11, False), (10, True)])
def test_the_only_candidate_is_left_out_where_less_than_a_tenth_of_the_texts_has_it(
    tiny: Tiny, texts: int, kept: bool
) -> None:
    lm, drawn = tiny(), draw(texts)
    plant_spikes(lm.model, {FIRST: 3.0, SECOND: 6.0, THIRD: 9.0})
    drawn[:, 0], drawn[0, 5] = THIRD, FIRST
    record = rule(lm, drawn)
    assert record.length == 2 and [found.token_id for found in record.tokens] == [FIRST]
    assert record.token_ids == ([FIRST, lm.bos_token_id] if kept else [lm.bos_token_id])
    drawn[1, 7] = SECOND
    assert rule(lm, drawn).token_ids == [FIRST, lm.bos_token_id], "it is not the only one any more"


def test_where_initial_tokens_are_the_only_outliers_the_prefix_is_bos_alone(tiny: Tiny) -> None:
    lm, texts = tiny(), draw()
    plant_spikes(lm.model, {FIRST: 5.0})
    texts[:, 0] = FIRST
    record = rule(lm, texts)
    assert (record.length, record.token_ids, record.tokens) == (1, [lm.bos_token_id], [])


def test_without_outlier_tokens_there_is_no_prefix(tiny: Tiny) -> None:
    record = rule(tiny(), draw())
    assert (record.length, record.token_ids, record.tokens) == (0, [], [])
    assert set(record.mean_counts.values()) == {0.0}


def test_progress_is_reported_by_text(tiny: Tiny) -> None:
    events = list(prefixquant_rule(tiny(), CONFIG, draw()))
    assert events[:-1] == [Scanned(done, 4, "text") for done in (1, 2, 3, 4)]


def test_an_outlier_lies_above_eta_times_the_median_not_at_it() -> None:
    scales = torch.tensor([[1.0, 64.0, 64.1, 1.0, 0.5], [2.0, 100.0, 129.0, 2.0, 1.0]])
    assert outlier_tokens(scales, 64).tolist() == [[False, False, True, False, False]] * 2


def test_a_model_without_bos_uses_its_eos(tiny: Tiny) -> None:
    lm, texts = tiny("opt"), draw()
    lm.tokenizer.bos_token = None
    assert rule(lm, texts, replace(CONFIG, eta=1.2)).token_ids[-1] == 257


@torch.no_grad()
def test_a_tokens_scale_among_experts_is_the_largest_of_its_own(tiny: Tiny) -> None:
    lm, texts = tiny("mixtral"), draw(below=12)
    record = rule(lm, texts, replace(CONFIG, eta=1.1))
    expected: dict[str, int] = {}
    for text in texts:
        hidden: dict[str, Tensor] = {}
        with observe_inputs(dict(enumerate_experts(lm)), hidden.__setitem__):
            lm.model(text[None])
        for layer, values in hidden.items():
            block = lm.model.get_submodule(layer)
            _, _, chosen = block.gate(values)  # type: ignore[operator]
            scales = []
            for token, numbers in zip(values, chosen.tolist(), strict=True):
                inner = [block.experts[number] for number in numbers]  # type: ignore[index]
                between = [e.act_fn(e.gate_proj(token)) * e.up_proj(token) for e in inner]
                scales.append(max(each.abs().max().item() for each in between))
            median = sorted(scales)[(len(scales) - 1) // 2]
            name = f"{layer}.experts.*.down_proj"
            expected[name] = expected.get(name, 0) + sum(scale > 1.1 * median for scale in scales)
    assert record.mean_counts == {name: count / len(texts) for name, count in expected.items()}
    assert record.length == math.ceil(max(record.mean_counts.values())) > 1
    assert record.token_ids[-1] == lm.bos_token_id


def enumerate_experts(lm: LanguageModel) -> list[tuple[str, torch.nn.Module]]:
    """The parts of a Mixtral that are handed the tokens one by one, flattened, behind the router."""
    return [(f"model.layers.{index}.mlp", block.mlp.experts) for index, block in enumerate(lm.blocks)]  # type: ignore


@pytest.mark.parametrize("family", VARIANTS)
def test_the_table_names_the_down_projection_of_every_block(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    found, linears = down_projections(lm), lm.linears()
    assert len(found) == len(lm.blocks) * (2 if family == "qwen2_moe" else 1)  # routed experts, and the shared one
    for layer, names in found.items():
        assert len(names) == (4 if ".experts." in layer else 1)
    assert any(".experts." in layer for layer in found) == (family in EXPERTS)
    for names in found.values():
        hidden = lm.model.config.hidden_size
        assert all(linears[name].out_features == hidden < linears[name].in_features for name in names)


def test_a_star_in_the_path_stands_for_one_part(tiny: Tiny) -> None:
    lm = tiny()
    for path, expected in (("mlp.*", 3), ("*.down_proj", 1), ("*", 0), ("mlp.*.down_proj", 0)):
        lm.architecture = replace(lm.architecture, down_projection=path)
        if expected:
            assert [len(names) for names in down_projections(lm).values()] == [expected] * 3
        else:
            with pytest.raises(UnsupportedModelError, match=r"search\.method=prefixquant .*tiny_llama \(llama\)"):
                down_projections(lm)


def test_an_architecture_without_down_projection_is_refused_with_the_way_out(tiny: Tiny) -> None:
    lm = tiny()
    lm.architecture = replace(lm.architecture, down_projection="")
    with pytest.raises(UnsupportedModelError, match=r"the architecture table has none .*use search=qfep"):
        rule(lm, draw())
