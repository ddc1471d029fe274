"""lm-eval with a prefix against lm-eval without: stock numbers without one, and those of the glued text with one."""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy
import pytest
import torch
from conftest import SLIDING
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny_tasks import DYNAMIC, FILES, MMLU, PER_TOKEN, RECORDS, STATIC, ranges_of, write_lines, write_sets
from untouched import assert_untouched, snapshot

from cushion.config import EvalConfig, PathsConfig, QuantizerConfig
from cushion.errors import ConfigError, UnsupportedModelError
from cushion.evaluation import tasks as tasks_module
from cushion.evaluation.harness import BOOTSTRAP, PrefixedModel, run_task
from cushion.evaluation.task_checks import check_tasks
from cushion.evaluation.task_scores import (
    Metric,
    TaskScore,
    group_score,
    main_metric,
    mean_accuracy,
    record_values,
    score,
    shares_of,
)
from cushion.evaluation.tasks import EvaluationTask, TaskGroup, TaskSet, load_tasks
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.simulate import quantized

Tiny = Callable[..., LanguageModel]
PADDED = ("llama", "opt", "bloom", "qwen2_moe", "gpt_oss")
"""Families whose batches are padded: positions of all kinds, shared experts, sinks that are learned."""
ONE_AND_MANY = [("llama", 1), *((family, 8) for family in PADDED)]
"""Families and batch sizes: a batch of one has no padding, in whatever family."""
QUICK = ONE_AND_MANY[:4]
"""Those without the experts, which generate a token in ten times the time."""
GLUE = "Ab: "
"""Text of the prefix: one token a byte, so that gluing text and gluing tokens are the same."""

CONTEXTS = [
    ("one", " two"),
    ("a context that is a good deal longer than the others are", " x"),
    ("a context that is a good deal longer than the others are", " y"),
    ("a context that is a good deal longer than the others are", " many tokens"),
    ("seven words or so stand in this", "s"),
    ("seven words or so stand in this", "t"),
    ("a space at the end ", "moves"),
    ("caf\u00e9", " \u00e9t\u00e9"),
]


@pytest.fixture(autouse=True)
def quick_stock_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out of lm-eval's own runner what describes the machine, and let it bootstrap in this process."""
    monkeypatch.setattr(evaluator, "add_env_info", lambda results: None)
    monkeypatch.setattr(evaluator, "get_git_commit_hash", lambda: None)
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")


def plain(lm: LanguageModel, batch_size: int | str = 1) -> HFLM:
    return HFLM(pretrained=lm.model, tokenizer=copy.deepcopy(lm.tokenizer), batch_size=batch_size)


def behind(lm: LanguageModel, text: str = GLUE) -> Prefix:
    return Prefix.from_tokens(lm.model, lm.encode(text).tolist())


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, 0) for one in arguments]


def stock_task(include_path: str, monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """lm-eval's own object of a task, with made-up records in place of the hub's."""
    manager = tasks_module._task_manager(include_path)
    if name.startswith("tiny_"):
        return manager.load([name])["tasks"][name]
    rows = RECORDS.get(name, [])
    splits = dict.fromkeys(("train", "validation", "test"), rows)
    if name == "mmlu_anatomy":
        splits = {split: [row for row in MMLU[split] if row["subject"] == "anatomy"] for split in MMLU}
        splits["validation"] = splits["test"]
    with monkeypatch.context() as patch:
        give = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split, rows in splits.items()})
        patch.setattr(datasets, "load_dataset", lambda *_, **__: give)
        return manager.load([name])["tasks"][name]


def stock_run(include_path: str, model: HFLM, task: Any, limit: float | None = None, shots: int | None = None) -> Any:
    return evaluator.simple_evaluate(
        model=model,
        tasks=[task],
        limit=limit,
        num_fewshot=shots,
        bootstrap_iters=BOOTSTRAP,
        task_manager=tasks_module._task_manager(include_path),
    )


def our_task(include_path: str, folder: Path, name: str, **options: Any) -> EvaluationTask:
    paths = write_sets(folder, "mmlu" if name.startswith("mmlu") else name) if not name.startswith("tiny_") else None
    config = EvalConfig(tasks=[name], include_path=include_path, **options)
    return load_tasks(config, paths or PathsConfig(data_dir=str(folder))).tasks[name]


def plain_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def assert_as_stock(found: Any, stock: Any, name: str) -> None:
    """Every metric, its standard error, and lm-eval's whole record of every sample, to the last bit."""
    metrics, count, samples = found
    expected = {}
    for key, value in stock["results"][name].items():
        metric, _, filtered = key.partition(",")
        if filtered and not metric.endswith("_stderr"):
            stderr = stock["results"][name][f"{metric}_stderr,{filtered}"]
            label = metric if filtered == "none" else key
            expected[label] = {"value": value, "stderr": None if stderr == "N/A" else stderr}
    assert metrics == expected
    assert metrics
    assert count == stock["n-samples"][name]["effective"]
    assert len(samples) == len(stock["samples"][name]) > 0
    for ours, theirs in zip(samples, stock["samples"][name], strict=True):
        assert plain_json(ours["resps"]) == plain_json(theirs["resps"])
        assert plain_json(ours["arguments"]) == plain_json(theirs["arguments"])
        assert plain_json(ours) == plain_json(theirs)


