"""QFeP: each of its steps against plain loops, planted spikes, and how deep it runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import UNLIKE
from helpers import random_texts
from planted import MODULE, plant_first_spike
from torch import Tensor

from cushion.activations import TokenScales, observe_inputs
from cushion.config import SearchConfig
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.search.qfep import (
    QfepRecord,
    block_of,
    calming,
    first_blocks,
    frequent_tokens,
    qfep_search,
    score_contexts,
    spike_tokens,
)
from cushion.search.scan import Scanned

Tiny = Callable[..., LanguageModel]
CONFIG = SearchConfig(name="qfep", method="qfep", contexts=12)


def draw(texts: int = 4, tokens: int = 20, seed: int = 1, below: int = 30) -> Tensor:
    return random_texts(texts, tokens, seed, below)


def search(lm: LanguageModel, texts: Tensor, config: SearchConfig = CONFIG) -> QfepRecord:
    record = list(qfep_search(lm, config, texts))[-1]
    assert isinstance(record, QfepRecord)
    return record


@torch.no_grad()
def scales_of(lm: LanguageModel, row: list[int]) -> dict[str, list[float | None]]:
    """The abs-max of each token's input at every linear, of one row, by a hook of its own and plain Python.

    What an expert reads is recognised among the inputs of all experts of its block; None for the tokens it does not.
    """
    seen: dict[str, list[list[float]]] = {}

    def hook(name: str) -> Any:
        def call(_module: Any, args: tuple[Tensor, ...]) -> None:
            seen[name] = args[0].reshape(-1, args[0].shape[-1]).tolist()

        return call

    modules = {n: m for n, m in lm.model.named_modules() if n in lm.linears() or n.endswith("mlp.experts")}
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    lm.model(torch.tensor([row]))
    for handle in handles:
        handle.remove()
    found: dict[str, list[float | None]] = {}
    for name in lm.linears():
        places = list(range(len(row)))
        if ".experts." in name:
            gate = name.rpartition(".")[0] + ".gate_proj"
            places = [seen[name.partition(".experts.")[0] + ".experts"].index(token) for token in seen.get(gate, [])]
        found[name] = [None] * len(row)
        for place, token in zip(places, seen.get(name, []), strict=True):
            found[name][place] = max(abs(value) for value in token)
    return found


def read(scales: list[float | None]) -> list[float]:
    return [scale for scale in scales if scale is not None]


def by_plain_loops(lm: LanguageModel, texts: Tensor, config: SearchConfig) -> tuple[str, float, list[int], list[int]]:
    """Module, its ratio, tokens T and prefix of QFeP, one row at a time through the whole model."""
    bos = lm.bos_token_id
    assert bos is not None
    rows = [[bos, *text] for text in texts.tolist()]
    scales = [scales_of(lm, row) for row in rows]
    ratios = {}
    for name in scales[0]:
        of_name = [read(text[name]) for text in scales if read(text[name])]
        each = [max(values) / sorted(values)[(len(values) - 1) // 2] for values in of_name]
        ratios[name] = sum(each) / len(each) if each else 1.0
    module = max(ratios, key=lambda name: ratios[name])
    best: dict[int, float] = {}
    for row, text in zip(rows, scales, strict=True):
        known = [(scale, position) for position, scale in enumerate(text[module]) if position and scale is not None]
        for scale, position in sorted(known, reverse=True)[:3]:
            best[row[position]] = max(best.get(row[position], 0.0), scale)
    tokens = sorted(best, key=lambda token: -best[token])[: config.outlier_tokens]
    counts = Counter(token for text in texts.tolist() for token in text)
    contexts = sorted(counts, key=lambda token: (-counts[token], token))[: config.contexts]
    scores = {}
    for token in tokens:
        for context in contexts:
            found = scales_of(lm, [bos, context, token, context, token])[module]
            first, second = found[2], found[4]
            scores[token, context] = 0.0 if first is None or second is None else first / second
    token, context = max(scores, key=lambda pair: scores[pair])
    return module, ratios[module], tokens, [bos, context, token]


@pytest.mark.parametrize("family", UNLIKE)
def test_qfep_agrees_with_plain_loops_over_the_whole_model(tiny: Tiny, family: str) -> None:
    lm, texts, config = tiny(family), draw(3, 16), replace(CONFIG, contexts=6)
    record = search(lm, texts, config)
    module, ratio, tokens, prefix = by_plain_loops(lm, texts, config)
    inputs = scales_of(lm, [1, 2, 3])
    assert inputs[record.module] == inputs[module], "the same linear, or one that shares its input"
    assert record.ratios[record.module] == pytest.approx(ratio, rel=1e-4)
    assert [spike.token_id for spike in record.tokens] == tokens
    assert record.token_ids == prefix
    assert list(record.ratios.values()) == sorted(record.ratios.values(), reverse=True)
    blocks = [name for name in lm.linears() if name.startswith(f"{lm.architecture.blocks}.")]
    position = int(record.module.removeprefix(f"{lm.architecture.blocks}.").partition(".")[0])
    assert blocks and record.contexts == 6
    assert record.token_forwards == pytest.approx(3 * 17 + 5 * 6 * 3 * (position + 1) / len(lm.blocks))
    chosen = max(record.tokens, key=lambda spike: spike.score)
    assert record.token_ids[1:] == [chosen.context_id, chosen.token_id]
    assert (chosen.token, chosen.context) == (lm.decode([chosen.token_id]), lm.decode([chosen.context_id]))


def test_a_planted_token_that_spikes_at_its_first_occurrence_only_is_found_and_calmed(tiny: Tiny) -> None:
    lm, texts, planted = tiny(), draw(below=250), 251
    texts[:, [4, 9, 15]] = planted
    plant_first_spike(lm.model, planted)
    record = search(lm, texts)
    assert record.module == MODULE
    assert record.token_ids[0] == lm.bos_token_id and record.token_ids[2] == planted
    assert record.ratios[MODULE] > 1000 and record.tokens[0].token_id == planted
    assert record.tokens[0].score > 1000 > 10 > record.tokens[1].score
    linear = {MODULE: lm.linears()[MODULE]}
    largest = {}
    for name, prompt in (("bos", record.token_ids[:1]), ("qfep", record.token_ids)):
        scales, prefix = TokenScales(texts=len(texts)), Prefix.from_tokens(lm.model, prompt)
        with torch.no_grad(), observe_inputs(linear, scales):
            lm.body(texts, past_key_values=prefix.cache(lm.model, len(texts)), use_cache=True)
        largest[name] = scales.scales(MODULE).max().item()
        assert (scales.scales(MODULE)[:, 4] > 1000).tolist() == [name == "bos"] * len(texts)
    assert largest["qfep"] < largest["bos"] / 1000


def test_the_model_is_run_only_as_deep_as_the_module_needs_and_is_whole_again(tiny: Tiny) -> None:
    lm, texts, planted = tiny(), draw(below=250), 251
    texts[:, 4] = planted
    plant_first_spike(lm.model, planted)
    blocks, expected = lm.blocks, lm.model(texts).logits
    calls: Counter[tuple[str, int]] = Counter()
    handles = [
        block.register_forward_hook(lambda _m, args, _o, name=name: calls.update([(name, args[0].shape[1])]))
        for name, block in lm.named_blocks.items()
    ]
    record = search(lm, texts)
    for handle in handles:
        handle.remove()
    assert record.module == MODULE and block_of(lm, MODULE) == 1
    passes = 3 * 3  # three tokens T, and 12 contexts at 4 a time: as many tokens as a text of 20 has
    assert calls == {("0", 21): 4, ("1", 21): 4, ("2", 21): 4, ("0", 5): passes, ("1", 5): passes}
    assert lm.blocks is blocks and len(blocks) == 3
    assert torch.equal(lm.model(texts).logits, expected)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


@pytest.mark.parametrize("family", UNLIKE)
@pytest.mark.parametrize("count", [1, 2, 3])
@torch.no_grad()
def test_the_first_blocks_compute_what_they_compute_in_the_whole_model(tiny: Tiny, family: str, count: int) -> None:
    lm, ids = tiny(family), draw()
    blocks, names = lm.blocks, list(lm.model.state_dict())
    whole, cut = TokenScales(), TokenScales()
    with observe_inputs(lm.linears(), whole):
        lm.body(ids, use_cache=False)
    with first_blocks(lm, count), observe_inputs(lm.linears(), cut):
        lm.body(ids, use_cache=False)
    assert {block_of(lm, name) for name in cut.names} == set(range(count))
    for name in cut.names:
        assert torch.equal(cut.scales(name), whole.scales(name))
    with pytest.raises(RuntimeError, match="inside"), first_blocks(lm, count):
        raise RuntimeError("inside")
    assert lm.blocks is blocks and list(lm.model.state_dict()) == names


def test_the_batch_size_makes_no_difference_to_the_scores(tiny: Tiny) -> None:
    lm, contexts = tiny(), list(range(10))
    name = list(lm.linears())[-1]
    together = torch.cat(list(score_contexts(lm, name, 40, contexts, 10)))
    parts = list(score_contexts(lm, name, 40, contexts, 3))
    assert [len(part) for part in parts] == [3, 3, 3, 1]
    torch.testing.assert_close(torch.cat(parts), together)


def test_progress_is_reported_for_texts_and_contexts(tiny: Tiny) -> None:
    events = list(qfep_search(tiny(), CONFIG, draw()))
    assert events[:4] == [Scanned(done, 4, "text") for done in (1, 2, 3, 4)]
    assert events[4:-1] == [Scanned(done, 36, "context") for done in range(4, 37, 4)]


def test_a_model_without_bos_uses_its_eos(tiny: Tiny) -> None:
    lm, texts = tiny("bloom"), draw()
    with_bos = search(lm, texts)
    lm.tokenizer.bos_token = None
    assert lm.bos_token_id == 257
    record = search(lm, texts)
    assert (with_bos.token_ids[0], record.token_ids[0]) == (256, 257)
    assert record.token_ids == by_plain_loops(lm, texts, CONFIG)[3]


# ---- the steps on made-up numbers ---------------------------------------------------------------------------------


def test_spike_tokens_are_the_best_distinct_ones_of_each_texts_top_three_without_bos() -> None:
    texts = torch.tensor([[256, 1, 2, 3, 4, 5], [256, 1, 6, 7, 1, 8]])
    scales = torch.tensor([[99.0, 9.0, 8.0, 7.0, 6.5, 1.0], [99.0, 2.0, 0.3, 0.2, 20.0, 0.1]])
    assert spike_tokens(texts, scales, 3) == {1: 20.0, 2: 8.0, 3: 7.0}
    assert spike_tokens(texts, scales, 1) == {1: 20.0}
    assert list(spike_tokens(texts, scales, 9)) == [1, 2, 3, 6], "token 4 is the fourth of its text"


def test_spike_tokens_of_one_scale_come_by_their_ids_and_texts_may_be_short() -> None:
    texts, scales = torch.tensor([[256, 9, 4]]), torch.tensor([[1.0, 5.0, 5.0]])
    assert list(spike_tokens(texts, scales, 3)) == [4, 9]


def test_frequent_tokens_descend_and_ties_go_to_the_smaller_id() -> None:
    texts = torch.tensor([[7, 7, 2, 5], [5, 7, 2, 0]])
    assert frequent_tokens(texts, 3) == [7, 2, 5]
    assert frequent_tokens(texts, 200) == [7, 2, 5, 0], "tokens that do not occur are no contexts"


def test_calming_is_the_first_over_the_second_occurrence() -> None:
    scales = torch.tensor([[9.0, 8.0, 6.0, 7.0, 3.0], [9.0, 8.0, 0.0, 7.0, 0.0], [1.0, 1.0, 1.0, 1.0, 4.0]])
    assert calming(scales).tolist() == [2.0, 0.0, 0.25]
    endless = calming(torch.tensor([[1.0, 1.0, 3e38, 1.0, 0.0]]))
    assert endless.isfinite().all() and endless.item() > 1e38
    unread = torch.tensor([[1.0, 1.0, math.nan, 1.0, 2.0], [1.0, 1.0, 2.0, 1.0, math.nan]])
    assert calming(unread).tolist() == [0.0, 0.0], "an expert that reads one of the two says nothing"


def test_tokens_that_an_expert_does_not_read_are_no_spike_tokens() -> None:
    texts = torch.tensor([[256, 1, 2, 3, 4]])
    scales = torch.tensor([[math.nan, math.nan, 5.0, math.nan, 0.0]])
    assert spike_tokens(texts, scales, 9) == {2: 5.0, 4: 0.0}
