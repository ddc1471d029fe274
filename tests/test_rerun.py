"""`cushion rerun`: any configuration as overrides that compose it, and runs again from what their folders keep."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from test_cli import Outcome, arguments, cushion, one_error  # noqa: F401 - fixtures

from cushion import cli, rerun
from cushion.composition import compose, compose_raw
from cushion.config import ActivationConfig, CorpusConfig, RunConfig, SearchConfig, SearchRound, TrackingConfig, to_dict
from cushion.errors import ConfigError
from cushion.results import FILE_NAME

Command = Callable[..., Outcome]

# ---- a configuration as overrides -----------------------------------------------------------------------------------

TEXTS = ["word", "it's", 'a "b"', "null", "12", "1e3", "a b", "x\\", 'x\\"y', "a,b", "[x]", "{a:b}", "", '"',
         "a=b", "é", "~/x", "/a/b.c", "-3", "a\nb", "a\\nb", "True"]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_comes_back_from_an_override(text: str) -> None:
    value = OverridesParser.create().parse_override(f"key={rerun.text_of([text])}").value()
    assert [one.text if isinstance(one, QuotedString) else one for one in value] == [text]


def test_any_text_comes_back_from_a_composed_configuration() -> None:
    texts = ["${a}", "\\\\${a}", "größe/é", "a$b", "${"]
    whole = [TrackingConfig(project=text, tags=texts) for text in texts[:2]]
    for tracking in whole:
        made = cli.to_run_config(compose_raw(rerun.overrides_of(replace(RunConfig(), tracking=tracking)))[0])
        assert made.tracking == tracking


def test_options_stand_before_all_overrides() -> None:
    given = ["-m", "search.tau=0.3,0.5", "--config-dir", "mine", "~data.further.c4", "++x=1"]
    words = rerun.command(["seed=1", "model=tiny"], given)
    assert words == [
        "-m",
        "--config-dir",
        "mine",
        "seed=1",
        "model=tiny",
        "search.tau=0.3,0.5",
        "~data.further.c4",
        "++x=1",
    ]


@pytest.mark.parametrize("given", [["--info"], ["-i"], ["--info", "config"], ["-m", "-i"]])
def test_an_option_takes_no_override_for_its_value(given: list[str]) -> None:
    read = get_args_parser().parse_args(rerun.command(["seed=1", "model=tiny"], [*given, "search=none"]))
    assert (read.info, read.overrides) == (
        "config" if "config" in given else "all",
        ["seed=1", "model=tiny", "search=none"],
    )


COMPOSED = {
    "experiment": ["experiment=main", "seed=3"],
    "one run of a sweep, at the default": ["experiment=ablation_tau", "search.tau=0.5"],
    "an experiment on another one": ["experiment=smollm2/cushioncache_table1", "quantizer=cushioncache_o1",
                                     "model=smollm2_135m"],
    "a part that is swept": ["experiment=prefixquant_w4a4kv4", "model=llama2_7b",
                             "quantizer.activations={granularity: per_tensor, range: static}"],
    "interpolated paths": ["model=tiny", "data=file", "data.path='/some/a b.txt'"],
    "a model of the hub": ["model=hub", "model.path=owner/name", "quantizer.weights.bits=4"],
}  # fmt: skip


@pytest.mark.parametrize("case", COMPOSED)
def test_the_overrides_of_a_configuration_compose_it(case: str) -> None:
    node, _ = compose_raw(COMPOSED[case])
    config = cli.to_run_config(node)
    assert to_dict(RunConfig.from_dict(to_dict(config))) == to_dict(config)
    words = rerun.overrides_of(config)
    assert to_dict(cli.to_run_config(compose_raw(words)[0])) == to_dict(config)
    assert len(words) <= 13, "few: options by their names, and what differs from them"


def test_a_configuration_made_in_python_is_one_too(tmp_path: Path) -> None:
    further = {"more": CorpusConfig(source="file", path="it's.txt")}
    config = RunConfig(search=SearchConfig(name="mine", method="greedy", rounds=[SearchRound(1, 4)]), experiment="mine")
    config.data = replace(config.data, further=further)
    config.quantizer.activations = ActivationConfig(estimator="percentile", estimator_options={"percentile": 99.5})
    words = rerun.overrides_of(config, tmp_path)
    assert to_dict(cli.to_run_config(compose_raw(words)[0])) == to_dict(config)


def test_what_further_overrides_set_or_choose_is_left_out() -> None:
    words = ["experiment=main", "hydra.mode=RUN", "search=greedy_pruned", "tuning=none", "search.tau=0.3", "seed=1"]
    assert rerun.without(words, ["seed=2"]) == words[:-1]
    assert rerun.without(words, ["search=none"]) == [*words[:2], "tuning=none", "seed=1"]
    assert rerun.without(words, ["-m", "search.tau=0.1,0.2"]) == [words[0], *words[2:4], "seed=1"]


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [("search", {"tua": 0.3}, "did you mean 'tau'?"), ("search", {"tau": 2.0}, "search.tau=2.0 is not allowed"),
     ("sed", 1, "did you mean 'seed'?"), ("seed", "one", "seed: Value 'one'")],
)  # fmt: skip
def test_a_record_that_is_no_configuration_is_refused_by_key(key: str, value: object, told: str) -> None:
    with pytest.raises(ConfigError) as refused:
        RunConfig.from_dict({key: value})
    assert told in str(refused.value)


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def again(cushion: Command, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:  # noqa: F811
    """`again(place, "seed=1")`: the command `cushion rerun` in this process."""

    def run(*words: str) -> Outcome:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["cushion", "rerun", *words])
        try:
            rerun.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


def test_a_run_is_done_again_from_its_folder(
    cushion: Command, again: Command, arguments: list[str]  # noqa: F811
) -> None:  # fmt: skip
    first = cushion(*arguments, "search=bos")
    path = Path(first.out.splitlines()[-1])
    same = again(str(path))
    assert (same.code, same.out) == (0, first.out), "the same run, and it is finished"
    (line,) = same.err.splitlines()
    words = line.removeprefix("cushion rerun: cushion ").split()
    assert to_dict(compose(*words)) == json.loads(path.read_text())["config"]
    path.unlink()
    other = again(str(path.parent), "search=none", "seed=1")  # killed before it had a result: config.yaml is there
    assert other.code == 0
    found = Path(other.out.splitlines()[-1])
    config = json.loads(found.read_text())["config"]
    assert (config["search"]["name"], config["seed"], config["eval"]["blocks"]) == ("none", 1, 2)


def test_what_is_no_run_is_refused_and_what_is_of_another_version_told(
    again: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "holds no result.json and no config.yaml" in one_error(again(str(tmp_path)))
    result = json.loads((Path(__file__).parent / "data" / "result_v1.json").read_text())
    path = tmp_path / FILE_NAME
    path.write_text(json.dumps(result))
    assert rerun.recorded(path).model.path == result["config"]["model"]["path"]
    assert "schema version 1, here 2" in capsys.readouterr().err
    path.write_text(json.dumps({**result, "schema_version": 3}))
    assert "is not a result of schema version 1 or 2" in one_error(again(str(path)))
    path.unlink()
    (tmp_path / "config.yaml").write_text("search: [")
    assert "config.yaml is damaged" in one_error(again(str(tmp_path)))
