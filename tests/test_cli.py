"""The command line: what it prints, one line and exit status 1 for every mistake of a user, sweeps."""

from __future__ import annotations

import errno
import fcntl
import gc
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hydra._internal.core_plugins import basic_sweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from tiny_run import overflow_in_half_precision, saved_model
from transformers import LlamaForCausalLM

from cushion import cli, preparation, start
from cushion.config import TrackingConfig
from cushion.events import Event
from cushion.reporting import figures
from cushion.results import FILE_NAME
from cushion.schema import LOGGED

SMALL = ["tracking=none", "quantizer.calibration.samples=2", "quantizer.calibration.length=16",
         "eval.block_length=32", "eval.blocks=2", "eval.activation_blocks=1"]  # fmt: skip


@dataclass
class Outcome:
    code: int
    out: str
    err: str


@pytest.fixture
def arguments(text_file: Path) -> list[str]:
    """The overrides of a run that takes a second."""
    return ["model=tiny", "data=file", f"data.path={text_file}", "search=none", *SMALL]


@pytest.fixture(scope="module", autouse=True)
def little_to_look_through() -> None:
    """The command looks for garbage after every failed run: not in all that other tests have imported by now."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def cushion(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., Outcome]]:
    """`cushion("model=tiny", ...)`: the command in this process, in a folder of its own.

    It draws no figures, which takes ten times as long as the run, unless a test asks for `figures_drawn`.
    """
    folder = tmp_path / "work"
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # set by the command, and taken back after the test
    monkeypatch.setattr(figures, "draw_figures", lambda *_: None)

    def run(*overrides: str) -> Outcome:
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["cushion", *overrides])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    yield run
    GlobalHydra.instance().clear()


DRAW_FIGURES = figures.draw_figures


@pytest.fixture
def figures_drawn(cushion: Callable[..., Outcome], blank_figures: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command draws its figures, as it does for a user, of one pixel."""
    monkeypatch.setattr(figures, "draw_figures", DRAW_FIGURES)


def one_error(outcome: Outcome) -> str:
    """The only line on standard error of a refused command."""
    assert outcome.code == 1
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("cushion: error: ")
    assert "Traceback" not in outcome.err
    assert "To append" not in outcome.err and "Or add a second" not in outcome.err  # nothing can be added
    return lines[0]


# ---- a run --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("figures_drawn")
def test_the_last_line_is_the_path_of_the_result_and_a_second_run_says_the_same(
    cushion: Callable[..., Outcome], arguments: list[str]
) -> None:
    first = cushion(*arguments)
    assert first.code == 0
    path = Path(first.out.splitlines()[-1])
    assert path.is_absolute()
    assert path.name == FILE_NAME
    result = json.loads(path.read_text())
    assert result["status"] == "completed"
    for row in result["rows"]:
        assert row["label"] in first.out
    drawn = [Path(line.split()[-1]) for line in first.out.splitlines() if line.startswith("figure ")]
    assert {figure.name for figure in drawn} == {"activation_curves.png", "activation_map.png", "attention_maps.png"}
    assert all(figure.is_file() for figure in drawn)
    assert "perplexity" in first.err, "progress bars go to standard error"
    log = (path.parent / "run.log").read_text()
    assert f"{result['rows'][-1]['label']}: perplexity text" in log
    assert log.splitlines()[-1].endswith(" INFO done")
    assert all(LOGGED.fullmatch(line) for line in log.splitlines()), "cushion-status reads it"
    second = cushion(*arguments)
    assert (second.code, second.out, second.err) == (0, first.out, "")
    assert (path.parent / "run.log").read_text() == log, "nothing was done"
    (path.parent / "config.yaml").unlink()
    (path.parent / "run.log").write_text("anything")
    assert cushion(*arguments).out == first.out, "whether a run is done does not depend on them"