# ---- no prefix: stock lm-eval, exactly ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "batch_size"),
    [(name, 3) for name in ("hellaswag", "copa", "rte", "winogrande", "lambada_openai", "tiny_generation")]
    + [(name, 1) for name in ("hellaswag", "lambada_openai", "tiny_generation")],
)
def test_without_a_prefix_every_number_is_that_of_stock_lm_eval(
    tiny: Tiny, tmp_path: Path, include_path: str, monkeypatch: pytest.MonkeyPatch, name: str, batch_size: int
) -> None:
    lm, task = tiny(), our_task(include_path, tmp_path, name)
    found = run_task(PrefixedModel(lm, Prefix.empty(), batch_size), task, None)
    theirs = stock_run(include_path, plain(lm, batch_size), stock_task(include_path, monkeypatch, name))
    assert_as_stock(found, theirs, name)
    assert theirs["versions"][name] == task.task.VERSION


@pytest.mark.parametrize(("name", "shots"), [("mmlu_anatomy", 2), ("tiny_examples", 3), ("tiny_examples", None)])
def test_examples_are_those_of_stock_lm_eval_in_every_row(
    tiny: Tiny, tmp_path: Path, include_path: str, monkeypatch: pytest.MonkeyPatch, name: str, shots: int | None
) -> None:
    lm, task = tiny(), our_task(include_path, tmp_path, name, shots=shots)
    theirs = stock_run(include_path, plain(lm), stock_task(include_path, monkeypatch, name), shots=shots)
    prompt = theirs["samples"][name][0]["arguments"][0][0]
    marker = "Answer:" if name == "mmlu_anatomy" else "->"
    assert prompt.count(marker) == 1 + (shots or 0)
    for _ in range(2):  # a table has several rows, and each is asked the same
        assert_as_stock(run_task(PrefixedModel(lm, Prefix.empty(), 1), task, None), theirs, name)


