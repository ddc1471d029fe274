"""`cushion-generate`: the model of a row is the one that was measured, and its text is what that model predicts."""

from __future__ import annotations

import errno
import importlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_documents
from tiny_run import tuning_config

from cushion import artifacts as artifacts_module
from cushion import pipeline
from cushion.artifacts import ArtifactStore
from cushion.config import QFeMConfig, ReconstructionConfig
from cushion.errors import ArtifactError, ConfigError
from cushion.evaluation.perplexity_step import PerplexityStep
from cushion.events import Event, Progress
from cushion.export.finished import FinishedRun
from cushion.generate import FULL_PRECISION, Sampling, generate, main, prompt_tokens
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.quantization.lazily import QuantizedLazily
from cushion.remade import RemadeRun
from cushion.schema import FOUND
from cushion.step import Context, compute


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with everything that a row can be made of: kept linears, learned ranges, a reconstruction."""
    place = tmp_path_factory.mktemp("generate")
    config = tuning_config(write_documents(place / "text.txt"), place / "outputs")
    config.paths.cache_dir = None  # inside of output_dir
    config.quantizer.qfem = QFeMConfig(alpha=2.0)
    config.tuning.ranges = "learned"
    config.reconstruction = ReconstructionConfig(name="scales", method="blockwise", epochs=1)
    pipeline.run(config)
    return pipeline.run_folder(config)


def remade(folder: Path, heard: list[Event]) -> RemadeRun:
    run = FinishedRun.read(folder)
    return RemadeRun(folder, run.record, run.prefix(), heard.append)


def artifacts(folder: Path) -> set[Path]:
    return set((folder.parents[3] / "cache").glob("*/*"))


def test_every_row_is_made_again_from_the_folder_and_the_cache_alone(folder: Path) -> None:
    heard: list[Event] = []
    run, before = remade(folder, heard), artifacts(folder)
    record = json.loads((folder / "result.json").read_text())
    reconstructed = [row["name"] for row in record["rows"] if row["reconstructed"]]
    assert reconstructed == ["quantized_reconstructed", "quantized_tuned_reconstructed"]
    assert any(row["learned_ranges"] for row in record["rows"])
    assert all(stage["kept"] for stage in record["qfem"].values())
    context = Context(run.prepared.lm, ArtifactStore(run.config.paths.cache), heard.append)
    ((corpus, blocks),) = run.prepared.blocks.items()
    for row in record["rows"]:
        with run.model(row) as model:
            measured = compute(PerplexityStep(model, run.config.eval, blocks, "", run.prepared.bos), context)
            assert measured.value == row["values"][f"perplexity/{corpus}"]
    assert artifacts(folder) == before
    assert not [event for event in heard if isinstance(event, Progress)]


def test_a_search_that_finds_another_token_by_now_is_refused(folder: Path) -> None:
    run = remade(folder, [])
    run._record["prefix"] = {**run._record["prefix"], "token_ids": [7]}
    with pytest.raises(ArtifactError, match=r"finds other tokens by now \(\[.*\], and it was \[7\]\): run it again"):
        run.prefix(FOUND)


def test_greedy_text_is_what_a_pass_over_all_before_it_predicts(folder: Path) -> None:
    run = remade(folder, [])
    lm, row = run.prepared.lm, run_rows(folder)[-1]
    tokens = lm.encode("a prefix of keys")[None]
    generation = lm.model.generation_config
    generation.eos_token_id, generation.top_k, generation.repetition_penalty = None, 3, 5.0  # a model's own choices
    generation.no_repeat_ngram_size, generation.min_new_tokens, generation.suppress_tokens = 1, 20, list(range(200))
    new = generate(run.model(row), tokens, Sampling(6))
    assert len(new) == 6 and lm.model.generation_config is generation
    with run.model(row) as model, torch.no_grad():
        model.put_on()
        for token in new:
            cache = model.behind.cache(lm.model)
            assert token == int(lm.model(input_ids=tokens, past_key_values=cache).logits[0, -1].argmax())
            tokens = torch.cat([tokens, torch.tensor([[token]])], dim=1)
    warm = [generate(run.model(row), tokens, Sampling(6, 5.0, seed)) for seed in (1, 1, 2)]
    assert warm[0] == warm[1] != warm[2]


def run_rows(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "result.json").read_text())["rows"]
    return rows


def test_rows_are_streamed_one_after_another(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("the sink\n"))
    main([str(folder / "result.json"), "-", "--row", "quantized", "--beside", "--max-new-tokens", "4"])
    out, err = capsys.readouterr()
    run = remade(folder, [])
    tokens = run.prepared.lm.encode("the sink")[None]
    wanted = ""
    for row in (FULL_PRECISION, next(row for row in run_rows(folder) if row["name"] == "quantized")):
        new = generate(run.model(row), tokens, Sampling(4))
        wanted += f"[{row['label']}]\n{run.prepared.lm.tokenizer.decode(new, skip_special_tokens=True)}\n"
    assert out == wanted
    assert not err


def test_what_the_cache_lacks_is_computed_anew_and_said(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["a sink", "--row", "quantized_found", "--max-new-tokens", "4"]
    main([str(folder), *words])
    whole = capsys.readouterr()
    copy = tmp_path / folder.relative_to(folder.parents[3])
    shutil.copytree(folder, copy)  # without the cache, which lies above it
    main([str(copy), *words])
    alone = capsys.readouterr()
    assert alone.out == whole.out
    assert "cushion-generate: calibration: not in the cache, computed anew" in alone.err
    assert "anew" not in whole.err
    assert artifacts(copy)


def test_a_chat_ends_where_the_answer_begins(tiny: Callable[..., LanguageModel]) -> None:
    lm = tiny("llama")
    lm.tokenizer.chat_template = (
        "{{ bos_token }}{% for one in messages %}({{ one.role }}) {{ one.content }} {% endfor %}"
        "{% if add_generation_prompt %}(assistant){% endif %}"
    )
    text = "(user) hello (assistant)"
    for bos in (False, True):  # the template writes it, and this tokenizer does not
        assert prompt_tokens(lm, "hello", True, bos)[0].tolist() == [lm.bos_token_id, *lm.encode(text).tolist()]


def refused(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line with which the command refuses."""
    with pytest.raises(SystemExit) as left:
        main([str(word) for word in words])
    assert left.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    return str(line.removeprefix("cushion-generate: error: "))