def test_the_command_works_as_a_program_from_any_folder_without_a_home(tmp_path: Path, arguments: list[str]) -> None:
    command = [sys.executable, "-c", "from cushion.cli import main; main()", *arguments, "search.tau=0.25"]
    source = str(Path(cli.__file__).resolve().parent.parent)
    places = {"PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]), "HOME": "/proc/none"}
    environment = {**os.environ, **places}

    def program() -> Outcome:
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        return Outcome(done.returncode, done.stdout, done.stderr)

    done = program()
    assert done.code == 0, done.err
    path = Path(done.out.splitlines()[-1])
    assert path.is_file()
    assert tmp_path in path.parents
    assert "WARNING: search.tau=0.25 has no effect with search.method=none" in done.err
    command[-1] = "search.tau=2"
    line = one_error(program())
    assert line == "cushion: error: search.tau=2.0 is not allowed: above 0, at most 1"


# ---- a user's mistakes --------------------------------------------------------------------------------------------

MISTAKES = {
    "unknown option": (["quantizer=per_tensor_sttic"], "quantizer/per_tensor_sttic", "per_tensor_static"),
    "unknown experiment": (["experiment=mian"], "experiment/mian", "main"),
    "unknown experiment in a folder": (
        ["experiment=smollm2/cushioncache_tabel1"],
        "weight_only smollm2/cushioncache_figure1",  # the options of the folder follow those beside it
        "did you mean 'smollm2/cushioncache_table1'?",
    ),
    "a letter beyond ASCII": (["tracking.project=größe"], "tracking.project=größe is not read", "='\"größe\"'"),
    "a misspelt key whose value has blanks": (
        ["search.ruonds=[{keep: 4, text: 1}]"], "Could not override 'search.ruonds'.: Key", "did you mean 'rounds'?",
    ),
    "one inside of a list": (["eval.tasks=[a,größe]"], "eval.tasks=[a,größe] is not read", "='[a,\"größe\"]'"),
    "a sweeper of a package": (["hydra/sweeper=ax"], "hydra/sweeper=ax is not", "pip install hydra-ax-sweeper"),
    "unknown option of Hydra's": (["hydra/launcher=slrm"], "joblib_local slurm", "did you mean 'slurm'?"),
    "misspelt key": (["quantizer.activations.bitz=8"], "quantizer.activations.bitz", "did you mean 'bits'?"),
    "misspelt top key": (["sed=1"], "'sed'", "did you mean 'seed'?"),
    "added key": (["+search.tua=0.3"], "search.tua is not a key of the configuration", "did you mean 'tau'?"),
    "forced key": (["++sed=1"], "sed is not a key of the configuration", "did you mean 'seed'?"),
    "key that no file system takes": ([f"{'a' * 300}=1"], "aaa is not a key of the configuration", "has 300 bytes"),
    "key that is taken away and none takes": (["~" + "a" * 300], "aaa is not a key", "cushion --cfg job prints"),
    "added section": (["+data.evaluation.pth.x=1"], "data.evaluation.pth is not a key", "did you mean 'path'?"),
    "added group": (["+quantiser=none"], "quantiser is not a key of the configuration", "did you mean 'quantizer'?"),
    "added key that is there": (["+search.tau=0.3"], "already at 'search.tau'", "remove + prefix: 'search.tau=0.3'"),
    "misspelt group": (["quantiser=none"], "'quantiser'", "did you mean 'quantizer'?"),
    "wrong type": (["quantizer.weights.bits=eight"], "quantizer.weights.bits=eight", "Integer"),
    "bits 0": (["quantizer.weights.bits=0"], "quantizer.weights.bits=0 is not allowed", "2 to 8"),
    "tau 2": (["search.tau=2"], "search.tau=2.0 is not allowed", "at most 1"),
    "misspelt value": (["search.objective=quantisation_error"], "search.objective", "mean 'quantization_error'?"),
    "nothing to tune": (["tuning=short"], "tuning=short has no prefix to tune", "search=greedy_pruned"),
    "tokens not named": (["search=tokens"], "search.tokens=null", "needs search.tokens or search.token_ids"),
    "missing model folder": (["model.path=/nowhere/model"], "model.path='/nowhere/model'", "check the path"),
    "missing model folder, relative": (["model.path=./nowhere"], "model.path='./nowhere'", "check the path"),
    "model not on the hub": (["model.path=some/model"], "model.path='some/model'", "check the id or folder"),
    "no model named": (["model=hub", "data.path=/nowhere.txt"], "model.path", "hub id or a local folder"),
    "unknown tiny model": (["model.path=tiny:lama"], "model.path='tiny:lama' does not exist", "did you mean"),
    "unsupported architecture": (["model.path=./gpt2"], "architecture 'gpt2'", "not supported (supported: bloom"),
    "architecture nobody knows": (["model.path=./nonsense"], "model.path='./nonsense'", "nonsense"),
    "model folder without architecture": (["model.path=./empty"], "model.path='./empty'", "model_type"),
    "model folder without weights": (["model.path=./llama"], "model.path='./llama' cannot be loaded", "safetensors"),
    "too few blocks": (["eval.blocks=100000"], "data.evaluation", "100000 were asked for"),
    "too few texts": (["quantizer.calibration.samples=99999"], "data.calibration", "99999 were asked for"),
    "prefix longer than context": (
        ["search=tokens", f"search.token_ids=[{','.join(['5'] * 300)}]"],
        "300 tokens",
        "but tiny_llama has 256",
    ),
    "search longer than context": (
        ["search=greedy_sampled", "search.text_length=250"],
        "search.text_length=250 need 258 positions",
        "but tiny_llama has 256",
    ),
    "token outside the vocabulary": (
        ["search=tokens", "search.token_ids=[5,100000]"],
        "search.token_ids=100000 is outside the vocabulary",
        "0 to 259",
    ),
    "negative token": (["search=tokens", "search.token_ids=[-3]"], "search.token_ids=[-3]", "not negative"),
    "missing text": (["data.path=/nowhere.txt"], "no data file /nowhere.txt", "check the path"),
    "missing data folder": (["data=wikitext2", "paths.data_dir=/nowhere"], "paths.data_dir='/nowhere'", "folder"),
    "override without value": (["data.path"], "data.path", "missing EQUAL"),
    "tiny model, usual sizes": (["eval.block_length=512"], "but tiny_llama has 256", "(experiment=smoke has sizes"),
    "folder of Hydra's": (["hydra.run.dir=here"], "hydra.run.dir=here is not supported", "use paths.output_dir="),
    "rerun of Hydra's": (["--experimental-rerun=here"], "--experimental-rerun needs a file", "cushion rerun RESULT_OR"),
    "no such device": (["device=gpu"], "device='gpu' is not allowed", "auto, cpu, cuda"),
    "no such linear": (["quantizer.targets=[q_prj]"], "quantizer.targets names 'q_prj'", "did you mean 'q_proj'?"),
}  # fmt: skip
"""Overrides, what the one line names, and what it says about the way out."""


@pytest.fixture
def model_folders(tmp_path: Path) -> None:
    """Folders that look like models, beside where the command runs."""
    for name in ("gpt2", "nonsense", "llama", "empty"):
        folder = tmp_path / "work" / name
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}" if name == "empty" else json.dumps({"model_type": name}))


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.usefixtures("model_folders")
def test_a_mistake_ends_with_one_line_that_names_it(
    cushion: Callable[..., Outcome], arguments: list[str], mistake: str
) -> None:
    overrides, named, way_out = MISTAKES[mistake]
    replaced = {override.split("=")[0] for override in overrides}
    line = one_error(cushion(*(a for a in arguments if a.split("=")[0] not in replaced), *overrides))
    assert named in line
    assert way_out in line
    assert not Path("here").exists(), "of a folder that is not used none is made"


