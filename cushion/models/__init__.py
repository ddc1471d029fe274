"""Loading language models, and the architecture table that says where their parts are."""

from cushion.models.language_model import LanguageModel, check_model, load_language_model

__all__ = ["LanguageModel", "check_model", "load_language_model"]