def test_a_limit_asks_the_first_records(
    tiny: Tiny, tmp_path: Path, include_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, task = tiny(), our_task(include_path, tmp_path, "copa", limit=2)
    found = run_task(PrefixedModel(lm, Prefix.empty(), 2), task, 2)
    assert_as_stock(
        found, stock_run(include_path, plain(lm, 2), stock_task(include_path, monkeypatch, "copa"), 2), "copa"
    )
    assert found[1] == 2
    single = run_task(PrefixedModel(lm, Prefix.empty(), 2), task, 1)
    assert (single[1], single[0]["acc"]["stderr"]) == (1, None)


@pytest.mark.parametrize("share", [0.3, 0.5, 0.01])
def test_a_share_of_the_records_is_that_of_stock_lm_eval(
    tiny: Tiny, tmp_path: Path, include_path: str, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    lm, task = tiny(), our_task(include_path, tmp_path, "hellaswag", limit=share)
    found = run_task(PrefixedModel(lm, Prefix.empty(), 2), task, share)
    stock = stock_task(include_path, monkeypatch, "hellaswag")
    assert_as_stock(found, stock_run(include_path, plain(lm, 2), stock, share), "hellaswag")
    count = math.ceil(share * len(RECORDS["hellaswag"]))
    assert found[1] == count < len(RECORDS["hellaswag"])
    assert task.identity == our_task(include_path, tmp_path, "hellaswag", limit=count).identity


@pytest.mark.parametrize("name", ["hellaswag", "lambada_openai", "tiny_generation"])
def test_the_largest_batch_is_found_as_by_stock_lm_eval_and_changes_no_result(
    tiny: Tiny, tmp_path: Path, include_path: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Of a memory that holds five rows, five are used: what does not fit is tried again with fewer."""
    lm, task = tiny(), our_task(include_path, tmp_path, name)
    seen: list[int] = []

    def with_little_memory(model: Any, inputs: Any, options: Any) -> None:
        rows = (options.get("input_ids") if not inputs else inputs[0]).shape[0]
        if rows > 5:
            raise RuntimeError("CUDA out of memory. Tried to allocate 5 rows")
        seen.append(rows)

    monkeypatch.setattr(gc, "collect", lambda *_: 0)  # after every batch that does not fit, and there are dozens
    handle = lm.model.register_forward_pre_hook(with_little_memory, with_kwargs=True)
    found = run_task(PrefixedModel(lm, Prefix.empty(), "auto"), task, None)
    assert max(seen) == 5
    task_of_theirs = stock_task(include_path, monkeypatch, name)
    assert_as_stock(found, stock_run(include_path, plain(lm, "auto"), task_of_theirs), name)
    prefixed = run_task(PrefixedModel(lm, behind(lm), "auto"), task, None)
    handle.remove()
    assert plain_json(prefixed) == plain_json(run_task(PrefixedModel(lm, behind(lm), 5), task, None))


@pytest.mark.parametrize("adds", [False, True], ids=["tokenizer without BOS", "tokenizer with BOS"])
@pytest.mark.parametrize("bos", [False, True])
def test_bos_goes_before_contexts_once_where_it_is_asked_for(tiny: Tiny, adds: bool, bos: bool) -> None:
    """As lm-eval scores with a tokenizer that does the same by itself."""
    lm = tiny()
    lm.tokenizer.add_bos_token = adds
    assert lm.adds_bos == adds
    alike = copy.deepcopy(lm.tokenizer)
    alike.add_bos_token = bos
    requests = asked("loglikelihood", *CONTEXTS)
    model, stock = PrefixedModel(lm, Prefix.empty(), 2, bos), HFLM(pretrained=lm.model, tokenizer=alike, batch_size=2)
    assert model.loglikelihood(requests) == stock.loglikelihood(requests)
    assert model.tok_encode("ab") == [*[256] * bos, *lm.encode("ab").tolist()]
    assert model.tok_batch_encode(["ab"])[0].tolist() == [model.tok_encode("ab")]
    assert lm.adds_bos == adds, "the model's own tokenizer stays as it is"


def test_the_models_own_tokenizer_stays_as_it_is(tiny: Tiny) -> None:
    lm = tiny()
    lm.tokenizer.pad_token = None
    before = (lm.tokenizer.padding_side, lm.tokenizer.pad_token, len(lm.tokenizer))
    model = PrefixedModel(lm, behind(lm), 4)
    generate(model, ["a", "bcd"])
    assert (lm.tokenizer.padding_side, lm.tokenizer.pad_token, len(lm.tokenizer)) == before


def test_a_task_leaves_the_generators_and_the_environment_as_they_were(
    tiny: Tiny, tmp_path: Path, include_path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lm, task = tiny(), our_task(include_path, tmp_path, "lambada_openai")
    torch.manual_seed(99)
    before = torch.get_rng_state()
    for value in (None, "0"):
        if value is None:
            monkeypatch.delenv("DISABLE_MULTIPROC", raising=False)
        else:
            monkeypatch.setenv("DISABLE_MULTIPROC", value)
        random.seed(value)
        run_task(PrefixedModel(lm, Prefix.empty(), 2), task, None)
        assert os.environ.get("DISABLE_MULTIPROC") == value
    assert torch.equal(torch.get_rng_state(), before)
    assert capsys.readouterr().out == ""


def test_a_task_is_the_same_whatever_was_drawn_before(tiny: Tiny, tmp_path: Path, include_path: str) -> None:
    lm, task = tiny(), our_task(include_path, tmp_path, "lambada_openai")
    found = []
    for seed in (1, 2):
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        found.append(run_task(PrefixedModel(lm, behind(lm), 2), task, None))
    assert plain_json(found[0]) == plain_json(found[1])
    assert found[0][0]["perplexity"]["stderr"] is not None


# ---- a prefix of tokens: the text glued before each context ---------------------------------------------------------


@pytest.mark.parametrize(("family", "batch_size"), ONE_AND_MANY)
def test_log_likelihoods_are_those_of_the_glued_text(tiny: Tiny, family: str, batch_size: int) -> None:
    lm = tiny(family)
    found = PrefixedModel(lm, behind(lm), batch_size).loglikelihood(asked("loglikelihood", *CONTEXTS))
    glued = [(GLUE + context, continuation) for context, continuation in CONTEXTS]
    expected = plain(lm, 1).loglikelihood(asked("loglikelihood", *glued))
    bare = plain(lm, 1).loglikelihood(asked("loglikelihood", *CONTEXTS))
    for (value, greedy), (wanted, wanted_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(wanted, abs=1e-4)
        assert greedy == wanted_greedy
    effects = [abs(value - without) for (value, _), (without, _) in zip(found, bare, strict=True)]
    assert min(effects) > 0, "the prefix is not without effect"
    assert max(effects) > 0.1


@torch.no_grad()
def log_likelihood(lm: LanguageModel, context: list[int], continuation: list[int]) -> float:
    """Summed log-probability of `continuation` after `context`, by the plain model."""
    logits = lm.model(input_ids=torch.tensor([context + continuation]), use_cache=False).logits[0]
    chosen = torch.log_softmax(logits.double(), dim=-1)[len(context) - 1 : -1]
    return float(chosen.gather(1, torch.tensor(continuation)[:, None]).sum())


@pytest.mark.parametrize(("family", "batch_size"), ONE_AND_MANY)
def test_an_empty_context_is_bos_behind_the_prefix(tiny: Tiny, family: str, batch_size: int) -> None:
    lm = tiny(family)
    texts = ["abc", "something longer than that", "x"]
    found = PrefixedModel(lm, behind(lm), batch_size).loglikelihood(asked("loglikelihood", *(("", t) for t in texts)))
    prompt = lm.encode(GLUE).tolist()
    for (value, _), text in zip(found, texts, strict=True):
        assert value == pytest.approx(log_likelihood(lm, [*prompt, 256], lm.encode(text).tolist()), abs=1e-4)


@pytest.mark.parametrize(("family", "batch_size"), ONE_AND_MANY)
def test_rolling_log_likelihoods_are_those_of_the_text_behind_prefix_and_bos(
    tiny: Tiny, family: str, batch_size: int
) -> None:
    lm = tiny(family)
    texts = ["short", "a text of some length, with caf\u00e9 and\nlines in it", "z" * 90]
    rolling = asked("loglikelihood_rolling", *((text,) for text in texts))
    found = PrefixedModel(lm, behind(lm), batch_size).loglikelihood_rolling(rolling)
    prompt = lm.encode(GLUE).tolist()
    for value, text in zip(found, texts, strict=True):
        assert value == pytest.approx(log_likelihood(lm, [*prompt, 256], lm.encode(text).tolist()), abs=1e-4)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_every_window_of_a_long_text_stands_behind_the_prefix(tiny: Tiny, batch_size: int) -> None:
    """The first window holds as many tokens as fit; the second predicts the rest, with as much context as fits."""
    lm = tiny()
    text = " ".join(str(number) for number in range(110))
    prompt, tokens = lm.encode(GLUE).tolist(), lm.encode(text).tolist()
    room = 256 - len(prompt)
    assert room < len(tokens) < 2 * room
    rest = len(tokens) - room
    first = log_likelihood(lm, [*prompt, 256], tokens[:room])
    second = log_likelihood(lm, [*prompt, *tokens[len(tokens) - room - 1 : -rest]], tokens[-rest:])
    model = PrefixedModel(lm, behind(lm), batch_size)
    (found,) = model.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))
    assert found == pytest.approx(first + second, abs=1e-3)


def generate(model: HFLM, contexts: list[str], **options: Any) -> list[str]:
    options = {"until": ["\n\n"], "max_gen_toks": 10, **options}
    return model.generate_until(asked("generate_until", *((context, options) for context in contexts)))


PROMPTS = ["a", "a rather longer context", "mid sized", "Q: one and\nA:", "zz", "y" * 40, "b", "caf\u00e9", "the ninth"]


@pytest.mark.parametrize(("family", "batch_size"), QUICK)
def test_a_greedy_continuation_is_that_of_the_glued_text(tiny: Tiny, family: str, batch_size: int) -> None:
    lm = tiny(family)
    found = generate(PrefixedModel(lm, behind(lm), batch_size), PROMPTS)
    assert found == generate(plain(lm, 1), [GLUE + prompt for prompt in PROMPTS])
    assert found == generate(plain(lm, batch_size), [GLUE + prompt for prompt in PROMPTS])
    assert found != generate(plain(lm, 1), PROMPTS), "the prefix is not without effect"
    assert len(set(found)) > 3
    assert all(len(text) <= 10 for text in found)


@pytest.mark.parametrize(("family", "batch_size"), QUICK)
def test_a_continuation_of_tuned_keys_is_that_of_a_plain_greedy_loop(tiny: Tiny, family: str, batch_size: int) -> None:
    """Keys and values of no text at all, so that nothing but the cache can bring them in."""
    lm, found = tiny(family), behind(tiny(family))
    values = tuple(value.flip(1) * 3 for value in found.values)
    tuned = Prefix(found.token_ids, found.keys, values, True)
    expected = []
    for prompt in PROMPTS:
        cache, tokens, produced = tuned.cache(lm.model), lm.encode(prompt), []
        with torch.no_grad():
            for _ in range(10):
                logits = lm.model(input_ids=tokens[None], past_key_values=cache, use_cache=True).logits[0, -1]
                tokens = logits.argmax()[None]
                produced.append(int(tokens))
                if produced[-1] == 257:  # the end of the text
                    break
        expected.append(lm.tokenizer.decode(produced, skip_special_tokens=True).split("\n\n")[0])
    continued = [text.split("</s>")[0] for text in expected]
    assert generate(PrefixedModel(lm, tuned, batch_size), PROMPTS) == continued
    assert continued != generate(PrefixedModel(lm, found, 1), PROMPTS)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_a_stop_text_in_the_prefix_stops_nothing(tiny: Tiny, batch_size: int) -> None:
    lm = tiny()
    unstopped = generate(plain(lm), ["Ab: one", "Ab: twenty"])
    stop = unstopped[0][3]
    expected = generate(plain(lm), ["Ab: one", "Ab: twenty"], until=[stop])
    assert expected[0] == unstopped[0].split(stop)[0] != unstopped[0]
    glued = stop * 3 + GLUE
    found = generate(PrefixedModel(lm, behind(lm, glued), batch_size), ["one", "twenty"], until=[stop])
    assert found == generate(plain(lm), [glued + "one", glued + "twenty"], until=[stop])
    assert generate(PrefixedModel(lm, behind(lm), batch_size), ["one", "twenty"], until=[stop]) == expected


@pytest.mark.parametrize(
    ("name", "batch_size"), [("hellaswag", 8), ("lambada_openai", 8), ("tiny_generation", 8), ("tiny_generation", 1)]
)
def test_a_whole_task_behind_a_prefix_is_that_of_glued_contexts(
    tiny: Tiny, tmp_path: Path, include_path: str, monkeypatch: pytest.MonkeyPatch, name: str, batch_size: int
) -> None:
    lm, task = tiny(), our_task(include_path, tmp_path, name)
    metrics, _, samples = run_task(PrefixedModel(lm, behind(lm), batch_size), task, None)
    stock = stock_task(include_path, monkeypatch, name)
    stock.config.description = GLUE  # lm-eval puts it before every context
    theirs = stock_run(include_path, plain(lm, 1), stock)
    assert [sample["arguments"][0][0] for sample in theirs["samples"][name]] == [
        GLUE + sample["arguments"][0][0] for sample in samples
    ]
    for ours, other in zip(samples, theirs["samples"][name], strict=True):
        for one, two in zip(ours["resps"], other["resps"], strict=True):
            if name == "tiny_generation":
                assert one == two
            else:
                assert one[0][0] == pytest.approx(two[0][0], abs=1e-4)
                assert one[0][1] == two[0][1]
    for metric in metrics:
        key = metric if "," in metric else f"{metric},none"
        assert metrics[metric]["value"] == pytest.approx(theirs["results"][name][key], rel=1e-3)


# ---- the room behind the prefix -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "longest"), [("llama", 256), ("opt", 256), ("bloom", 2048)])
def test_the_context_is_shorter_by_the_prefix(tiny: Tiny, family: str, longest: int) -> None:
    lm = tiny(family)
    assert PrefixedModel(lm, Prefix.empty(), 1).max_length == plain(lm).max_length == longest
    assert PrefixedModel(lm, behind(lm), 1).max_length == longest - len(GLUE)


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_long_context_is_cut_on_the_left_to_what_fits(tiny: Tiny, family: str, batch_size: int) -> None:
    lm = tiny(family)
    prompt, room = lm.encode(GLUE).tolist(), 256 - len(GLUE)
    context = " ".join(str(number) for number in range(200))
    assert len(context) > 2 * room
    requests = [(context, " end"), (context, " a longer end"), (context[: room - 5], "exact"), ("short", " one")]
    found = PrefixedModel(lm, behind(lm), batch_size).loglikelihood(asked("loglikelihood", *requests))
    for (value, _), (before, after) in zip(found, requests, strict=True):
        tokens, ending = lm.encode(before).tolist(), lm.encode(after).tolist()
        kept = tokens[-(room + 1 - len(ending)) :]  # the last token of the ending is predicted, and never an input
        assert len(prompt) + len(kept) + len(ending) - 1 <= 256
        expected = log_likelihood_of_last(lm, [*prompt, *kept], ending)
        assert value == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def log_likelihood_of_last(lm: LanguageModel, context: list[int], continuation: list[int]) -> float:
    """The same as `log_likelihood`, without the last token among the inputs, for which there may be no position."""
    logits = lm.model(input_ids=torch.tensor([context + continuation[:-1]]), use_cache=False).logits[0]
    chosen = torch.log_softmax(logits.double(), dim=-1)[len(context) - 1 :]
    return float(chosen.gather(1, torch.tensor(continuation)[:, None]).sum())


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_long_context_leaves_room_for_what_is_generated(tiny: Tiny, family: str, batch_size: int) -> None:
    lm = tiny(family)
    context = " ".join(str(number) for number in range(200))
    kept = context[-(256 - len(GLUE) - 10) :]
    (found,) = generate(PrefixedModel(lm, behind(lm), batch_size), [context])
    assert found == generate(plain(lm), [GLUE + kept])[0]
    assert len(GLUE + kept) + 10 == 256


@pytest.mark.parametrize("batch_size", [1, 8])
def test_requests_that_lose_part_of_their_context_are_counted(
    tiny: Tiny, batch_size: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Against lm-eval's own warnings, of which there is one for each log-likelihood that is cut."""
    lm = tiny()
    model, room = PrefixedModel(lm, behind(lm), batch_size), 256 - len(GLUE)
    contexts = ["q" * length for length in (3, room - 5, room - 4, room - 3, room - 2, room + 90)]
    model.loglikelihood(asked("loglikelihood", *((context, " end") for context in contexts)))
    assert [len(context) + len(" end") - 1 > room for context in contexts] == [False, False, False, False, True, True]
    assert model.truncated == 2
    assert sum("Truncating" in record.message for record in caplog.records) == 2
    model.truncated = 0
    model.loglikelihood_rolling(asked("loglikelihood_rolling", ("q" * 600,)))  # every token is predicted, in windows
    assert model.truncated == 0
    generate(model, ["q" * length for length in (3, room - 11, room - 10, room - 9, room + 50)])
    assert model.truncated == 2


def test_the_count_of_requests_that_were_cut_is_that_of_one_task(tiny: Tiny, tmp_path: Path, include_path: str) -> None:
    lm = tiny()
    model = PrefixedModel(lm, Prefix.from_tokens(lm.model, [65] * 200), 8)
    for name, expected in (("hellaswag", 8), ("copa", 0)):  # of twelve and six requests
        task = our_task(include_path, tmp_path, name)
        run_task(model, task, None)
        lengths = [len("".join(request.args).encode()) for request in task.task.instances]
        assert model.truncated == sum(length - 1 > 256 - 200 for length in lengths) == expected


def test_an_answer_that_does_not_fit_behind_the_prefix_is_refused(
    tiny: Tiny, tmp_path: Path, include_path: str
) -> None:
    lm = tiny()
    model = PrefixedModel(lm, Prefix.from_tokens(lm.model, [65] * 250), 8)
    with pytest.raises(ConfigError, match=r"an answer of \d+ tokens.*prefix of 250 tokens leaves room for 6: shorten"):
        run_task(model, our_task(include_path, tmp_path, "hellaswag"), None)


# ---- quantized models go the same way -------------------------------------------------------------------------------


@pytest.mark.parametrize("quantizer", [STATIC, DYNAMIC, PER_TOKEN], ids=lambda quantizer: quantizer.name)
@pytest.mark.parametrize("name", ["copa", "lambada_openai", "tiny_generation"])
def test_a_quantized_model_is_asked_as_stock_lm_eval_asks_it(
    tiny: Tiny,
    tmp_path: Path,
    include_path: str,
    monkeypatch: pytest.MonkeyPatch,
    quantizer: QuantizerConfig,
    name: str,
) -> None:
    lm, task = tiny(), our_task(include_path, tmp_path, name)
    before = snapshot(lm)
    batch_size = 1 if quantizer is DYNAMIC else 3
    ranges = ranges_of(lm, Prefix.empty()) if quantizer.needs_calibration else None
    model = PrefixedModel(lm, Prefix.empty(), batch_size)
    full = run_task(model, task, None)
    stock = plain(lm, batch_size)
    with quantized(lm, quantizer, ranges):
        found = run_task(model, task, None)
        theirs = stock_run(include_path, stock, stock_task(include_path, monkeypatch, name))
    assert_as_stock(found, theirs, name)
    if name != "tiny_generation":
        assert [sample["resps"] for sample in found[2]] != [sample["resps"] for sample in full[2]]
    assert_untouched(lm, before)
    assert plain_json(run_task(model, task, None)) == plain_json(full)


def test_a_prefix_is_no_part_of_a_dynamic_range(tiny: Tiny) -> None:
    """Its keys and values come from the full-precision model, and its tokens never reach a quantized linear."""
    lm = tiny()
    found, seen = behind(lm), []
    model = PrefixedModel(lm, found, 1)
    with quantized(lm, DYNAMIC):
        hooks = [
            module.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[1]))
            for module in lm.blocks.modules()
            if type(module).__name__ == "QuantizedLinear"
        ]
        model.loglikelihood(asked("loglikelihood", ("abcdef", "gh")))
        assert set(seen) == {7}
        del seen[:]
        generate(model, ["abcdef"], max_gen_toks=3)
        assert seen[0] == 6
        assert set(seen) == {6, 1}
        for hook in hooks:
            hook.remove()


# ---- which accuracy, and means --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "accuracy", "expected"),
    [
        (["acc", "acc_norm"], "acc", "acc"),
        (["acc_norm", "acc"], "acc", "acc"),
        (["acc", "acc_norm"], "acc_norm", "acc_norm"),
        (["acc"], "acc_norm", "acc"),
        (["perplexity", "acc"], "acc", "acc"),
        (["exact_match,strict-match", "exact_match,flexible-extract"], "acc", "exact_match,strict-match"),
        (["exact_match,strict-match"], "acc_norm", "exact_match,strict-match"),
        (["exact_match", "acc"], "acc", "acc"),
        (["acc_norm"], "acc", None),
        (["word_perplexity", "byte_perplexity"], "acc", None),
        (["accuracy_of_something"], "acc", None),
        ([], "acc", None),
    ],
)
def test_the_metric_that_enters_the_mean(metrics: list[str], accuracy: str, expected: str | None) -> None:
    assert main_metric(metrics, accuracy) == expected


