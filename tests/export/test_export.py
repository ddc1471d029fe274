"""What `cushion-export` writes and refuses: one line that names the value and the way out, and nothing half written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from finished_runs import TOKENS, finished_run, tuned_prefix

from cushion.errors import ArtifactError
from cushion.export.cli import main
from cushion.export.finished import FinishedRun
from cushion.export.targets import EXPORTERS, ExportTarget, export
from cushion.models import LanguageModel
from cushion.prefix import Prefix

Tiny = Callable[..., LanguageModel]
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture
def run(tiny: Tiny, tmp_path: Path) -> Path:
    """The folder of a finished run with a tuned prefix, on a model of the hub."""
    lm = tiny("llama")
    return finished_run(tmp_path / "run", lm, tuned_prefix(lm, TOKENS))


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line with which the command refuses."""
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    assert left.value.code == 1
    out, err = capsys.readouterr()
    assert not out
    (line,) = err.splitlines()
    return line.removeprefix("cushion-export: error: ")


def test_it_writes_three_files_and_prints_their_paths(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "some" / "adapter"
    main([str(run), "--to", "peft", str(made)])
    assert capsys.readouterr().out.split() == [str(made / name) for name in FILES]
    config = json.loads((made / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("owner/base", None)
    assert (config["peft_type"], config["task_type"], config["inference_mode"]) == ("PREFIX_TUNING", "CAUSAL_LM", True)
    assert (config["num_virtual_tokens"], config["num_layers"]) == (3, 3)
    assert list(made.parent.iterdir()) == [made]


def test_the_card_says_what_it_is_how_it_was_made_and_what_it_measured(run: Path, tmp_path: Path) -> None:
    export(FinishedRun.read(run), "peft", tmp_path / "mine")
    card = (tmp_path / "mine" / "README.md").read_text()
    assert card.startswith('---\nbase_model: "owner/base"\nlibrary_name: "peft"\n')
    assert "A prefix of 3 positions of key-value cache for `owner/base`" in card
    assert 'tuned keys and values, which started from the tokens [91, 6, 8], in JSON `"|\')"`' in card
    assert "`search=greedy_sampled`, `tuning=short`" in card
    assert "cushion 1.2.3, torch 2.0, transformers 5.0" in card
    assert re.search(r"\| full precision \+ tuned prefix +\| 25\.50 \|", card)
    assert re.search(r"\| W8A8 \+ tuned prefix +\| - \|", card)
    assert "gives the row 'full precision + tuned prefix'" in card
    assert "--model_args pretrained=owner/base,dtype=float32,add_bos_token=False,peft=mine --tasks wikitext" in card
    assert "sliding window" in card


def test_revision_and_foreign_code_stand_where_the_model_is_loaded(tiny: Tiny, tmp_path: Path) -> None:
    lm = tiny("llama")
    folder = finished_run(tmp_path / "run", lm, tuned_prefix(lm, TOKENS), revision="v2", trust_remote_code=True)
    export(FinishedRun.read(folder), "peft", tmp_path / "made")
    assert json.loads((tmp_path / "made" / "adapter_config.json").read_text())["revision"] == "v2"
    card = (tmp_path / "made" / "README.md").read_text()
    assert (
        "pretrained=owner/base,revision=v2,dtype=float32,add_bos_token=False,trust_remote_code=True,peft=made" in card
    )
    assert '"owner/base", revision="v2", dtype="float32", trust_remote_code=True)' in card


@pytest.mark.parametrize(
    ("model", "named"),
    [
        ({"path": "tiny:llama"}, "model.path='tiny:llama' is not the id of a model on the hub"),
        ({"path": "embedded:smollm2-135m"}, "model.path='embedded:smollm2-135m' is not the id"),
        ({"path": "/models/mine"}, "model.path='/models/mine' is not the id"),
        ({"path": "owner/base", "gguf_file": "q4.gguf"}, "model.gguf_file='q4.gguf' is not what transformers loads"),
    ],
)
def test_a_model_that_others_cannot_load_needs_a_name(
    model: dict[str, str], named: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = tiny("llama")
    folder, made = finished_run(tmp_path / "run", lm, tuned_prefix(lm, TOKENS), **model), tmp_path / "made"
    line = refused(capsys, folder, "--to", "peft", made)
    assert named in line
    assert line.endswith("name the model that has the same weights there with --base-model owner/name")
    assert not made.exists()
    main([str(folder), "--to", "peft", str(made), "--base-model", "other/base"])
    assert json.loads((made / "adapter_config.json").read_text())["base_model_name_or_path"] == "other/base"
    assert (
        f"It was made on `{model['path']}` (llama, float32). That `other/base` has" in (made / "README.md").read_text()
    )


def test_a_local_folder_is_not_taken_for_an_id(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lm = tiny("llama")
    folder = finished_run(tmp_path / "run", lm, tuned_prefix(lm, TOKENS), path="owner/base")
    (tmp_path / "owner" / "base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert "model.path='owner/base' is not the id" in refused(capsys, folder, "--to", "peft", "made")


def test_what_cannot_be_exported_is_refused(
    run: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = tmp_path / "made"
    line = refused(capsys, run, "--to", "pfet", made)
    names = ", ".join(name for name, _ in EXPORTERS.items())
    assert line == f"--to='pfet' is not allowed: choose one of {names}; did you mean 'peft'?"
    line = refused(capsys, tmp_path, "--to", "peft", made)
    assert line == f"RUN='{tmp_path}' holds no result.json: name the folder of a finished run"
    line = refused(capsys, run, "--to", "peft", made, "--base-model", "a/b/c")
    assert line.startswith("--base-model='a/b/c' is neither the id of a model on the hub nor a folder: ")
    bare = finished_run(tmp_path / "bare", tiny("llama"), None)
    line = refused(capsys, bare, "--to", "peft", made)
    assert line.startswith("search=greedy_sampled left this run without a prefix")
    assert not made.exists()


def test_failed_damaged_and_mixed_up_runs_are_refused(
    run: Path, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, made = run / "result.json", tmp_path / "made"
    Prefix.from_tokens(tiny("llama").model, TOKENS).save(run / "prefix")
    said = refused(capsys, run, "--to", "peft", made)
    assert "result.json does not fit what lies beside it (prefix.json, prefix.safetensors): run it again" in said
    record = {key: value for key, value in json.loads(result.read_text()).items() if key != "integrity"}
    result.write_text(json.dumps(record))  # as older versions wrote it
    assert "prefix.safetensors is not the prefix of the result.json" in refused(capsys, run, "--to", "peft", made)
    (run / "prefix.json").unlink()
    assert "no prefix file" in refused(capsys, run, "--to", "peft", made)
    result.write_text(json.dumps({**record, "status": "failed"}))
    assert "has status=failed: run it again" in refused(capsys, run, "--to", "peft", made)
    result.write_text("{")
    assert "result.json is damaged" in refused(capsys, run, "--to", "peft", made)
    assert not made.exists()


def test_nothing_is_overwritten(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = tmp_path / "made"
    made.mkdir()
    main([str(run), "--to", "peft", str(made)])  # an empty folder is filled
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    line = refused(capsys, run, "--to", "peft", made)
    assert line == f"DIR='{made}' is there already and is not an empty folder: name a new one"
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before
    line = refused(capsys, run, "--to", "peft", made / "README.md")
    assert "is not an empty folder" in line


def broken(run: FinishedRun, folder: Path) -> None:
    (folder / "half").write_text("written")
    raise OSError("no space left on device")


def test_a_target_that_fails_leaves_nothing_behind(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "peft" in EXPORTERS
    monkeypatch.setitem(EXPORTERS._items, "broken", ExportTarget(name="broken", title="", write=f"{__name__}:broken"))
    with pytest.raises(OSError, match=r"^no space left on device$"):  # which may be of the run's cache
        export(FinishedRun.read(run), "broken", tmp_path / "made" / "it")
    assert list((tmp_path / "made").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(ArtifactError, match=r"DIR='.*' cannot be written \(.*file.*\): name a folder"):
        export(FinishedRun.read(run), "peft", tmp_path / "file" / "it")