def test_a_file_that_nobody_named_is_asked_for(cushion: Callable[..., Outcome]) -> None:
    assert "data.path" in one_error(cushion("model=tiny", "data=file", *SMALL))


def test_a_damaged_result_and_a_damaged_artifact_are_named_and_made_again(
    cushion: Callable[..., Outcome], arguments: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = Path(cushion(*arguments).out.splitlines()[-1])
    path.write_text(path.read_text()[:50])
    with caplog.at_level(logging.WARNING):
        assert cushion(*arguments).code == 0
    assert f"{FILE_NAME} is damaged" in caplog.text
    assert json.loads(path.read_text())["status"] == "completed"
    path.unlink()
    (ranges,) = Path("outputs/cache/calibration").glob("*/ranges.safetensors")
    ranges.write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        assert cushion(*arguments).code == 0
    assert "was changed after it was made (ranges.safetensors): it was moved to" in caplog.text


def test_a_refused_run_leaves_a_failed_result_and_how_it_came_about(
    cushion: Callable[..., Outcome], arguments: list[str]
) -> None:
    given = [argument for argument in arguments if not argument.startswith("eval.blocks=")]
    one_error(cushion(*given, "eval.blocks=100000"))
    (path,) = Path("outputs").rglob(FILE_NAME)
    result = json.loads(path.read_text())
    assert result["status"] == "failed"
    assert yaml.safe_load((path.parent / "overrides.yaml").read_text()) == [*given, "eval.blocks=100000"]
    assert yaml.safe_load((path.parent / "config.yaml").read_text()) == result["config"]
    log = (path.parent / "run.log").read_text().splitlines()
    assert log[0].endswith(f"cushion {' '.join([*given, 'eval.blocks=100000'])}")
    assert "100000 were asked for" in log[-1]


@pytest.mark.parametrize(
    ("number", "way_out"),
    [
        (errno.ENOLCK, "on another file system"), (errno.EOPNOTSUPP, "on another file system"),
        (errno.ELOOP, "x: Too many"), (errno.EACCES, "x: Permission denied"), (errno.EROFS, "x: Read-only file system"),
        (errno.EPERM, "x: Operation not"), (errno.ENAMETOOLONG, "x: File name too long"),
    ],
)  # fmt: skip
def test_a_place_that_cannot_be_used_is_told_in_one_line(
    number: int, way_out: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.report(OSError(number, os.strerror(number), *(["x"] if way_out.startswith("x: ") else [])))
    (line,) = capsys.readouterr().err.splitlines()
    assert way_out in line
    assert "paths.output_dir" in line


@pytest.mark.parametrize("place", ["execute", "check_words"], ids=["in a run", "outside of it"])
def test_output_that_nobody_reads_is_no_error_to_report(
    cushion: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def print_to_nobody(*_: object) -> None:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def end(error: BaseException) -> None:
        assert isinstance(error, BrokenPipeError)
        raise SystemExit(start.OUTPUT_CLOSED)

    monkeypatch.setattr(cli, place, print_to_nobody)
    monkeypatch.setattr(start, "end_if_output_is_closed", end)  # it is tested with a pipe in test_start.py
    outcome = cushion("model=tiny")
    assert (outcome.code, outcome.err) == (start.OUTPUT_CLOSED, "")


def test_a_file_system_without_locks_is_told_before_any_work(
    cushion: Callable[..., Outcome], arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert "files cannot be locked" in one_error(cushion(*arguments))
    assert not list(Path("outputs").rglob(FILE_NAME))


def test_an_error_that_is_nobodys_mistake_keeps_its_traceback(
    cushion: Callable[..., Outcome], arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr("cushion.pipeline.run", broken)
    outcome = cushion(*arguments)
    assert outcome.code == 1
    assert outcome.err.startswith("Traceback")
    assert "AssertionError: a bug" in outcome.err
    assert "cushion: error" not in outcome.err


def test_an_interrupted_run_ends_with_one_line_and_its_own_status(
    cushion: Callable[..., Outcome], arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cushion.pipeline.run", interrupt)
    outcome = cushion(*arguments)
    assert outcome.code == 130
    assert outcome.err == "cushion: interrupted; the same command goes on from here\n"


# ---- sweeps -------------------------------------------------------------------------------------------------------


def test_a_sweep_over_quantizers_completes_every_run_and_wandb_is_told_what_was_swept(
    cushion: Callable[..., Outcome], arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[tuple[list[str], str]] = []

    class Recorder:
        """In place of W&B's tracker: what a run of a sweep gives it, and what stood on the screen last by then."""

        def __init__(self, _: TrackingConfig, swept: list[str]) -> None:
            begun.append((swept, sys.stdout.getvalue().splitlines()[-1]))  # type: ignore[attr-defined]

        def __call__(self, _: Event) -> None: ...

        catch_up = close = lambda *_, **__: None

    monkeypatch.setattr("cushion.tracking.WandbTracker", Recorder)
    arguments = [argument for argument in arguments if argument != "tracking=none"]
    outcome = cushion("-m", *arguments, "quantizer=per_tensor_dynamic,smoothquant_o1")
    assert outcome.code == 0
    assert begun == [
        (["quantizer=per_tensor_dynamic"], "[1/2] quantizer=per_tensor_dynamic"),
        (["quantizer=smoothquant_o1"], "[2/2] quantizer=smoothquant_o1"),
    ], "a heading stands before its run"
    results = [json.loads(path.read_text()) for path in Path("outputs").rglob(FILE_NAME)]
    assert {result["config"]["quantizer"]["name"] for result in results} == {"per_tensor_dynamic", "smoothquant_o1"}
    assert {result["status"] for result in results} == {"completed"}
    lines = outcome.out.splitlines()
    assert len([line for line in lines if line.endswith(FILE_NAME)]) == 2
    assert [line for line in lines if line.startswith("[")] == [
        "[1/2] quantizer=per_tensor_dynamic", "[2/2] quantizer=smoothquant_o1",
    ]  # fmt: skip
    assert lines[-1] == "2 runs: 2 completed"


def test_a_single_run_says_nothing_of_sweeps(cushion: Callable[..., Outcome], arguments: list[str]) -> None:
    outcome = cushion(*arguments)
    assert not [line for line in outcome.out.splitlines() if line.startswith("[") or " runs: " in line]
    assert "CUSHION_SWEEP" not in os.environ


def test_a_sweep_says_once_that_an_option_has_no_effect(
    cushion: Callable[..., Outcome], arguments: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert cushion("-m", *arguments, "search.tau=0.25,0.3", "seed=0,1").code == 0
    said = [record.getMessage() for record in caplog.records if "has no effect" in record.getMessage()]
    assert said == [
        "search.tau=0.25 has no effect with search.method=none (run 1 and 1 more: search.tau=0.25 seed=0)",
        "search.tau=0.3 has no effect with search.method=none (run 3 and 1 more: search.tau=0.3 seed=0)",
    ]
    results = [json.loads(path.read_text()) for path in Path("outputs").rglob(FILE_NAME)]
    assert [len(result["warnings"]) for result in results] == [1] * 4, "the result keeps its own warnings"


def test_a_sweeper_that_chooses_its_runs_on_the_way_says_as_much(
    cushion: Callable[..., Outcome],
    arguments: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    name, known = "hydra_plugins.here.ChoosingSweeper", Plugins.instance().class_name_to_class
    usual = known[f"{basic_sweeper.__name__}.BasicSweeper"]
    choosing = type("ChoosingSweeper", (usual,), {"__module__": __name__})  # nothing is known of its runs before
    monkeypatch.setattr(sys.modules[__name__], "ChoosingSweeper", choosing, raising=False)
    monkeypatch.setitem(known, name, choosing)
    outcome = cushion("-m", *arguments, f"hydra.sweeper._target_={name}", "search.tau=0.25", "seed=0,-1,1")
    assert outcome.code == 1
    said = [record.getMessage() for record in caplog.records if "has no effect" in record.getMessage()]
    assert said == ["search.tau=0.25 has no effect with search.method=none"]
    lines = outcome.out.splitlines()
    assert [line for line in lines if line.startswith("[")] == ["[1] seed=0", "[3] seed=1"]
    closing = lines[lines.index("the last row of each run: per_tensor_static W8A8") :]
    assert [line.split()[:2] for line in closing[4:7]] == [["1", "0"], ["2", "-1"], ["3", "1"]]
    assert (closing[2].split()[:2], "failed" in closing[5]) == (["run", "seed"], True)
    assert closing[-1] == "3 runs: 2 completed, 1 failed"


def test_a_sweep_goes_on_after_a_failed_run_and_ends_with_status_1(
    cushion: Callable[..., Outcome], arguments: list[str]
) -> None:
    arguments = [argument for argument in arguments if not argument.startswith("eval.blocks=")]
    outcome = cushion("-m", *arguments, "eval.blocks=100000,2")
    assert outcome.code == 1
    (line,) = [line for line in outcome.err.splitlines() if line.startswith("cushion: error: ")]
    assert "100000 were asked for" in line
    assert "Traceback" not in outcome.err
    results = [json.loads(path.read_text()) for path in Path("outputs").rglob(FILE_NAME)]
    assert {result["config"]["eval"]["blocks"]: result["status"] for result in results} == {
        100000: "failed", 2: "completed",
    }  # fmt: skip
    assert outcome.out.splitlines()[-1] == "2 runs: 1 completed, 1 failed"


def living_models() -> int:
    """How many models are in memory, without collecting anything first."""
    return sum(type(thing) is LlamaForCausalLM for thing in gc.get_objects())


FAILURES = {
    "text too short": ["eval.blocks=100000,100001"],
    "overflow": ["model.path=../overflowing", "model.dtype=float16", "seed=0,1"],
    "bug": ["seed=0,1"],
}
"""Sweeps of two jobs that fail after their model is loaded: in the preparation, in a step, by a bug in a step."""


@pytest.mark.parametrize("failure", FAILURES)
def test_the_failed_jobs_of_a_sweep_leave_no_model_in_memory(
    cushion: Callable[..., Outcome],
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: str,
) -> None:
    if failure == "overflow":
        saved_model(tmp_path / "overflowing", overflow_in_half_precision)
    load, living = preparation.load_language_model, []

    def watched(*given: object, **options: object) -> object:
        living.append(living_models())
        loaded = load(*given, **options)  # type: ignore[arg-type]
        assert living_models() == living[-1] + 1
        return loaded

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(preparation, "load_language_model", watched)
    if failure == "bug":
        monkeypatch.setattr("cushion.evaluation.perplexity_step.perplexity", broken)
    replaced = {override.split("=")[0] for override in FAILURES[failure]}
    gc.collect()
    before = living_models()
    outcome = cushion("-m", *(a for a in arguments if a.split("=")[0] not in replaced), *FAILURES[failure])
    assert outcome.code == 1
    expected = {"text too short": "were asked for", "overflow": "model.dtype=bfloat16", "bug": "RuntimeError: a bug"}
    assert len([line for line in outcome.err.splitlines() if expected[failure] in line]) == 2
    assert living == [before] * 2, "each job starts with the memory of the one before"
    assert living_models() == before


def test_a_log_file_on_a_full_disk_is_no_traceback_and_any_other_fault_of_logging_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    usual, full = logging.Handler.handleError, logging.FileHandler("/dev/full")
    lost = logging.makeLogRecord({"msg": "lost"})
    with cli._full_disk_is_no_fault_of_logging(), cli._full_disk_is_no_fault_of_logging():
        full.handle(lost)
        assert capsys.readouterr().err == ""
        full.handle(logging.makeLogRecord({"msg": "%d", "args": ("no number",)}))
        assert "--- Logging error ---" in capsys.readouterr().err
    assert logging.Handler.handleError is usual, "other programs log as ever"
    full.handle(lost)
    assert "--- Logging error ---" in capsys.readouterr().err
    full.stream = None  # what it holds could not be written on closing either