def test_a_score_carries_its_metric_and_all_others() -> None:
    metrics = {"acc": {"value": 0.25, "stderr": 0.1}, "acc_norm": {"value": 0.5, "stderr": None}}
    assert score(metrics, 8, "1.0", "acc") == TaskScore("acc", 0.25, 0.1, 8, "1.0", metrics)
    assert score(metrics, 8, "1.0", "acc_norm") == TaskScore("acc_norm", 0.5, None, 8, "1.0", metrics)
    words = {"word_perplexity": {"value": 12.0, "stderr": 1.0}}
    assert score(words, 3, "2", "acc") == TaskScore(None, None, None, 3, "2", words)


def test_a_metric_has_values_by_record_where_it_is_their_mean() -> None:
    """Of each filter its own samples; what is aggregated otherwise, or holds what is not a number, has none."""
    samples = [
        {"filter": name, "acc": float(right), "odd": float(right), "pair": (1.0, 2.0)}
        for name, of in (("none", (1, 0, 0)), ("strict", (1, 1, 0)))
        for right in of
    ]
    means = {"acc": 1 / 3, "acc,strict": 2 / 3, "odd": 0.9, "pair": 1.0, "absent": 0.5}
    metrics: dict[str, Metric] = {name: {"value": value, "stderr": None} for name, value in means.items()}
    assert record_values(metrics, samples) == {"acc": [1.0, 0.0, 0.0], "acc,strict": [1.0, 1.0, 0.0]}


