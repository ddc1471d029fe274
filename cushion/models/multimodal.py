"""The text part of a multimodal checkpoint, loaded alone: no weight of the part that sees is read into memory.

Checkpoints on the hub keep the text part as `language_model.model...`, those that transformers saves as
`model.language_model...`; both are the causal language model's own names behind that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

_NAMES = {
    r"^(model\.)?language_model\.model\.": "model.",
    r"^(model\.)?language_model\.lm_head\.": "lm_head.",
    r"^model\.language_model\.": "model.",
}
"""What the tensors of a text part are called in a checkpoint, and what they are called in the model."""


def text_part_options(settings: PreTrainedConfig) -> dict[str, Any]:
    """What `from_pretrained` of a causal language model needs for the text part; nothing where that is all there is."""
    text = settings.get_text_config()
    if text is settings:
        return {}
    if hasattr(settings, "_commit_hash"):  # what comes from the hub: the text part is of the same commit
        text._commit_hash = settings._commit_hash
    text.tie_word_embeddings = settings.tie_word_embeddings  # the head is the whole model's
    return {"config": text, "key_mapping": _NAMES}


@contextmanager
def without_report() -> Iterator[None]:
    """Transformers lists the tensors of the part that sees as unexpected: not a word of it, within a `with` block."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
