"""Rows with perplexity and tasks: what they measure, and that they resume."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES, FEW
from tiny_run import saved_model, small_config
from tiny_tasks import DYNAMIC, FILES, PER_TOKEN, RECORDS, STATIC, ranges_of, write_lines, write_sets
from torch import Tensor
from untouched import assert_untouched, snapshot

from cushion import pipeline, row
from cushion.activations import ChannelRanges
from cushion.artifacts import ArtifactStore, Workspace
from cushion.config import (
    ActivationConfig,
    CorpusConfig,
    EvalConfig,
    QuantizerConfig,
    RunConfig,
    SearchConfig,
    WeightConfig,
)
from cushion.errors import ConfigError, NotFiniteError
from cushion.evaluation import harness, perplexity, perplexity_step
from cushion.evaluation.tasks import TaskSet, load_tasks
from cushion.events import Event, Progress
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization import lazily
from cushion.quantization.calibration import Calibration
from cushion.quantization.lazily import QuantizedLazily
from cushion.results import RunResult
from cushion.step import Context

Tiny = Callable[..., LanguageModel]

# ---- one row --------------------------------------------------------------------------------------------------------


class Recorded(ArtifactStore):
    """A store that remembers which keys it was asked for, and a listener that remembers what it heard."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.events: list[Event] = []

    def get_or_make(self, step: str, depends_on: dict[str, Any], make: Callable[[Workspace], None]) -> Path:
        self.asked.append((step, depends_on))
        return super().get_or_make(step, depends_on, make)


def measured_row(
    lm: LanguageModel,
    config: EvalConfig,
    behind: Prefix,
    quantizer: QuantizerConfig | None,
    store: Path | Recorded,
    blocks: dict[str, Tensor],
    tasks: TaskSet,
    ranges: ChannelRanges | None = None,
) -> row.Measured:
    cache = Recorded(store) if isinstance(store, Path) else store
    calibration = None if ranges is None else Calibration(ranges, "ranges", 0.0)
    model = QuantizedLazily(lm, behind, quantizer, calibration)
    return row.measure_row(Context(lm, cache, cache.events.append), model, config, blocks, tasks, "row")


@pytest.mark.parametrize("quantizer", [STATIC, DYNAMIC, PER_TOKEN], ids=lambda quantizer: quantizer.name)
def test_a_quantized_row_leaves_the_model_bit_for_bit(
    tiny: Tiny, tmp_path: Path, include_path: str, quantizer: QuantizerConfig
) -> None:
    lm = tiny()
    behind = Prefix.from_tokens(lm.model, [256, 65])
    before = snapshot(lm)
    config = EvalConfig(tasks=["copa"], include_path=include_path)
    tasks = load_tasks(config, write_sets(tmp_path / "data", "copa"))
    blocks = {"text": torch.randint(0, 256, (3, 20), generator=torch.Generator().manual_seed(1))}
    recorded = Recorded(tmp_path / "q")
    ranges = ranges_of(lm, behind) if quantizer.needs_calibration else None
    measured = measured_row(lm, config, behind, quantizer, recorded, blocks, tasks, ranges)
    plain = measured_row(lm, config, behind, None, tmp_path / "f", blocks, tasks)
    assert measured.perplexity["text"] != plain.perplexity["text"], "the quantizer was on the model"
    assert measured.tokens == plain.tokens == {"text": 3 * 19}

    assert_untouched(lm, before)
    again = measured_row(lm, config, behind, None, tmp_path / "f2", blocks, tasks)
    assert (again.perplexity, again.tasks) == (plain.perplexity, plain.tasks)

    batch_sizes = [key["config"]["batch_size"] for step, key in recorded.asked if step == "tasks"]
    assert batch_sizes == [1 if quantizer is DYNAMIC else 8]