@pytest.mark.parametrize("weighted", [True, False])
def test_shares_of_a_group_give_its_score(weighted: bool) -> None:
    scores = accuracies((0.5, 0.1, 100), (0.8, 0.1, 10), (0.2, 0.1, 30))
    group = TaskGroup("group", ("task0", "task1"), weighted)
    tasks = TaskSet(("group", "task2"), {name: EvaluationTask(name, None, "", "") for name in scores}, {"group": group})
    found = group_score(group, scores)
    assert found is not None
    shares = shares_of(tasks, {**scores, "group": found})
    assert shares["task2"] == {"task2": 1.0}
    assert sum(share * (scores[name].value or 0) for name, share in shares["group"].items()) == pytest.approx(
        found.value
    )
    assert "group" not in shares_of(tasks, scores), "a group without a score"


def test_the_first_filter_of_a_generation_is_its_score(tiny: Tiny, tmp_path: Path, include_path: str) -> None:
    metrics, count, _ = run_task(
        PrefixedModel(tiny(), Prefix.empty(), 2), our_task(include_path, tmp_path, "tiny_generation"), 3
    )
    assert set(metrics) == {"exact_match,strict-match", "exact_match,whole"}
    assert score(metrics, count, "3", "acc").metric == "exact_match,strict-match"
    assert count == 3