def test_what_cannot_be_is_refused_in_one_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = refused(capsys, folder, "x", "--row", "quantized_tunde")
    assert line.startswith("--row='quantized_tunde' is not a row of this run: choose one of full_precision, ")
    assert line.endswith("did you mean 'quantized_tuned'?")
    assert "--max-new-tokens=0 is not allowed" in refused(capsys, folder, "x", "--max-new-tokens", 0)
    assert "--temperature=nan is not allowed" in refused(capsys, folder, "x", "--temperature", "nan")
    assert "or a number from 0.0001 on" in refused(capsys, folder, "x", "--temperature", "1e-40")
    assert "--seed=-1 is not allowed: it must be from 0" in refused(capsys, folder, "x", "--seed", -1)
    assert "PROMPT is not UTF-8 text (" in refused(capsys, folder, "caf\udce9")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8"))
    assert "iconv -t UTF-8 makes it such" in refused(capsys, folder, "-")
    assert "PROMPT='' gives the model nothing" in refused(capsys, folder, "", "--row", "full_precision")
    assert "has no chat template" in refused(capsys, folder, "x", "--chat")
    assert "holds no result.json" in refused(capsys, tmp_path, "x")
    record = json.loads((folder / "result.json").read_text())
    del record["integrity"]
    shutil.copytree(folder, tmp_path / "run")

    def change(**changed: Any) -> None:
        (tmp_path / "run" / "result.json").write_text(json.dumps({**record, **changed}))

    change(model={**record["model"], "fingerprint": "0123"})
    line = refused(capsys, tmp_path / "run", "x", "--row", "full_precision")
    assert line.startswith("model.path='tiny:llama' is not what it was for the run")
    change(config={**record["config"], "search": {**record["config"]["search"], "former": 1}})
    line = refused(capsys, tmp_path / "run", "x")
    assert "whose configuration this version does not read (search.former: Key 'former' not in 'SearchConfig'" in line
    change(schema_version=7)
    assert "is not a result of schema version 1 or 2" in refused(capsys, tmp_path / "run", "x")


