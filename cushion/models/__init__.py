"""Loading language models, and the architecture table that says where their parts are.

Its names are imported when they are used: plugins read the table without torch.
"""

from typing import TYPE_CHECKING

from cushion.registry import imported_when_used

if TYPE_CHECKING:
    from cushion.models.language_model import LanguageModel, check_model, load_language_model

__all__ = ["LanguageModel", "check_model", "load_language_model"]

_PLACES = {
    "LanguageModel": "cushion.models.language_model:LanguageModel",
    "check_model": "cushion.models.language_model:check_model",
    "load_language_model": "cushion.models.language_model:load_language_model",
}


__getattr__ = imported_when_used(__name__, _PLACES)