def test_a_row_that_fails_leaves_the_model_bit_for_bit(
    tiny: Tiny, tmp_path: Path, include_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny()
    before = snapshot(lm)
    config = EvalConfig(perplexity=False, tasks=["copa"], include_path=include_path)
    tasks = load_tasks(config, write_sets(tmp_path / "data", "copa"))
    seen: list[set[str]] = []

    def fail(*_: Any) -> Any:
        seen.append({type(module).__name__ for module in lm.blocks.modules()})
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "run_task", fail)
    with pytest.raises(KeyboardInterrupt):
        measured_row(lm, config, Prefix.empty(), PER_TOKEN, tmp_path / "q", {}, tasks)
    assert len(seen) == 1
    assert "QuantizedLinear" in seen[0]
    assert_untouched(lm, before)


def test_a_row_from_the_cache_computes_nothing(
    tiny: Tiny, tmp_path: Path, include_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, config = tiny(), EvalConfig(tasks=["rte"], include_path=include_path)
    tasks = load_tasks(config, write_sets(tmp_path / "data", "rte"))
    blocks = {"text": torch.randint(0, 256, (2, 20), generator=torch.Generator().manual_seed(1))}
    first = measured_row(lm, config, Prefix.empty(), PER_TOKEN, tmp_path / "q", blocks, tasks)

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("computed again")

    for module, name in ((lazily.FittedQuantizer, "on"), (harness, "run_task"), (perplexity_step, "block_losses")):
        monkeypatch.setattr(module, name, never)
    assert measured_row(lm, config, Prefix.empty(), PER_TOKEN, tmp_path / "q", blocks, tasks) == first


def test_progress_counts_the_tasks(tiny: Tiny, tmp_path: Path, include_path: str) -> None:
    config = EvalConfig(perplexity=False, tasks=["copa", "rte"], include_path=include_path)
    tasks = load_tasks(config, write_sets(tmp_path / "data", "copa", "rte"))
    recorded = Recorded(tmp_path / "q")
    measured_row(tiny(), config, Prefix.empty(), None, recorded, {}, tasks)
    progress = [event for event in recorded.events if isinstance(event, Progress)]
    assert {(event.stage, event.total, event.unit) for event in progress} == {("tasks, row", 2, "task")}
    done = [event.done for event in progress]
    assert done == sorted(done)
    assert done[-1] == 2


def test_a_task_whose_records_change_is_asked_again(tiny: Tiny, tmp_path: Path, include_path: str) -> None:
    lm, config = tiny(), EvalConfig(perplexity=False, tasks=["copa"], include_path=include_path)
    paths = write_sets(tmp_path / "data", "copa")
    first = load_tasks(config, paths)
    assert load_tasks(config, paths).tasks["copa"].identity == first.tasks["copa"].identity
    write_lines(tmp_path / "data" / FILES["copa"], RECORDS["copa"][:2])
    second = load_tasks(config, paths)
    assert second.tasks["copa"].identity != first.tasks["copa"].identity
    samples = [
        measured_row(lm, config, Prefix.empty(), None, tmp_path / "q", {}, tasks).tasks["copa"].samples
        for tasks in (first, second)
    ]
    assert samples == [3, 2]


@pytest.mark.parametrize("name", ["lambada_openai", "copa"])
def test_a_model_that_answers_with_nothing_finite_has_no_score(
    tiny: Tiny, tmp_path: Path, include_path: str, name: str
) -> None:
    """Without a check, the largest of several NaN is the first of them, and the accuracy looks like any other."""
    lm, config = tiny(), EvalConfig(perplexity=False, tasks=[name], include_path=include_path)
    with torch.no_grad():
        dict(lm.model.named_parameters())["model.norm.weight"].fill_(float("nan"))
    tasks = load_tasks(config, write_sets(tmp_path / "data", name))
    with pytest.raises(NotFiniteError, match=rf"{name}.*model\.dtype"):
        measured_row(lm, config, Prefix.empty(), None, tmp_path / "q", {}, tasks)
    assert not list((tmp_path / "q").rglob("task.json"))


# ---- perplexity -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def by_hand(lm: LanguageModel, prompt: list[int], tokens: list[int], length: int, blocks: int) -> tuple[float, int]:
    """Perplexity of the plain model over the first blocks of a text, each alone behind the prompt's tokens."""
    total, count = 0.0, 0
    for index in range(blocks):
        block = tokens[index * length : (index + 1) * length]
        assert len(block) == length
        logits = lm.model(input_ids=torch.tensor([prompt + block]), use_cache=False).logits[0]
        log_probabilities = torch.log_softmax(logits.double(), dim=-1)
        for position in range(1, length):
            total -= log_probabilities[len(prompt) + position - 1, block[position]].item()
            count += 1
    return math.exp(total / count), count


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_from_the_decoders_output_are_the_models_own(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    texts = torch.randint(0, 256, (2, 30), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        own = lm.model(input_ids=texts).logits
        hidden = lm.body(texts).last_hidden_state
        assert torch.allclose(lm.logits(hidden), own, rtol=0, atol=1e-6)
        assert torch.allclose(lm.logits(hidden[:, 4:9]), own[:, 4:9], rtol=0, atol=1e-5)


def test_predictions_are_capped_where_the_model_caps_them(tiny: Tiny) -> None:
    lm = tiny()
    hidden = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(3)) * 30
    plain = lm.logits(hidden)
    lm.model.config.final_logit_softcapping = 5.0
    capped = lm.logits(hidden)
    assert plain.abs().max() > 10
    assert capped.abs().max() <= 5
    assert torch.allclose(capped, 5 * torch.tanh(plain / 5), atol=1e-5)


@pytest.mark.parametrize("family", FEW)
def test_perplexity_in_chunks_is_that_in_one_piece(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    lm, prompt = tiny(family), [7, 99]
    behind, tokens = Prefix.from_tokens(lm.model, prompt), torch.randint(0, 256, (90,)).tolist()
    blocks, found = {"text": torch.tensor(tokens).reshape(3, 30)}, []
    for size in (256, 7, 1):
        monkeypatch.setattr(perplexity, "POSITIONS_PER_CHUNK", size)
        config, no_tasks = EvalConfig(batch_size=2), TaskSet((), {}, {})
        found.append(measured_row(lm, config, behind, None, tmp_path / str(size), blocks, no_tasks))
    expected, count = by_hand(lm, prompt, tokens, 30, 3)
    assert [measured.tokens for measured in found] == [{"text": count}] * 3
    for measured in found:
        assert measured.perplexity["text"] == pytest.approx(expected, rel=1e-5)


def test_further_corpora_have_a_perplexity_each(text_file: Path, tmp_path: Path, tiny: Tiny) -> None:
    more = {}
    for name in ("backwards", "shouted"):
        lines = [line[::-1] if name == "backwards" else line.upper() for line in text_file.read_text().split("\n\n")]
        more[name] = tmp_path / f"{name}-file.txt"
        more[name].write_text("\n\n".join(lines), encoding="utf-8")
    config = small_config(text_file, tmp_path / "out")
    config.data.further = {name: CorpusConfig(source="file", path=str(path)) for name, path in more.items()}
    result = pipeline.run(config)
    assert set(result.data) >= {"evaluation", "further.backwards", "further.shouted"}
    for one in result.rows:
        assert list(one.under("perplexity")) == ["text", "backwards", "shouted"]
        assert len(set(one.under("perplexity").values())) == 3
    full = result.rows[0]
    lm = tiny()
    for name, path in {"text": text_file, **more}.items():
        expected, count = by_hand(lm, [], lm.encode(path.read_text()).tolist(), 32, 4)
        assert full.under("perplexity")[name] == pytest.approx(expected, rel=1e-5)
        assert full.tokens[name] == count == 4 * 31


def test_a_further_corpus_called_like_the_first_is_refused(text_file: Path, tmp_path: Path) -> None:
    config = small_config(text_file, tmp_path / "out")
    config.data.further = {"text": CorpusConfig(source="file", path=str(text_file))}
    with pytest.raises(ConfigError, match=r"data\.further names 'text'.*rename"):
        pipeline.run(config)


@pytest.mark.parametrize("count", [4, None], ids=str)
def test_a_prefix_in_the_block_shortens_the_blocks_behind_it(
    text_file: Path, tmp_path: Path, tiny: Tiny, count: int | None
) -> None:
    text_file.write_text(text_file.read_text()[:700], encoding="utf-8")  # all of it is for the evaluation
    found: dict[bool, RunResult] = {}
    for within in (False, True):
        config = small_config(text_file, tmp_path / "out")
        config.data.calibration = config.data.tuning = config.data.search = CorpusConfig(source="embedded")
        config.eval.blocks, config.eval.prefix_in_block = count, within
        config.quantizer = QuantizerConfig(weights=WeightConfig(bits=None), activations=ActivationConfig(bits=None))
        config.search = SearchConfig(name="tokens", method="tokens", tokens="ab:")
        found[within] = pipeline.run(config)
        assert found[within].evaluation["prefix_in_block"] is within
    lm = tiny()
    tokens, prompt = lm.encode(text_file.read_text()).tolist(), lm.encode("ab:").tolist()
    for within, result in found.items():
        for one, before, length in zip(result.rows, ([], prompt), (32, 29 if within else 32), strict=True):
            blocks = len(tokens) // length if count is None else count
            expected, predicted = by_hand(lm, before, tokens, length, blocks)
            assert one.under("perplexity")["text"] == pytest.approx(expected, rel=1e-5)
            assert one.tokens["text"] == predicted == blocks * (length - 1)
    assert found[True].rows[0].under("perplexity") == found[False].rows[0].under("perplexity")


def test_a_prefix_that_fills_the_block_is_refused(text_file: Path, tmp_path: Path) -> None:
    config = small_config(text_file, tmp_path / "out")
    config.eval.prefix_in_block = True
    config.search = SearchConfig(name="tokens", method="tokens", token_ids=[65] * 31)
    with pytest.raises(ConfigError, match=r"eval\.prefix_in_block=true leaves 1 of eval\.block_length=32.*lengthen"):
        pipeline.run(config)


# ---- whole runs with tasks ------------------------------------------------------------------------------------------


def with_tasks(text: Path, output: Path, include_path: str, *names: str) -> RunConfig:
    config = small_config(text, output)
    config.eval = EvalConfig(
        block_length=32, blocks=2, activation_blocks=1, tasks=list(names), include_path=include_path, controls=False
    )
    config.paths.data_dir = write_sets(output / "data", *(name for name in names if name in FILES)).data_dir
    return config


def without_seconds(result: RunResult) -> list[dict[str, Any]]:
    rows = [vars(one) for one in result.rows]
    return [{**row, "values": {k: v for k, v in row["values"].items() if k != "seconds"}} for row in rows]


@pytest.mark.parametrize("how", ["inside the task", "between the tasks"])
def test_an_interrupted_evaluation_goes_on_with_the_next_task(
    text_file: Path, tmp_path: Path, include_path: str, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    names = ("copa", "rte", "tiny_generation")
    asked: list[str] = []
    real = harness.run_task

    def count(model: Any, task: Any, limit: int | None) -> Any:
        asked.append(task.name)
        if how == "inside the task" and asked == ["copa", "rte"]:
            raise KeyboardInterrupt
        return real(model, task, limit)

    def listen(event: Event) -> None:
        if how == "between the tasks" and isinstance(event, Progress) and event.unit == "task" and event.done == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(harness, "run_task", count)
    config = with_tasks(text_file, tmp_path / "broken", include_path, *names)
    with pytest.raises(KeyboardInterrupt):
        pipeline.run(config, [listen])
    assert asked == ["copa", "rte"]
    del asked[:]
    resumed = pipeline.run(config)
    assert asked == (["rte", "tiny_generation"] if how == "inside the task" else ["tiny_generation"])

    monkeypatch.setattr(harness, "run_task", real)
    unbroken = pipeline.run(with_tasks(text_file, tmp_path / "unbroken", include_path, *names))
    assert without_seconds(resumed) == without_seconds(unbroken)
    assert list(resumed.rows[0].tasks) == list(names)
    assert resumed.rows[0].values["accuracy/mean"] == pytest.approx(
        sum(resumed.rows[0].tasks[name]["value"] for name in names) / len(names)
    )


def test_samples_are_written_on_request_and_only_then(text_file: Path, tmp_path: Path, include_path: str) -> None:
    config = with_tasks(text_file, tmp_path, include_path, "copa", "tiny_generation")
    config.eval.limit = 2
    config.search = SearchConfig(name="bos", method="bos")
    config.eval.controls = True
    silent = pipeline.run(config)
    assert not list(pipeline.run_folder(config).rglob("*.jsonl"))

    config.eval.samples = True
    result = pipeline.run(config)
    folder = pipeline.run_folder(config) / "samples"
    assert {path.name for path in folder.iterdir()} == {one.name for one in result.rows}
    for one in result.rows:
        for name in ("copa", "tiny_generation"):
            lines = (folder / one.name / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
            samples = [json.loads(line) for line in lines]
            per_filter = 2 if name == "tiny_generation" else 1
            assert len(samples) == 2 * per_filter
            assert one.tasks[name]["samples"] == 2
            assert {sample["doc_id"] for sample in samples} == {0, 1}
        right = [json.loads(line)["acc"] for line in (folder / one.name / "copa.jsonl").read_text().splitlines()]
        assert one.tasks["copa"]["value"] == sum(right) / 2
    values = {one.name: one.values for one in result.rows}
    for name in ("copa", "tiny_generation", "mean"):
        for full, mine in (("full_precision", "quantized"), ("full_precision_found", "quantized_found")):
            key = f"accuracy/{name}"
            found = values[mine][f"accuracy_difference/{name}"]
            assert found == pytest.approx((values[mine][key] or 0) - (values[full][key] or 0))
            assert None not in (values[mine][f"accuracy_difference_{end}/{name}"] for end in ("stderr", "low", "high"))
            assert f"accuracy_difference/{name}" not in values[full]
    assert [one.tasks for one in result.rows] == [one.tasks for one in silent.rows]


def test_tasks_of_a_run_are_asked_as_chats_where_it_says_so(text_file: Path, tmp_path: Path, include_path: str) -> None:
    config = with_tasks(text_file, tmp_path, include_path, "tiny_examples")
    config.model.path = str(saved_model(tmp_path / "model"))
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[A]{% endif %}"
    )
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    further = {"limit": 1, "shots": 1, "samples": True, "perplexity": False}
    chat: dict[str, Any] = {"chat_template": True, "system_instruction": "Be terse.", "fewshot_as_multiturn": True}
    config.eval = replace(config.eval, **further, **chat)
    result = pipeline.run(config)
    samples = pipeline.run_folder(config) / "samples" / result.rows[-1].name / "tiny_examples.jsonl"
    prompt = json.loads(samples.read_text())["arguments"][0][0]
    assert re.fullmatch(r"\[system\]Be terse\.\[user\]train \d ->\[assistant\](yes|no)\[user\]test 0 ->\[A\]", prompt)


def test_tasks_alone_need_no_perplexity(text_file: Path, tmp_path: Path, include_path: str) -> None:
    config = with_tasks(text_file, tmp_path, include_path, "copa")
    config.eval.perplexity = False
    result = pipeline.run(config)
    assert result.rows[-1].under("perplexity") == result.rows[-1].tokens == {}
    assert not any(key.startswith("perplexity/") for key in result.metrics)
    for values in (result.metrics, result.rows[-1].values):
        assert values["accuracy/copa"] == values["accuracy/mean"] == result.rows[-1].tasks["copa"]["value"]
    assert result.evaluation["tasks"]["copa"]["origin"] == str((tmp_path / "data" / FILES["copa"]).resolve())


def test_requests_that_do_not_fit_behind_the_prefix_are_recorded_and_said(
    text_file: Path, tmp_path: Path, include_path: str, tiny: Tiny
) -> None:
    config = with_tasks(text_file, tmp_path, include_path, "copa")
    config.eval.block_length, config.eval.attention_first, config.eval.controls = 4, 1, True
    config.quantizer = QuantizerConfig(weights=WeightConfig(bits=None), activations=ActivationConfig(bits=None))
    config.search = SearchConfig(name="tokens", method="tokens", token_ids=[65] * 230)
    lm, task = tiny(), load_tasks(config.eval, config.paths).tasks["copa"].task
    task.build_all_requests(limit=None, rank=0, world_size=1)
    lengths = [len(lm.encode("".join(request.args))) for request in task.instances]
    cut = sum(length - 1 > 256 - 230 for length in lengths)
    assert 0 < cut < len(lengths) == 6
    for result in (pipeline.run(config), RunResult.read(pipeline.run_folder(config) / "result.json")):
        rows = {one.name: one for one in result.rows}
        assert rows["full_precision"].tasks["copa"]["truncated"] == 0
        assert rows["full_precision_found"].tasks["copa"]["truncated"] == cut
        said = [warning for warning in result.warnings if "lost the start of their context" in warning]
        assert len(said) == 1
        assert said[0].startswith(f"{cut} requests of copa of eval.tasks")
        assert "behind a prefix of 230 tokens; shorten the prefix" in said[0]


def test_records_that_were_prepared_elsewhere_are_said_to_be(
    text_file: Path, tmp_path: Path, include_path: str
) -> None:
    config = with_tasks(text_file, tmp_path, include_path, "hellaswag", "copa")
    config.eval.perplexity, config.eval.limit = False, 1
    raw = pipeline.run(config)
    assert raw.evaluation["tasks"]["hellaswag"]["prepared"] is False
    assert not any("prepared" in warning for warning in raw.warnings)
    records = [{"query": "Roof: A man is there. he", "choices": ["sings.", "sits."], "gold": 0, "label": "0"}]
    write_lines(tmp_path / "data" / FILES["hellaswag"], records)
    prepared = pipeline.run(config)
    assert [prepared.evaluation["tasks"][name]["prepared"] for name in ("hellaswag", "copa")] == [True, False]
    (said,) = [warning for warning in prepared.warnings if "prepared" in warning]
    assert said.startswith("the records of hellaswag are taken as they are")


@pytest.mark.parametrize("ranges", ["static", "dynamic"])
def test_a_row_is_full_precision_with_the_prefix_too(
    text_file: Path, tmp_path: Path, include_path: str, ranges: str
) -> None:
    config = with_tasks(text_file, tmp_path, include_path, "copa")
    config.eval.controls = True
    config.quantizer.activations.range = ranges
    config.search = SearchConfig(name="random", method="random", length=3)
    result = pipeline.run(config)
    names = ["full_precision", "full_precision_found", "quantized", "quantized_found"]
    assert [one.name for one in result.rows] == names
    for one in result.rows:
        assert set(one.tasks["copa"]) >= {"metric", "value", "stderr", "samples", "version", "metrics"}
        assert one.tasks["copa"]["metric"] == "acc"
        assert one.tasks["copa"]["samples"] == 3


@pytest.mark.parametrize(("length", "fits"), [(240, True), (249, False)])
def test_a_prefix_that_leaves_no_room_for_what_is_generated_is_refused(
    text_file: Path, tmp_path: Path, include_path: str, length: int, fits: bool
) -> None:
    """The task generates 8 tokens, and the model has 256 positions."""
    config = with_tasks(text_file, tmp_path, include_path, "tiny_generation")
    config.eval.block_length, config.eval.limit = 4, 1
    config.eval.attention_first = 1
    config.quantizer = QuantizerConfig(weights=WeightConfig(bits=None), activations=ActivationConfig(bits=None))
    config.search = SearchConfig(name="tokens", method="tokens", token_ids=[65] * length)
    if fits:
        assert pipeline.run(config).rows[-1].tasks["tiny_generation"]["samples"] == 1
        return
    with pytest.raises(ConfigError, match=r"tiny_generation.*8 tokens.*shorten the prefix"):
        pipeline.run(config)
