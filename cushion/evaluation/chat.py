"""How the prompts of tasks are written: as plain text, or as chats by the template of the model's tokenizer.

The prompts themselves are lm-eval's. Here is which template that is, what cannot be written with it, and what of it a
reader of the accuracies should know.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from cushion.config import EvalConfig
from cushion.errors import ConfigError
from cushion.evaluation.tasks import TaskSet
from cushion.hashing import digest
from cushion.models import LanguageModel

_USER = {"role": "user", "content": "question"}
_SYSTEM = {"role": "system", "content": "instruction"}


@dataclass(frozen=True)
class Chat:
    """How lm-eval writes the prompts of its tasks.

    Args:
        template: the Jinja source of the template; None for plain text.
        system: the system instruction, in front of the task's own description; also without a template.
        multiturn: whether, with a template, examples are turns of the chat of their own, not parts of one question.

    """

    template: str | None = None
    system: str | None = None
    multiturn: bool = True

    def key(self, lm: LanguageModel) -> dict[str, Any]:
        """Its part in the key of a task.

        A template may write what is not in its source, such as special tokens or the date, so a chat that is written
        with it counts too.
        """
        written = None if self.template is None else digest([self.template, _written(lm, self.template, [_USER])])
        multiturn = None if self.template is None else self.multiturn
        return {"chat_template": written, "system_instruction": self.system, "fewshot_as_multiturn": multiturn}


def chat_of(lm: LanguageModel, config: EvalConfig) -> Chat:
    """How the prompts of a run are written.

    Raises:
        ConfigError: the tokenizer has no such template, it does not take a question, or it leaves out the system
            instruction.

    """
    system = config.system_instruction
    if config.chat_template is False:
        return Chat(None, system, config.fewshot_as_multiturn)
    template = _template(lm, config.chat_template)
    try:
        _written(lm, template, [_USER])
    except (TemplateError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(
            f"{_asked(config)}: the chat template of {lm.label} does not take a question ({reason}): use "
            "eval.chat_template=false"
        ) from error
    if system and not _has_system_role(lm, template):
        raise ConfigError(
            f"eval.system_instruction: the chat template of {lm.label} has no system role, so the instruction would "
            "stand in no prompt: leave it out, or use eval.chat_template=false"
        )
    return Chat(template, system, config.fewshot_as_multiturn)


def writes_bos(lm: LanguageModel, config: EvalConfig) -> bool:
    """Whether the template begins every context of a task with BOS."""
    template, bos = chat_of(lm, config).template, lm.tokenizer.bos_token
    return template is not None and bool(bos) and _written(lm, template, [_USER]).startswith(str(bos))


def chat_warnings(lm: LanguageModel, config: EvalConfig, tasks: TaskSet, bos: str) -> list[str]:
    """What a reader of the accuracies should know of the template.

    Args:
        bos: the run's policy of BOS.

    """
    template = chat_of(lm, config).template
    if template is None:
        return []
    found = []
    described = [name for name, one in tasks.tasks.items() if one.task.get_config("description")]
    if described and not _has_system_role(lm, template):
        found.append(
            f"the chat template of {lm.label} has no system role: the prompts of {', '.join(described)} go without the "
            "task's description, as in lm-eval"
        )
    if "strftime_now" in template:
        found.append(
            f"the chat template of {lm.label} writes the date into every prompt: accuracies of another day are those "
            "of other prompts"
        )
    if bos == "never" and writes_bos(lm, config):
        found.append(
            f"the chat template of {lm.label} begins with BOS, which so stands before every context of a task, "
            "whatever bos=never says"
        )
    return found


def _asked(config: EvalConfig) -> str:
    return f"eval.chat_template={'true' if config.chat_template is True else config.chat_template}"


def _template(lm: LanguageModel, name: bool | str) -> str:
    """The source of the template of a name, or of the default one."""
    found = lm.tokenizer.chat_template
    if not found:
        raise ConfigError(
            f"eval.chat_template={'true' if name is True else name}: the tokenizer of {lm.label} has no chat template: "
            "choose a model that was made for chats, or use eval.chat_template=false"
        )
    if isinstance(found, str):
        if isinstance(name, str):
            raise ConfigError(
                f"eval.chat_template={name}: the tokenizer of {lm.label} has one chat template, without a name: use "
                "eval.chat_template=true"
            )
        return found
    wanted = "default" if name is True else name
    if wanted not in found:
        raise ConfigError(
            f"eval.chat_template={'true' if name is True else name}: the tokenizer of {lm.label} has no chat template "
            f"called {wanted!r}: choose one of {', '.join(sorted(found))}"
        )
    return str(found[wanted])


def _written(lm: LanguageModel, template: str, messages: list[dict[str, str]]) -> str:
    text = lm.tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    assert isinstance(text, str)
    return text


def _has_system_role(lm: LanguageModel, template: str) -> bool:
    """Whether a template writes a system message; some refuse one, and lm-eval then leaves it out."""
    try:
        return _SYSTEM["content"] in _written(lm, template, [_SYSTEM, _USER])
    except TemplateError:
        return False