def accuracies(*values: tuple[float | None, float | None, int]) -> dict[str, TaskScore]:
    return {
        f"task{number}": TaskScore(None if value is None else "acc", value, stderr, samples, "1", {})
        for number, (value, stderr, samples) in enumerate(values)
    }


def test_the_mean_of_tasks_weighs_them_alike() -> None:
    found = mean_accuracy(accuracies((0.5, 0.03, 100), (0.8, 0.04, 10), (None, None, 7)))
    assert found is not None
    assert found == (pytest.approx(0.65), pytest.approx(0.025))
    assert mean_accuracy(accuracies((0.5, 0.03, 100), (0.8, None, 10))) == (pytest.approx(0.65), None)
    assert mean_accuracy(accuracies((0.0, 0.0, 5))) == (0.0, 0.0)
    assert mean_accuracy(accuracies((None, None, 7))) is None
    assert mean_accuracy({}) is None


def test_the_standard_error_of_a_mean_is_the_spread_of_means_of_draws() -> None:
    """Against a simulation: seven tasks with their own accuracy and number of records, drawn over and over."""
    generator = numpy.random.default_rng(0)
    truth, sizes = generator.uniform(0.2, 0.9, 7), generator.integers(50, 400, 7)
    draws = generator.binomial(sizes, truth, (20000, 7)) / sizes
    errors = [math.sqrt(p * (1 - p) / n) for p, n in zip(truth, sizes, strict=True)]
    alike = accuracies(*((float(p), e, int(n)) for p, e, n in zip(truth, errors, sizes, strict=True)))
    found = mean_accuracy(alike)
    assert found is not None
    assert found[1] == pytest.approx(draws.mean(1).std(), rel=0.03)
    weighted = group_score(TaskGroup("group", tuple(alike), True), alike)
    assert weighted is not None
    assert weighted.stderr == pytest.approx((draws @ sizes / sizes.sum()).std(), rel=0.03)


