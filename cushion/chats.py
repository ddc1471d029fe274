"""Chats as text, by the chat template of a model's tokenizer."""

from __future__ import annotations

from jinja2 import TemplateError

from cushion.errors import DataError
from cushion.models import LanguageModel


def chat_text(lm: LanguageModel, messages: list[dict[str, str]], asks: bool = False) -> str:
    """A chat as its model was trained on it.

    Where the tokenizer puts BOS before a text by itself, one that the template writes is left out: whether texts begin
    with it is said by the key `bos`. Elsewhere it is a mark of the template's own, as SmolLM2's `<|im_start|>` is, and
    stays.

    Args:
        lm: its tokenizer has the template.
        messages: each with `role` and `content`.
        asks: let the text end where the model's answer begins.

    Raises:
        DataError: there is no template, or it does not take these messages.

    """
    tokenizer = lm.tokenizer
    if not tokenizer.chat_template:
        raise DataError(
            f"this is a chat, and the tokenizer of {lm.label} has no chat template: choose a model that was made for "
            "chats, or name a field of text in data.<purpose>.text_field"
        )
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks)
    except (TemplateError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DataError(f"the chat template of {lm.label} does not take these messages: {reason}") from error
    assert isinstance(text, str)
    return text.removeprefix(tokenizer.bos_token or "") if lm.adds_bos else text