@pytest.mark.parametrize("name", ["learned.safetensors", "reconstructed.safetensors"])
def test_what_was_learned_is_read_only_as_the_run_left_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run = tmp_path / "moved"
    shutil.copytree(folder, run)
    (run / "samples").mkdir()
    (run / "samples" / "another.jsonl").touch()
    FinishedRun.read(run)  # neither the folder's name nor the samples matter
    shutil.copy(run / ({"learned.safetensors", "reconstructed.safetensors"} - {name}).pop(), run / name)
    line = refused(capsys, run, "x", "--row", "quantized")
    way_out = "run it again, which computes anew what does not fit"
    assert line == f"{run / 'result.json'} does not fit what lies beside it ({name}): {way_out}"


@pytest.mark.parametrize(
    ("number", "told"),
    [(errno.ENOLCK, "files cannot be locked (No locks"), (errno.EROFS, "x: Read-only"), (errno.ENOSPC, "[Errno 28]")],
)
def test_a_place_that_cannot_be_used_is_told_in_one_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int, told: str
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number), *(["x"] if number == errno.EROFS else []))

    monkeypatch.setattr(artifacts_module, "FileLock", refuse)
    monkeypatch.setattr(artifacts_module, "misfit", lambda *_: "is not there")
    line = refused(capsys, folder, "x", "--row", "quantized")
    assert line.startswith(told)
    assert ("give the same command again" if number == errno.ENOSPC else "copy the run's folder") in line


COMMANDS = {
    "cushion-generate": ("generate", ["x"]),
    "cushion-export": ("export.cli", ["there", "--to", "tokens"]),
    "cushion-report": ("reporting.cli", []),
    "cushion-status": ("reporting.status", []),
    "cushion": ("rerun", []),
}
"""The module and the further words of every command that is given the folder of a run or more."""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_no_file_system_has_is_told_in_one_line(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, further = COMMANDS[command]
    with pytest.raises(SystemExit) as left:
        importlib.import_module(f"cushion.{module}").main(["a" * 300, *further])
    assert left.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{command}: error: aaa") and ": File name too long: " in line


def test_a_prefix_that_the_library_drops_on_the_way_is_missed(tiny: Callable[..., LanguageModel]) -> None:
    lm = tiny("phi3")
    lm.model.config.original_max_position_embeddings = 16
    model = QuantizedLazily(lm, Prefix.from_tokens(lm.model, [256, 10, 65]))
    assert len(generate(model, lm.encode("one")[None], Sampling(4))) == 4
    with pytest.raises(ConfigError, match=r"'phi3' dropped the cache .* prefix of 3 tokens .*embeddings=16"):
        generate(model, lm.encode("one")[None], Sampling(20))


def test_a_text_that_does_not_fit_the_context_is_refused(folder: Path) -> None:
    run = remade(folder, [])
    room = run.prepared.lm.context_length
    assert room is not None
    tokens = torch.zeros((1, room - len(run.prefix("tuned")) - 3), dtype=torch.long)
    with pytest.raises(ConfigError, match=rf"--max-new-tokens=4 behind .* needs {room + 1} positions"):
        generate(run.model(run_rows(folder)[-1]), tokens, Sampling(4))


def test_nothing_is_said_before_a_text_is_refused_that_does_not_fit_the_last_row(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "x" * (256 - 3)  # a token a byte: it fits the row without a prefix
    with pytest.raises(SystemExit):
        main([str(folder), text, "--beside", "--max-new-tokens", "3"])
    out, err = capsys.readouterr()
    assert not out
    assert re.fullmatch(r"cushion-generate: error: --max-new-tokens=3 behind [1-9]\d* tokens of prefix .*\n", err)
