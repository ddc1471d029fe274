"""Hydra that reads the same text once: the suite composes some hundred configurations from the same files.

What is kept is kept by the text itself, and each who asks gets a copy: a changed file is read as it is now.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import yaml
from hydra._internal.config_repository import CachingConfigRepository
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import _utils, base, grammar_parser


def install(patch: pytest.MonkeyPatch) -> None:
    """Have YAML texts, overrides and interpolations read once."""
    documents, rules, trees = dict[str, Any](), dict[Any, Any](), dict[Any, Any]()
    load, parse_rule, parse = yaml.load, OverridesParser.parse_rule, grammar_parser.parse
    loader = _utils.get_yaml_loader()

    def load_once(stream: Any, Loader: Any) -> Any:  # noqa: N803 - as `yaml.load` has it
        if Loader is not loader:
            return load(stream, Loader)
        text = stream if isinstance(stream, str) else stream.read()
        if text not in documents:
            documents[text] = load(text, Loader)
        return copy.deepcopy(documents[text])

    def parse_rule_once(self: OverridesParser, text: str, rule: str) -> Any:
        if (text, rule) not in rules:
            rules[text, rule] = parse_rule(self, text, rule)
        return copy.deepcopy(rules[text, rule])

    def parse_once(*given: Any) -> Any:
        if given not in trees:
            trees[given] = parse(*given)
        return trees[given]

    def share_sources(self: CachingConfigRepository, delegate: Any) -> None:
        self.delegate, self.cache = copy.copy(delegate), {}  # what it sets anew it does not share

    patch.setattr(_utils, "get_yaml_loader", lambda: loader)
    patch.setattr(yaml, "load", load_once)
    patch.setattr(OverridesParser, "parse_rule", parse_rule_once)
    for module in (base, _utils, grammar_parser):
        patch.setattr(module, "parse", parse_once)
    patch.setattr(CachingConfigRepository, "__init__", share_sources)
