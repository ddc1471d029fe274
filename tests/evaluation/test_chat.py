"""Tasks as chats: the prompts and numbers of stock lm-eval, one BOS, and refusals before anything runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.huggingface import HFLM
from test_harness import asked, assert_as_stock, behind, our_task, plain, quick_stock_runs, stock_task
from tiny_tasks import STATIC

from cushion.config import EvalConfig
from cushion.errors import ConfigError
from cushion.evaluation import tasks as tasks_module
from cushion.evaluation.chat import Chat, chat_of, chat_warnings
from cushion.evaluation.harness import BOOTSTRAP, PrefixedModel, evaluator, run_task
from cushion.evaluation.task_checks import check_tasks
from cushion.evaluation.tasks import EvaluationTask, TaskSet
from cushion.models import LanguageModel
from cushion.prefix import Prefix

Tiny = Callable[..., LanguageModel]
PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
LED = "{{ bos_token }}" + PLAIN
WITHOUT_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + PLAIN
SILENT = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
__all__ = ["quick_stock_runs"]  # the fixture of the stock runs holds here too


def chatting(lm: LanguageModel, template: str | dict[str, str] | None) -> LanguageModel:
    lm.tokenizer.chat_template = template  # type: ignore[assignment]
    return lm


def stock_chat(include_path: str, model: HFLM, task: Any, shots: int | None, system: str | None, turns: bool) -> Any:
    return evaluator.simple_evaluate(
        model=model,
        tasks=[task],
        num_fewshot=shots,
        bootstrap_iters=BOOTSTRAP,
        task_manager=tasks_module._task_manager(include_path),
        apply_chat_template=True,
        system_instruction=system,
        fewshot_as_multiturn=turns,
    )


@pytest.mark.parametrize(
    ("name", "template", "shots", "system", "turns"),
    [
        ("hellaswag", PLAIN, None, None, True),
        ("winogrande", LED, None, "Be terse.", True),
        ("tiny_generation", LED, None, "Be terse.", True),
        ("tiny_examples", PLAIN, 3, None, True),
        ("tiny_examples", PLAIN, 3, "Be terse.", False),
        ("mmlu_anatomy", WITHOUT_SYSTEM, 2, None, True),
    ],
)
def test_chats_are_those_of_stock_lm_eval(
    tiny: Tiny,
    tmp_path: Path,
    include_path: str,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    template: str,
    shots: int | None,
    system: str | None,
    turns: bool,
) -> None:
    lm = chatting(tiny(), template)
    options = {"chat_template": True, "system_instruction": system, "fewshot_as_multiturn": turns}
    chat = chat_of(lm, EvalConfig(tasks=[name], **options))  # type: ignore[arg-type]
    task = our_task(include_path, tmp_path, name, shots=shots)
    found = run_task(PrefixedModel(lm, Prefix.empty(), 2, chat=chat), task, None)
    theirs = stock_chat(include_path, plain(lm, 2), stock_task(include_path, monkeypatch, name), shots, system, turns)
    assert_as_stock(found, theirs, name)
    prompt = found[2][0]["arguments"][0][0]
    assert prompt.count("[assistant]") == 1 + (shots or 0) * turns
    assert prompt.count("Be terse.") == (system is not None)


@pytest.mark.parametrize("adds", [False, True], ids=["tokenizer without BOS", "tokenizer with BOS"])
@pytest.mark.parametrize("bos", [False, True])
def test_a_template_that_writes_bos_gets_no_second_one(tiny: Tiny, adds: bool, bos: bool) -> None:
    lm = chatting(tiny(), LED)
    lm.tokenizer.add_bos_token = adds
    model = PrefixedModel(lm, behind(lm), 2, bos, Chat(LED))
    prompt = model.apply_chat_template([{"role": "user", "content": "one"}])
    for tokens in (model.tok_encode(prompt), model.tok_batch_encode([prompt, prompt])[0][1].tolist()):
        assert tokens == [256, *lm.encode("[user]one\n[assistant]").tolist()]
    context, _ = model._encode_pair(prompt, "two")
    assert context.count(256) == 1
    assert model.loglikelihood(asked("loglikelihood", (prompt, "two"))) == PrefixedModel(
        lm, behind(lm), 2, True
    ).loglikelihood(asked("loglikelihood", ("[user]one\n[assistant]", "two")))


def test_a_name_picks_one_of_several_templates(tiny: Tiny) -> None:
    lm = chatting(tiny(), {"default": PLAIN, "led": LED})
    for name, template in ((True, PLAIN), ("led", LED)):
        chat = chat_of(lm, EvalConfig(tasks=["copa"], chat_template=name))
        assert chat.template == template
        written = PrefixedModel(lm, Prefix.empty(), 1, chat=chat).apply_chat_template(
            [{"role": "user", "content": "a"}]
        )
        assert written.startswith("<s>") == (name == "led")
    assert lm.tokenizer.chat_template == {"default": PLAIN, "led": LED}


@pytest.mark.parametrize(
    ("template", "options", "message"),
    [
        (None, {}, r"eval\.chat_template=true: .*has no chat template: .*eval\.chat_template=false"),
        (PLAIN, {"chat_template": "rag"}, r"eval\.chat_template=rag: .*one chat template, without a name"),
        ({"a": PLAIN, "b": LED}, {}, r"eval\.chat_template=true: .*called 'default': choose one of a, b"),
        ({"a": PLAIN}, {"chat_template": "c"}, r"eval\.chat_template=c: .*called 'c': choose one of a"),
        ("{{ raise_exception('no') }}", {}, r"eval\.chat_template=true: .*does not take a question \(no\)"),
        (WITHOUT_SYSTEM, {"system_instruction": "Hm."}, r"eval\.system_instruction: .*no system role"),
        (SILENT, {"system_instruction": "Hm."}, r"eval\.system_instruction: .*no system role"),
    ],
)
def test_a_chat_that_cannot_be_written_is_refused_before_anything_runs(
    tiny: Tiny, template: Any, options: dict[str, Any], message: str
) -> None:
    config = EvalConfig(**{"tasks": ["copa"], "chat_template": True, **options})
    with pytest.raises(ConfigError, match=message):
        check_tasks(chatting(tiny(), template), config, TaskSet((), {}, {}), STATIC, 0)


def test_the_key_of_a_task_has_what_a_template_writes(tiny: Tiny) -> None:
    lm = tiny()
    assert Chat().key(lm) == Chat(multiturn=False).key(lm)
    chats = [Chat(), Chat(PLAIN), Chat(PLAIN, "Be terse."), Chat(PLAIN, multiturn=False), Chat(LED), Chat(None, "x")]
    keys = [chat.key(lm) for chat in chats]
    assert all(keys.index(key) == number for number, key in enumerate(keys))
    lm.tokenizer.bos_token = "[user]"
    assert Chat(LED).key(lm) != keys[4], "the same source with another special token"


def test_what_a_template_leaves_out_or_adds_is_told(tiny: Tiny, tmp_path: Path, include_path: str) -> None:
    config = EvalConfig(tasks=["mmlu_anatomy"], chat_template=True)
    task = our_task(include_path, tmp_path, "mmlu_anatomy")
    tasks = TaskSet(("mmlu_anatomy",), {"mmlu_anatomy": task}, {})

    def told(template: str, bos: str = "tokenizer", among: TaskSet = tasks) -> list[str]:
        return chat_warnings(chatting(tiny(), template), config, among, bos)

    assert told(PLAIN) == told(LED) == told(PLAIN, "never") == []
    (found,) = told(WITHOUT_SYSTEM)
    assert "mmlu_anatomy go without the task's description" in found
    (found,) = told("{{ strftime_now('%d') }}" + PLAIN)
    assert "the date" in found
    (found,) = told(LED, "never")
    assert "begins with BOS" in found and "bos=never" in found
    assert told(WITHOUT_SYSTEM, among=TaskSet((), {}, {})) == []
    assert chat_warnings(tiny(), EvalConfig(tasks=["copa"]), tasks, "never") == []


def test_a_description_that_a_template_takes_is_in_the_prompt(tiny: Tiny, tmp_path: Path, include_path: str) -> None:
    lm = tiny()
    task: EvaluationTask = our_task(include_path, tmp_path, "mmlu_anatomy", shots=0)
    for template, stands in ((PLAIN, True), (WITHOUT_SYSTEM, False)):
        found = run_task(PrefixedModel(lm, behind(lm), 2, chat=Chat(template)), task, 1)
        assert (task.task.config.description.strip()[:20] in found[2][0]["arguments"][0][0]) == stands