@pytest.mark.parametrize(("weighted", "value", "stderr"), [(True, 0.53, 0.0275136), (False, 0.65, 0.025)])
def test_the_score_of_a_group(weighted: bool, value: float, stderr: float) -> None:
    scores = accuracies((0.5, 0.03, 90), (0.8, 0.04, 10), (0.1, 0.2, 50))
    found = group_score(TaskGroup("group", ("task0", "task1"), weighted), scores)
    assert found is not None
    assert found.value == pytest.approx(value)
    pooled = math.sqrt(
        (89 * 90 * 0.03**2 + 9 * 10 * 0.04**2) / (100 - 2) / 100
    )  # the variance within tasks, as lm-eval
    by_hand = pooled if weighted else math.hypot(0.03, 0.04) / 2
    assert found.stderr == pytest.approx(by_hand)
    assert by_hand == pytest.approx(stderr, rel=1e-2)
    assert (found.metric, found.samples, found.version) == ("acc", 100, "1")
    assert found.metrics == {"acc": {"value": found.value, "stderr": found.stderr}}


def test_the_value_of_a_weighted_group_is_that_of_all_its_records() -> None:
    right = {"task0": [1, 0, 1, 1, 0], "task1": [0, 1]}
    scores = {
        name: TaskScore("acc", sum(found) / len(found), None, len(found), "1", {}) for name, found in right.items()
    }
    group = group_score(TaskGroup("group", ("task0", "task1"), True), scores)
    assert group is not None
    assert group.value == pytest.approx(4 / 7)
    assert group.stderr is None


def test_a_group_counts_what_was_cut_in_any_of_its_tasks() -> None:
    scores = accuracies((0.5, 0.03, 90), (0.8, 0.04, 10))
    scores = {name: replace(found, truncated=3 + number) for number, (name, found) in enumerate(scores.items())}
    found = group_score(TaskGroup("group", tuple(scores), True), scores)
    assert found is not None
    assert found.truncated == 7


def test_a_group_without_accuracy_has_no_score() -> None:
    scores = accuracies((0.5, 0.03, 90), (None, None, 10))
    assert group_score(TaskGroup("group", ("task0", "task1"), True), scores) is None


