"""What is refused before any work, in which order, which text is asked for, and how the texts are laid out."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from tiny_run import saved_model, searching_config, small_config, tuning_config

from cushion import pipeline
from cushion.config import (
    ActivationConfig,
    CalibrationConfig,
    CorpusConfig,
    QFeMConfig,
    QuantizerConfig,
    ReconstructionConfig,
    RunConfig,
    SearchConfig,
)
from cushion.errors import ConfigError, DataError, ModelNotFoundError, UnsupportedModelError
from cushion.preparation import choose_device, prepare

DYNAMIC = QuantizerConfig(activations=ActivationConfig(range="dynamic"))
SMOOTHED = QuantizerConfig(activations=ActivationConfig(range="dynamic"), smoothing_alpha=0.5)
BOTH_TUNED = {"evaluation", "calibration", "tuning", "search"}


@pytest.mark.parametrize("measured", [True, False])
def test_further_corpora_are_read_for_perplexity_alone(text_file: Path, tmp_path: Path, measured: bool) -> None:
    config = small_config(text_file, tmp_path / "out")
    config.data.further = {"other": CorpusConfig(source="file", path=str(tmp_path / "missing.txt"))}
    if measured:
        with pytest.raises(DataError, match=r"no data file .*missing\.txt"):
            prepare(config, "cpu")
        return
    config.eval.perplexity = False
    found = prepare(config, "cpu")
    assert set(found.corpora) == {"evaluation", "calibration"}
    assert found.blocks == {}


@pytest.mark.parametrize(
    "key",
    [
        "eval.blocks", "eval.activation_blocks", "quantizer.calibration.samples", "reconstruction.samples",
        "search.verify_texts", "search.texts", "tuning.sequences", "tuning.held_out_sequences",
    ],
)  # fmt: skip
def test_the_key_that_asks_for_more_text_than_there_is_is_named(text_file: Path, tmp_path: Path, key: str) -> None:
    config = tuning_config(text_file, tmp_path / "out")
    config.eval.perplexity = key != "eval.activation_blocks"
    if key == "reconstruction.samples":
        config.reconstruction = ReconstructionConfig("weights", "blockwise")
    if key == "search.texts":
        config.search = SearchConfig("qfep", "qfep", text_length=16)
    above, _, name = key.rpartition(".")
    setattr(attrgetter(above)(config), name, 10**5)
    asked = rf"but 1000\d\d were asked for by .*{re.escape(key)}\b.*: (lower|ask for fewer)"
    with pytest.raises(DataError, match=asked):
        prepare(config, "cpu")


# ---- devices ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("mps", r"device='mps' is not available here: this torch is built without it; use device=cpu or auto"),
        ("meta", r"device='meta' is not supported: auto, cpu, cuda, cuda:<number> or mps"),
        ("cuda:7", r"device='cuda:7' is not available here: torch sees \d GPUs; use device=cpu or auto"),
        ("gpu", r"device='gpu' is not allowed: auto, cpu, cuda, cuda:<number> or mps"),
        ("", r"device='' is not allowed"),
        ("cuda:x", r"device='cuda:x' is not allowed"),
    ],
)
def test_a_device_that_cannot_be_used_is_refused(text_file: Path, tmp_path: Path, device: str, message: str) -> None:
    if (device == "cuda:7" and torch.cuda.device_count() > 7) or (device == "mps" and torch.backends.mps.is_built()):
        pytest.skip("here it can be used")
    config = small_config(text_file, tmp_path / "out")
    config.device = device
    with pytest.raises(ConfigError, match=message):
        choose_device(config)
    with pytest.raises(ConfigError, match=message):
        pipeline.run(config)
    assert not (tmp_path / "out").exists()


def test_a_gpu_of_apple_is_taken_where_torch_sees_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_built", lambda: True)
    for sees in (True, False):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda sees=sees: sees)
        for device in ("mps", "mps:0", "mps:1"):
            if sees and device != "mps:1":
                assert choose_device(RunConfig(device=device)) == device
            else:
                with pytest.raises(ConfigError, match=r"not available here: torch sees no such GPU of Apple"):
                    choose_device(RunConfig(device=device))
        assert choose_device(RunConfig(device="auto")) == ("cuda" if torch.cuda.is_available() else "cpu")


def test_auto_is_a_device_that_is_there() -> None:
    assert choose_device(RunConfig(device="auto")) == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device(RunConfig(device="cpu")) == "cpu"


# ---- the model comes before the text ------------------------------------------------------------------------------


def test_a_model_that_is_not_there_is_refused_before_any_text_is_read(tmp_path: Path) -> None:
    config = small_config(tmp_path / "no_text.txt", tmp_path / "out")
    config.model.path = str(tmp_path / "no_model")
    for start in (lambda: prepare(config, "cpu"), lambda: pipeline.run(config)):
        with pytest.raises(ModelNotFoundError, match=r"no_model' is not a folder: check the path"):
            start()
    saved_model(tmp_path / "no_model")
    with pytest.raises(DataError, match=r"no data file .*no_text\.txt"):
        pipeline.run(config)


def test_a_quantized_checkpoint_is_refused_before_any_text_is_read(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    settings = (folder / "config.json").read_text(encoding="utf-8").strip()
    added = '{ "quantization_config": {"quant_method": "awq", "bits": 4},' + settings.removeprefix("{")
    (folder / "config.json").write_text(added, encoding="utf-8")
    config = small_config(tmp_path / "no_text.txt", tmp_path / "out")
    config.model.path = str(folder)
    with pytest.raises(UnsupportedModelError, match="weights that are quantized already"):
        pipeline.run(config)


# ---- which text a run asks for ------------------------------------------------------------------------------------


def needs(name: str, text: Path, output: Path) -> tuple[RunConfig, set[str]]:
    """A configuration, and the purposes whose text it cannot do without."""
    if name == "evaluation alone":
        config, purposes = small_config(text, output), {"evaluation"}
        config.quantizer = copy.deepcopy(DYNAMIC)
    elif name == "static ranges":
        config, purposes = small_config(text, output), {"evaluation", "calibration"}
    elif name == "smoothing":
        config, purposes = small_config(text, output), {"evaluation", "calibration"}
        config.quantizer = copy.deepcopy(SMOOTHED)
    elif name == "qfem":
        config, purposes = small_config(text, output), {"evaluation", "calibration"}
        config.quantizer = replace(DYNAMIC, qfem=QFeMConfig(alpha=5.0))
    elif name == "given prefix":
        config, purposes = small_config(text, output), {"evaluation"}
        config.quantizer = copy.deepcopy(DYNAMIC)
        config.search = SearchConfig(name="tokens", method="tokens", tokens="ab")
    elif name == "search":
        config, purposes = searching_config(text, output), {"evaluation", "search"}
        config.quantizer = copy.deepcopy(DYNAMIC)
    else:
        config, purposes = tuning_config(text, output), BOTH_TUNED
    config.quantizer.calibration = CalibrationConfig(samples=2, length=16)
    return config, purposes


@pytest.mark.parametrize(
    "name", ["evaluation alone", "static ranges", "smoothing", "qfem", "given prefix", "search", "everything"]
)
def test_only_the_text_that_a_run_needs_is_read(text_file: Path, tmp_path: Path, name: str) -> None:
    config, purposes = needs(name, text_file, tmp_path / "out")
    for purpose in BOTH_TUNED:
        missing = copy.deepcopy(config)
        setattr(missing.data, purpose, CorpusConfig("file", path=str(tmp_path / f"no_{purpose}.txt")))
        if purpose in purposes:
            with pytest.raises(DataError, match=rf"no data file .*no_{purpose}\.txt"):
                prepare(missing, "cpu")
        else:
            assert set(prepare(missing, "cpu").corpora) == purposes
    texts = prepare(config, "cpu").texts
    assert (texts.calibration is not None) == ("calibration" in purposes)
    assert (texts.search is not None) == ("search" in purposes)
    assert (texts.tuning is not None) == (texts.held_out is not None) == ("tuning" in purposes)


def test_a_run_goes_through_without_the_text_that_it_does_not_need(text_file: Path, tmp_path: Path) -> None:
    config, _ = needs("evaluation alone", text_file, tmp_path / "out")
    for purpose in ("calibration", "tuning", "search"):
        setattr(config.data, purpose, CorpusConfig("file", path=str(tmp_path / "nowhere.txt")))
    result = pipeline.run(config)
    assert result.status == "completed"
    assert list(result.data) == ["evaluation"]


# ---- how texts are laid out ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bos", "longest"), [("never", 256), ("always", 255)])
def test_calibration_texts_longer_than_the_context_are_refused(
    text_file: Path, tmp_path: Path, bos: str, longest: int
) -> None:
    """OPT looks positions up in a table, so that one too many is an error and not merely inaccurate."""
    config = small_config(text_file, tmp_path / "out")
    config.model.path = "tiny:opt"
    config.bos = bos
    config.quantizer.calibration.length = longest
    assert pipeline.run(config).status == "completed"
    config.quantizer.calibration.length = longest + 1
    with pytest.raises(ConfigError, match=rf"quantizer\.calibration\.length={longest + 1}"):
        pipeline.run(config)


def test_chats_are_texts_by_the_template_of_the_runs_model(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}\n{% endfor %}")
    chats = [{"messages": [{"role": "user", "content": f"question {n} " + "word " * 60}]} for n in range(40)]
    (tmp_path / "chats.json").write_text(json.dumps(chats))
    config = small_config(tmp_path / "chats.json", tmp_path / "out")
    config.model.path = str(folder)
    found = prepare(config, "cpu")
    ((_, blocks),) = found.blocks.items()
    assert re.match(r"\[user\]question \d+ word", found.lm.decode(blocks[0].tolist()))


def test_training_and_held_out_texts_do_not_overlap(text_file: Path, tmp_path: Path) -> None:
    config = tuning_config(text_file, tmp_path / "out")
    texts = prepare(config, "cpu").texts
    assert texts.tuning is not None
    assert texts.held_out is not None
    assert (len(texts.tuning), len(texts.held_out)) == (config.tuning.sequences, config.tuning.held_out_sequences)
    rows = [tuple(row) for row in torch.cat([texts.tuning, texts.held_out]).tolist()]
    assert len(set(rows)) == len(rows)
