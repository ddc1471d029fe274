"""Loading language models, and the architecture table that says where their parts are."""

from cushion.models.language_model import LanguageModel, load_language_model

__all__ = ["LanguageModel", "load_language_model"]