def test_groups_of_a_run_are_those_of_stock_lm_eval(
    tiny: Tiny, tmp_path: Path, include_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`mmlu_stem` is weighed by the number of records, as lm-eval's group of that name."""
    lm = tiny()
    config = EvalConfig(tasks=["mmlu_abstract_algebra", "mmlu_anatomy"], include_path=include_path)
    members = load_tasks(config, write_sets(tmp_path, "mmlu")).tasks
    model = PrefixedModel(lm, Prefix.empty(), 2)
    scores = {}
    right: list[float] = []
    for name, task in members.items():
        metrics, count, samples = run_task(model, task, None)
        scores[name] = score(metrics, count, str(task.task.VERSION), "acc")
        right += [sample["acc"] for sample in samples]
    group = group_score(TaskGroup("both", tuple(members), True), scores)
    assert group is not None
    assert group.value == pytest.approx(sum(right) / len(right))
    assert (group.samples, len(right)) == (5, 5)


def test_a_file_of_the_users_is_written_back_nowhere(tmp_path: Path, include_path: str) -> None:
    """Loading and asking a task leaves the data folder as it was: no cache beside the records."""
    write_lines(tmp_path / FILES["hellaswag"], RECORDS["hellaswag"])
    before = sorted(path for path in tmp_path.rglob("*"))
    task = our_task(include_path, tmp_path, "hellaswag")
    task.task.build_all_requests(limit=None, rank=0, world_size=1)
    assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.parametrize("family", [*PADDED, "mistral", "gemma2"])
def test_beams_go_on_from_the_prefix_as_from_its_text(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    prompts = ["ab", "cd"] if family in PADDED else ["ab"]
    glued = [GLUE + prompt for prompt in prompts]
    beams: dict[str, Any] = {"num_beams": 3, "max_gen_toks": 5, "until": ["no such text"]}
    assert generate(PrefixedModel(lm, behind(lm), 2), prompts, **beams) == generate(plain(lm, 2), glued, **beams)


def test_several_sequences_are_returned_behind_the_prefix(tiny: Tiny) -> None:
    lm = tiny("llama")
    prefix, inputs = behind(lm), {"input_ids": lm.encode("one")[None]}
    options: dict[str, Any] = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 4, "do_sample": False}
    whole = prefix.prepend(inputs)
    expected = lm.model.generate(**whole, **options)
    with prefix.kept(lm.model):
        found = lm.model.generate(**whole, past_key_values=prefix.cache(lm.model), **options)
    assert torch.equal(found, expected)
    with pytest.raises(ConfigError, match=r"num_return_sequences=2.*`repeats`"):
        generate(PrefixedModel(lm, prefix, 1), ["one"], num_return_sequences=2, num_beams=2)


@pytest.mark.parametrize("family", SLIDING)
def test_windows_count_no_padding_between_prefix_and_text(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    prompts = ["a", "bcdefg", "hij", "klm"]
    model = PrefixedModel(lm, behind(lm), 4)
    options: dict[str, Any] = {"max_gen_toks": 4, "until": ["no such text"]}
    expected = [generate(plain(lm), [GLUE + prompt], **options)[0] for prompt in prompts]
    assert [generate(model, [prompt], **options)[0] for prompt in prompts] == expected
    assert generate(model, prompts, **options) == expected


def test_a_prefix_that_the_library_drops_on_the_way_is_missed(tiny: Tiny) -> None:
    lm = tiny("phi3")
    lm.model.config.original_max_position_embeddings = 16
    model = PrefixedModel(lm, behind(lm), 1)
    generate(model, ["one"], max_gen_toks=4, until=["no such text"])
    for context, tokens in (("one", 20), ("a context beyond sixteen", 2)):
        with pytest.raises(ConfigError, match=r"'phi3' dropped the cache .* prefix of 4 tokens .*embeddings=16"):
            generate(model, [context], max_gen_toks=tokens, until=["no such text"])
    lm.model(input_ids=lm.encode("free again")[None])


def test_a_task_on_whose_way_the_library_drops_the_prefix_is_refused_before_it_is_asked(
    tiny: Tiny, tmp_path: Path, include_path: str
) -> None:
    """Where the longest context, behind the prefix and with its answer, would be dropped, and only there."""
    lm = tiny("phi3")
    config = EvalConfig(tasks=["tiny_generation"], include_path=include_path)
    task = our_task(include_path, tmp_path, "tiny_generation")
    tasks = TaskSet(("tiny_generation",), {"tiny_generation": task}, {})
    longest = max(len(lm.encode(task.task.doc_to_text(record))) for record in task.task.eval_docs)
    grown = 4 + longest + task.task.config.generation_kwargs["max_gen_toks"] - 1
    for limit in (grown, grown - 1, 256):
        lm.model.config.original_max_position_embeddings = limit
        if limit == grown - 1:
            with pytest.raises(ConfigError, match=rf"=tiny_generation may grow to {grown} tokens.*embeddings={limit}"):
                check_tasks(lm, config, tasks, STATIC, 4)
            check_tasks(lm, config, tasks, STATIC, 3)
            check_tasks(lm, config, tasks, STATIC, 0)
        else:
            check_tasks(lm, config, tasks, STATIC, 4)


def test_a_task_that_asks_for_assisted_generation_is_refused_behind_a_prefix(
    tiny: Tiny, tmp_path: Path, include_path: str
) -> None:
    lm, task = tiny("llama"), our_task(include_path, tmp_path, "tiny_generation")
    config, tasks = EvalConfig(tasks=["tiny_generation"]), TaskSet(("tiny_generation",), {"tiny_generation": task}, {})
    check_tasks(lm, config, tasks, STATIC, 4)
    task.task.config.generation_kwargs["prompt_lookup_num_tokens"] = 3
    check_tasks(lm, config, tasks, STATIC, 0)
    with pytest.raises(ConfigError, match=r"=tiny_generation asks .*\(prompt_lookup_num_tokens=3 in .*search=none"):
        check_tasks(lm, config, tasks, STATIC, 4)


def test_tokens_without_an_embedding_are_named(tiny: Tiny) -> None:
    lm = tiny("llama")
    lm.tokenizer.add_tokens(["<new>"])
    rows = lm.embeddings.shape[0]
    told = rf"'<new>' with the id {rows}, .* {rows} rows .*resize_token_embeddings"
    with pytest.raises(UnsupportedModelError, match=told):
        lm.encode("a <new> token")
    model = PrefixedModel(lm, behind(lm), 1)
    with pytest.raises(UnsupportedModelError, match=told):
        model.loglikelihood(asked("loglikelihood", ("a <new>", " b")))
    with pytest.raises(UnsupportedModelError, match=told):
        generate(model, ["a <new>"])
    lm.tokenizer.pad_token = "<new>"
    with pytest.raises(UnsupportedModelError, match=told):
        PrefixedModel(lm, behind(lm), 1)
    assert lm.encode("a token").tolist(), "other texts go on"
