"""What no key of its type may be: tried on every key of the schema, so that a new one is tried by itself."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, get_args, get_type_hints

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString

from cushion.checks import LARGEST, LARGEST_RATE, LARGEST_SEED, NAME_BYTES, check_values, written
from cushion.cli import config_folder
from cushion.config import (
    CorpusConfig,
    DataConfig,
    EvalConfig,
    ModelConfig,
    RunConfig,
    SearchConfig,
    SearchRound,
    TuningConfig,
)
from cushion.errors import ConfigError
from cushion.words import check_words, in_quotes

INFINITE = (float("inf"), float("-inf"), float("nan"))
BEYOND = {int: (2**31, -(2**31), 2**63, 10**5000), float: (*INFINITE, 10**400), str: ("\udc80", "a\ud800")}
"""Values that no key of these types may have."""
NOT_READ = {
    "x=größe": "größe", "x=/a/file (1).txt": "/a/file (1).txt", "x=a'b": "a'b", "x=a(b)é": "a(b)é",
    "x=[é,b,'ü']": ["é", "b", "ü"], "x=[[é]]": [["é"]], "x={a: é}": {"a": "é"}, "x=[{k: é}]": [{"k": "é"}],
    "x=${y}/é": "${y}/é",
}  # fmt: skip
"""Overrides that Hydra does not read, and what was meant."""


@pytest.mark.parametrize("override", NOT_READ)
def test_the_advice_to_put_text_in_quotes_gives_what_was_meant(override: str) -> None:
    advice = in_quotes(override)
    assert advice is not None
    (word,) = shlex.split(advice)  # as a shell hands it on
    assert plain(OverridesParser.create().parse_override(word).value()) == NOT_READ[override]


def plain(value: object) -> object:
    if isinstance(value, list):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    return value.text if isinstance(value, QuotedString) else value


@pytest.mark.parametrize("override", ["x=[a,b", "x={a:1", "x=(0.1,0.2)", "é=1", "x", "=", "x={é:1}"])
def test_where_quotes_do_not_help_they_are_not_advised(override: str) -> None:
    assert in_quotes(override) is None


NO_PATHS = ("a" * 256, "x/" + "é" * 128 + "/y", "a/" * 3000, "~nobody-of-this-name/x", "a\0b")
NO_NAMES = ("a" * (NAME_BYTES + 1), "é" * 32, "a/b", "../up", "..", ".", "", "a\\b", "a\nb", "a\0b")


def leaves(config: Any) -> Iterator[tuple[tuple[str, ...], set[Any]]]:
    """Every key of a configuration, with the types that it may have."""
    hints = get_type_hints(type(config))
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from (((field.name, *rest), kinds) for rest, kinds in leaves(value))
        else:
            hint = hints[field.name]
            yield (field.name,), set(get_args(hint)) if isinstance(hint, UnionType) else {hint}


def changed(config: Any, key: tuple[str, ...], value: Any) -> Any:
    """The configuration with one key set as from Python: every check on the way is made."""
    name, *rest = key
    return replace(config, **{name: changed(getattr(config, name), tuple(rest), value) if rest else value})


def with_files() -> RunConfig:
    """A configuration whose paths may be anything that a path may be."""
    corpora = [CorpusConfig("file", path="x") for _ in range(4)]
    return RunConfig(data=DataConfig("file", *corpora, path="x"))


LEAVES = dict(leaves(with_files()))


def refused(key: tuple[str, ...], value: Any) -> None:
    try:
        changed(with_files(), key, value)
    except ConfigError as error:
        assert key[-1] in str(error), (key, error)
        assert "\n" not in str(error), (key, error)
        assert len(str(error)) < 700, (key, error)
        str(error).encode()  # can be printed
        return
    pytest.fail(f"{'.'.join(key)} may be {value!r:.60}")


@pytest.mark.parametrize("kind", BEYOND)
def test_no_key_may_be_beyond_what_its_type_can_be(kind: type) -> None:
    found = [key for key, kinds in LEAVES.items() if kind in kinds and not (kind is int and float in kinds)]
    assert len(found) >= 14
    for key in found:
        for value in BEYOND[kind]:
            if not (key[-1].endswith("seed") and 0 < value <= LARGEST_SEED):
                refused(key, value)


def test_every_learning_rate_has_a_limit() -> None:
    rates = [key for key in LEAVES if key[-1].endswith("learning_rate")]
    assert len(rates) >= 6
    for key in rates:
        changed(with_files(), key, LARGEST_RATE)
        for value in (0.0, -1e-3, LARGEST_RATE * 2, 9e18):
            refused(key, value)


def test_a_seed_leaves_room_for_what_is_made_of_it() -> None:
    seeds = [key for key in LEAVES if key[-1] == "seed" or key[-1].endswith("_seed")]
    assert len(seeds) >= 3
    for key in seeds:
        changed(with_files(), key, LARGEST_SEED)
        refused(key, LARGEST_SEED + 1)
        refused(key, -1)
    assert (LARGEST_SEED * 100_003 + LARGEST) * 1_009 + LARGEST < 2**63, "reconstruction: a seed for block and epoch"


def test_every_path_can_be_a_path() -> None:
    paths = [key for key in LEAVES if key[-1] == "path" or key[-1].endswith(("_path", "_dir", "_file"))]
    assert len(paths) >= 11
    for key in paths:
        changed(with_files(), key, "/".join(["a" * 255] * 10))
        for value in NO_PATHS:
            refused(key, value)


def test_every_name_can_be_part_of_the_name_of_a_folder() -> None:
    names = [key for key in LEAVES if key[-1] == "name"]
    assert len(names) >= 6
    for key in [*names, ("experiment",)]:
        changed(with_files(), key, "é" * 31)
        for value in NO_NAMES:
            if key != ("experiment",) or len(value) < 10:
                refused(key, value)
    refused(("experiment",), "a" * 129)
    longest = [len(getattr(RunConfig(), group).name) for group in ("quantizer", "search", "tuning", "reconstruction")]
    assert 4 * NAME_BYTES + len(longest) - 1 == 255, "the names of these groups make the name of one folder"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EvalConfig(tasks=[["a"]]), r"^eval\.tasks=\[\['a'\]\] is not allowed: \['a'\] is not a text$"),  # type: ignore[list-item]
        (lambda: EvalConfig(tasks=[{"a": 1}]), r"^eval\.tasks=.*\{a: 1\} is not a text"),  # type: ignore[list-item]
        (lambda: EvalConfig(tasks=["a\ud800"]), r"^eval\.tasks='a\\ud800' .*surrogate"),
        (lambda: SearchConfig(token_ids=[True]), r"^search\.token_ids=\[true\] .*true is not a whole number"),
        (lambda: SearchConfig(user_tokens=[2**40]), r"^search\.user_tokens=1099511627776 .*at most 2147483647"),
        (lambda: SearchRound(keep=float("inf")), r"^search\.rounds\.keep=inf .*finite"),
        (lambda: SearchConfig(rounds=[{"keep": float("inf")}]), r"^search\.rounds\.keep=inf .*finite"),  # type: ignore[list-item]
        (lambda: DataConfig(further={"a" * 99: CorpusConfig()}), r"^data\.further='aaa.* 99 bytes: at most 63"),
        (lambda: TuningConfig(learning_rate=9e18), r"^tuning\.learning_rate=9e\+18 .*at most 1000"),
        (lambda: TuningConfig(lambda_q=1e300), r"^tuning\.lambda_q=1e\+300 .*at most"),
        (lambda: TuningConfig(method="prefix", epochs=1e12), r"^tuning\.epochs=.*128000000000000 steps"),
        (lambda: TuningConfig(method="prefix", steps=2**63 - 1), r"^tuning\.steps=.*at most 2147483647"),
    ],
)
def test_what_stands_in_a_list_or_follows_from_a_value_is_checked_too(make: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


def test_values_are_written_as_yaml_has_them() -> None:
    shown = {None: "null", True: "true", 3: "3", 1e-5: "1e-05", "a": "'a'", "\ud800": r"'\ud800'"}
    assert {value: written(value) for value in shown} == shown
    assert written([None, [True]]) == "[null, [true]]"
    assert written({"a": None}) == "{a: null}"
    assert written("x" * 1000).endswith("... (1002 characters)")
    assert written(-(10**5000)) == "<a number of 5001 digits>"


def test_the_check_goes_into_everything_below() -> None:
    config = RunConfig()
    config.model.device_map = {"lm_head": float("inf")}  # set past the group's own checks
    with pytest.raises(ConfigError, match=r"^model\.device_map\.lm_head=inf"):
        check_values("", config)


def test_a_model_in_the_current_folder_is_called_by_the_name_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "mine" / "below")
    assert [ModelConfig(path).label for path in (".", "..", "../", "a/b.c/")] == ["below", "mine", "mine", "b.c"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("experiment=123", r"^experiment=123 is not allowed: .*write experiment='\"123\"'"),
        ("experiment=1.5", r"^experiment=1\.5 "),
        ("search=null", r"^search=null .*leave search out"),
        ("+quantizer=true", r"^quantizer=true "),
        ("experiment=main,2", r"^experiment=2 "),
    ],
)
def test_an_option_of_a_group_is_named_by_text(word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_words(["model=tiny", word], config_folder())


def test_what_is_text_or_no_group_is_left_to_hydra() -> None:
    words = ["seed=1", "experiment='123'", "model=tiny,hub", "search={name: x}", "--multirun", "search=[", "=", "/=1"]
    check_words(words, config_folder())
