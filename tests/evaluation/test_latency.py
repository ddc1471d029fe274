"""Latency: what is timed, in which order, and how a row's numbers follow from it. No test depends on a time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import random_texts
from tiny_run import small_config
from torch import Tensor

from cushion import pipeline
from cushion.artifacts import ArtifactStore
from cushion.config import ActivationConfig, KvCacheConfig, QuantizerConfig, RunConfig, SearchConfig
from cushion.config.latency import LatencyConfig
from cushion.config_warnings import options_without_effect
from cushion.errors import ConfigError
from cushion.evaluation import latency
from cushion.evaluation.latency import Timing, Variant, check_latency, prompts, rounds, timed, weight_bytes
from cushion.evaluation.latency_step import LatencyStep, machine, warn_of_another_machine
from cushion.events import Event, Progress
from cushion.execution.int8 import Int8Linear
from cushion.metrics.columns import Place, columns
from cushion.metrics.latency import latency_values
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.fitted import FittedQuantizer
from cushion.quantization.lazily import QuantizedLazily
from cushion.reporting.tables import comparison_table, further_tables
from cushion.step import Context, compute

Tiny = Callable[..., LanguageModel]
DYNAMIC = QuantizerConfig("dynamic", activations=ActivationConfig(range="dynamic"))


def test_a_timing_runs_the_prompt_and_then_token_by_token_what_generate_gives(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny("llama")
    prefix, texts = Prefix.from_tokens(lm.model, [5, 9], {}), random_texts(2, 7)
    seen: list[Tensor] = []
    body = LanguageModel.body
    monkeypatch.setattr(LanguageModel, "body", lambda own, ids, **kw: seen.append(ids.clone()) or body(own, ids, **kw))
    found = timed(lm, prefix, texts, new_tokens=4)
    assert [tuple(ids.shape) for ids in seen] == [(2, 7), (2, 1), (2, 1), (2, 1)]
    inputs = {"input_ids": texts, "attention_mask": torch.ones_like(texts)}
    generated = lm.model.generate(
        **prefix.prepend(inputs),
        past_key_values=prefix.cache(lm.model, 2),
        max_new_tokens=4,
        min_new_tokens=4,
        do_sample=False,
    )
    assert torch.equal(torch.cat(seen[1:], 1), generated[:, -4:-1])
    assert min(found.first, found.following) > 0


def test_variants_take_turns_and_the_first_rounds_do_not_count(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, log, ticks = tiny("llama"), list[str](), iter(range(100))

    @contextmanager
    def on(name: str) -> Iterator[None]:
        log.append(name)
        yield
        log.append(f"/{name}")

    def fake(*_: Any) -> Timing:
        return Timing(float(next(ticks)), 0.5)

    monkeypatch.setattr(latency, "timed", fake)
    variants = [Variant(Prefix.empty(), lambda name=name: on(name)) for name in "AB"]
    found = list(rounds(lm, variants, random_texts(1, 4), LatencyConfig([1], repeats=3, warmup=1)))
    assert log == ["A", "/A", "B", "/B", "B", "/B", "A", "/A"] * 2
    assert found[0] is None
    counted = [[one.first for one in each] for each in found[1:] if each is not None]
    assert counted == [[3.0, 2.0], [4.0, 5.0], [7.0, 6.0]]


def test_values_are_medians_their_spread_and_ratios_of_the_same_round() -> None:
    own = [(2.0, 0.2), (4.0, 0.1), (9.0, 0.4)]
    full = [(1.0, 0.1), (4.0, 0.1), (3.0, 0.8)]
    values = latency_values(3, 50, own, full, peak=5 * 2**20)
    low, _, high = statistics.quantiles([2.0, 4.0, 9.0], n=4, method="inclusive")
    wanted = {
        "time_to_first_token": 4000.0,
        "time_to_first_token_spread": 1000 * (high - low),
        "time_to_first_token_full_precision": 3000.0,
        "time_to_first_token_ratio": 2.0,
        "time_per_output_token": 200.0,
        "time_per_output_token_spread": 150.0,
        "time_per_output_token_full_precision": 100.0,
        "time_per_output_token_ratio": 1.0,
        "prefill_throughput": 3 * 50 / 4.0,
        "decode_throughput": 3 / 0.2,
        "peak_memory": 5.0,
    }
    assert values == pytest.approx({f"{key}/3x50": value for key, value in wanted.items()})


def test_the_full_precision_side_is_the_model_as_it_was_and_codes_take_a_quarter(tiny: Tiny) -> None:
    lm = tiny("llama")
    linears, plain = lm.linears(), weight_bytes(lm)
    quantized = sum(linear.weight.numel() for linear in linears.values())
    with QuantizedLazily(lm, Prefix.empty(), DYNAMIC, execution="int8") as model:
        model.put_on()
        assert any(isinstance(module, Int8Linear) for module in lm.model.modules())
        scales = 4 * len(linears)
        assert weight_bytes(lm) == plain - 4 * quantized + quantized + scales
        with model.suspended():
            assert all(lm.model.get_submodule(name) is linear for name, linear in linears.items())
            assert weight_bytes(lm) == plain
        assert any(isinstance(module, Int8Linear) for module in lm.model.modules())
    with FittedQuantizer(DYNAMIC).on(lm):
        assert weight_bytes(lm) == plain, "a simulation saves nothing"


def test_beside_a_rotated_row_full_precision_is_the_plain_model(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a rotation leaves on a model, products with the inputs of its linears among it, belongs to the row."""
    lm, seen = tiny("llama"), list[tuple[bool, bool]]()
    plain, down = weight_bytes(lm), lm.linears(["down_proj"]).values()

    def fake(lm: LanguageModel, behind: Prefix, *_: Any) -> Timing:
        hooked = any(linear._forward_pre_hooks for linear in down) or weight_bytes(lm) != plain
        seen.append((len(behind) > 0, hooked))
        return Timing(1.0, 0.5)

    monkeypatch.setattr(latency, "timed", fake)
    quantizer = replace(DYNAMIC, rotation="hadamard", input_rotation="down")
    config = LatencyConfig([1], [4, 5], repeats=3, warmup=1)
    heard = list[Event]()
    with QuantizedLazily(lm, Prefix.from_tokens(lm.model, [5]), quantizer, execution="int8") as model:
        model.put_on()  # as the perplexity of a row leaves it
        found = compute(LatencyStep(model, config), Context(lm, ArtifactStore(tmp_path), heard.append))
    assert seen == ([(False, False)] * 4 + [(True, True)] * 4) * 2
    assert found.full_weights == plain != found.weights
    assert [len(timings) for timings in (*found.own.values(), *found.full.values())] == [3] * 4
    assert [event.done for event in heard if isinstance(event, Progress)] == list(range(1, 17))


