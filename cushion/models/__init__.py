"""Loading language models, and the architecture table that says where their parts are.

Its names are imported when they are used: plugins read the table without torch.
"""

from typing import TYPE_CHECKING, Any

from cushion.registry import located

if TYPE_CHECKING:
    from cushion.models.language_model import LanguageModel, check_model, load_language_model

__all__ = ["LanguageModel", "check_model", "load_language_model"]

_PLACES = {
    "LanguageModel": "cushion.models.language_model:LanguageModel",
    "check_model": "cushion.models.language_model:check_model",
    "load_language_model": "cushion.models.language_model:load_language_model",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return located(_PLACES[name])