def test_what_does_not_fit_or_could_not_be_timed_is_refused(tiny: Tiny) -> None:
    lm = tiny("llama")
    check_latency(lm, LatencyConfig([1], [200], new_tokens=50), DYNAMIC, 6)
    with pytest.raises(ConfigError, match=r"prompt_lengths=\[9, 200\] .* of up to 7 tokens needs 257 positions"):
        check_latency(lm, LatencyConfig([1], [9, 200], new_tokens=50), DYNAMIC, 7)
    cached = replace(DYNAMIC, kv_cache=KvCacheConfig(bits=8))
    with pytest.raises(ConfigError, match=r"cannot be used with quantizer\.kv_cache, which is simulated around"):
        check_latency(lm, LatencyConfig([1]), cached, 0)
    check_latency(lm, LatencyConfig(prompt_lengths=[10**6]), cached, 0)  # off
    for wrong, message in (
        ({"batch_sizes": [0]}, r"eval\.latency\.batch_sizes=\[0\] is not allowed: numbers of at least 1"),
        ({"batch_sizes": [2, 2]}, r"each of them once"),
        ({"batch_sizes": [1], "prompt_lengths": []}, r"eval\.latency\.prompt_lengths=\[\] is not allowed"),
        ({"new_tokens": 1}, r"eval\.latency\.new_tokens=1 is not allowed: it must be at least 2"),
        ({"repeats": 2}, r"eval\.latency\.repeats=2"),
        ({"warmup": 0}, r"eval\.latency\.warmup=0"),
    ):
        with pytest.raises(ConfigError, match=message):
            LatencyConfig(**wrong)


def test_keys_without_batch_sizes_have_no_effect_and_say_so() -> None:
    config = RunConfig()
    config.eval.latency = LatencyConfig(repeats=5)
    assert "eval.latency.repeats=5 has no effect with eval.latency.batch_sizes=[]" in options_without_effect(config)


def test_a_run_has_the_latency_of_every_row_in_tables_and_only_if_asked(
    text_file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(text_file, tmp_path)
    config.quantizer, config.search = DYNAMIC, SearchConfig("newline", method="newline")
    plain = pipeline.run(config)
    assert not any("time_to" in key or "memory" in key for row in plain.rows for key in row.values)
    asked = replace(config.eval, latency=LatencyConfig([1, 2], [5], new_tokens=2, repeats=3, warmup=1))
    result = pipeline.run(replace(config, eval=asked))
    assert [row.label for row in result.rows] == [row.label for row in plain.rows]
    for row, other in zip(result.rows, plain.rows, strict=True):
        assert row.under("perplexity") == other.under("perplexity")
        for size in ("1x5", "2x5"):
            ratio = row.values[f"time_per_output_token_ratio/{size}"]
            assert ratio is not None and math.isfinite(ratio) and ratio > 0
            assert row.values[f"peak_memory/{size}"] is None, "torch counts on GPUs alone"
    assert result.metrics["time_to_first_token/1x5"] == result.rows[-1].values["time_to_first_token/1x5"]
    record = {"rows": [vars(row) for row in result.rows]}
    tables = further_tables(record)
    assert [table.split("  ")[0] for table in tables if table.startswith(("latency", "weights"))] == [
        "latency, batch 1, prompt 5", "latency, batch 2, prompt 5", "weights",
    ]  # fmt: skip
    assert "first token" not in comparison_table(record)
    keys = {column.key for column in columns(record["rows"], Place.TRACKER_ROW)}
    assert {"time_to_first_token/2x5", "weight_memory"} <= keys
    assert "peak_memory/1x5" not in keys
    caplog.clear()
    assert pipeline.run(replace(config, eval=asked)) == result and not caplog.messages
    warn_of_another_machine({**result.environment, "machine": {**machine(torch.device("cpu")), "threads": 64}})
    assert "measured on another machine (threads 64, here 1): to measure it on this one" in caplog.text


def test_prompts_are_the_same_for_every_variant(tiny: Tiny) -> None:
    lm = tiny("llama")
    assert torch.equal(prompts(lm, 2, 9), prompts(lm, 2, 9))
    assert prompts(lm, 2, 9).shape == (2, 9)
    assert int(prompts(lm, 1, 500).max()) < lm.vocabulary_size
