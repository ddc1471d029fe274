"""Loading: from a folder and from nothing, refusals in one sentence, and a fingerprint that follows the weights."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FAMILIES
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file
from tiny_run import saved_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoTokenizer,
    Gemma3Config,
    GPT2Config,
    Mistral3Config,
    PreTrainedConfig,
)
from transformers.quantizers.quantizer_gguf import GgufHfQuantizer
from transformers.utils import hub
from transformers.utils.quantization_config import QuantizationConfigMixin, QuantizationMethod

from cushion.config import ModelConfig, PathsConfig
from cushion.errors import ConfigError, ModelNotFoundError, UnsupportedModelError
from cushion.models import LanguageModel, check_model, load_language_model
from cushion.models.language_model import _fingerprint
from cushion.models.tiny import TINY, tiny_model
from cushion.prefix import Prefix

Tiny = Callable[..., LanguageModel]
IDS = torch.tensor([[5, 80, 200, 7]])


def load(path: Path | str, **options: Any) -> LanguageModel:
    return load_language_model(ModelConfig(path=str(path), **options), PathsConfig())


def save(lm: LanguageModel, folder: Path) -> Path:
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tiny: Tiny, tmp_path: Path) -> Path:
    """A tiny llama saved the usual way: config.json, model.safetensors, tokenizer files."""
    return save(tiny("llama"), tmp_path / "saved-llama")


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    record = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    file.write_text(json.dumps({k: v for k, v in record.items() if v is not None}), encoding="utf-8")


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def assert_one_sentence(error: BaseException, folder: Path) -> None:
    assert str(folder) in str(error)
    assert "\n" not in str(error)


# ---- loading --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_saved_model_is_the_model(tiny: Tiny, tmp_path: Path, family: str) -> None:
    original = tiny(family)
    saved = LanguageModel(
        tiny_model(family), original.tokenizer, original.architecture, "", ""
    )  # as transformers has it
    loaded = load(save(saved, tmp_path / "saved"))
    assert torch.equal(loaded.model(input_ids=IDS).logits, original.model(input_ids=IDS).logits)
    assert loaded.architecture is original.architecture
    assert loaded.label == "saved"
    assert loaded.encode("A téxt").tolist() == original.encode("A téxt").tolist()


VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SEEING: dict[str, PreTrainedConfig] = {
    "gemma3_text": Gemma3Config(
        text_config=TINY["gemma3_text"](), vision_config={**VISION, "image_size": 28, "patch_size": 14}
    ),
    "mistral": Mistral3Config(
        text_config=TINY["mistral"](), vision_config={**VISION, "model_type": "pixtral", "head_dim": 8}
    ),
}
"""Multimodal models by the family of their text part."""


@pytest.mark.parametrize("names", ["the hub's", "transformers' own"])
@pytest.mark.parametrize("family", SEEING)
@torch.no_grad()
def test_the_text_part_of_a_multimodal_model_is_loaded_alone(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, names: str
) -> None:
    """And is the multimodal model, where that reads text alone; a prefix that is made with one serves the other."""
    torch.manual_seed(3)
    whole: Any = AutoModelForImageTextToText.from_config(SEEING[family]).eval()
    for parameter in whole.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    folder = tmp_path / "saved"
    whole.save_pretrained(folder, save_original_format=names == "the hub's")
    tiny(family).tokenizer.save_pretrained(folder)
    check_model(ModelConfig(path=str(folder)))
    lm = load(folder)
    assert "UNEXPECTED" not in capsys.readouterr().err
    assert type(lm.model) is type(tiny_model(family))
    assert lm.architecture is tiny(family).architecture
    torch.testing.assert_close(lm.model(input_ids=IDS).logits, whole(input_ids=IDS).logits, rtol=1e-5, atol=1e-5)
    prefix = Prefix.from_tokens(lm.model, [17, 42])
    behind = [m(IDS, past_key_values=prefix.cache(m), use_cache=True).logits for m in (lm.model, whole)]
    torch.testing.assert_close(behind[0], behind[1], rtol=1e-5, atol=1e-5)
    assert sum(p.numel() for p in lm.model.parameters()) < sum(p.numel() for p in whole.parameters())


@torch.no_grad()
def test_torch_file_is_loaded_in_the_weights_only_mode(tiny: Tiny, folder: Path) -> None:
    original = tiny("llama")
    (folder / "model.safetensors").unlink()
    torch.save(dict(original.model.state_dict()), folder / "pytorch_model.bin")
    assert torch.equal(load(folder).model(input_ids=IDS).logits, original.model(input_ids=IDS).logits)


def test_relative_and_home_paths_are_folders(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load(folder).model.state_dict()
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    for path in ("./saved-llama", "saved-llama", "~/saved-llama"):
        actual = load(path).model.state_dict()
        assert all(torch.equal(actual[name], expected[name]) for name in expected)


@pytest.mark.parametrize("source", ["tiny", "folder"])
def test_dtype_is_honoured(folder: Path, source: str) -> None:
    lm = load("tiny:llama" if source == "tiny" else folder, dtype="bfloat16")
    assert {p.dtype for p in lm.model.parameters()} == {torch.bfloat16}


def test_model_is_frozen_and_in_evaluation_mode(tiny: Tiny, folder: Path) -> None:
    for lm in (tiny("opt"), load(folder)):
        assert not any(module.training for module in lm.model.modules())
        assert not any(p.requires_grad for p in lm.model.parameters())


def test_text_comes_back_from_its_tokens(tiny: Tiny) -> None:
    lm, text = tiny(), "A text\n with ümlauts <s> and\tmore."
    assert lm.decode(lm.encode(text).tolist()) == text
    assert lm.encode("ab").shape == (2,)  # no special tokens are added


def test_bos_falls_back_on_eos_and_then_on_none(tiny: Tiny) -> None:
    lm = tiny()
    assert lm.bos_token_id == 256
    lm.tokenizer.bos_token = None
    assert lm.bos_token_id == 257
    lm.tokenizer.eos_token = None
    assert lm.bos_token_id is None


def test_tiny_models_are_the_same_bits_for_a_seed() -> None:
    config, paths = ModelConfig(path="tiny:llama"), PathsConfig()
    one, again, other = (load_language_model(config, paths, seed=seed).model.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


# ---- refusals -------------------------------------------------------------------------------------------------------


def test_unknown_tiny_model_is_refused() -> None:
    with pytest.raises(ModelNotFoundError, match=r"'tiny:lama' does not exist.*tiny:mistral.*did you mean 'llama'"):
        load("tiny:lama")


def test_unsupported_architecture_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path / "gpt2")  # a configuration and nothing else: no weights, no tokenizer
    with pytest.raises(UnsupportedModelError, match=r"the architecture 'gpt2', which is not supported \(supported:"):
        load(tmp_path / "gpt2")


@pytest.mark.parametrize("model_type", ["llamma", None])
def test_architecture_that_nobody_knows_is_refused(folder: Path, model_type: str | None) -> None:
    edit_config(folder, model_type=model_type)
    with pytest.raises((UnsupportedModelError, ModelNotFoundError)) as caught:
        load(folder)
    assert_one_sentence(caught.value, folder)


def test_missing_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path / "nowhere"), "./nowhere", "~/no-such-folder-here", "a/b/c"):
        with pytest.raises(ModelNotFoundError, match=f"model.path='{path}' is not a folder: check the path"):
            load(path)


def test_hub_id_that_cannot_be_reached_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match=r"model.path='nobody/nothing-at-all' cannot be loaded") as caught:
        load("nobody/nothing-at-all")
    assert "\n" not in str(caught.value)


def hub_error(kind: type[Exception]) -> Exception:
    """An error as huggingface_hub raises it, over several lines."""
    if kind in (LocalEntryNotFoundError, OfflineModeIsEnabled):
        return kind("Cannot reach\nthe hub")
    response = hub.httpx.Response(
        403, request=hub.httpx.Request("GET", "https://huggingface.co/meta-llama/Llama-2-7b-hf")
    )
    return kind("403 Client Error.\n\nAccess is restricted.", response=response)


@pytest.mark.parametrize(
    ("kind", "way_out"),
    [
        (
            GatedRepoError,
            "it is gated: accept its licence at https://huggingface.co/meta-llama/Llama-2-7b-hf, then `hf auth login` "
            "with an account that may read it (or set HF_TOKEN)",
        ),
        (RepositoryNotFoundError, "the hub has no such model, or it is private: check the id, or `hf auth login` with"),
        (RevisionNotFoundError, "the hub has the model, but not model.revision=v9: check the revision"),
        (LocalEntryNotFoundError, "the hub cannot be reached, and the files are not in the local cache"),
        (OfflineModeIsEnabled, "HF_HUB_OFFLINE keeps the hub away, and the files are not in the local cache"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
@pytest.mark.parametrize("use", [check_model, lambda config: load_language_model(config, PathsConfig())])
def test_what_the_hub_refuses_is_told_in_one_line_with_the_way_out(
    monkeypatch: pytest.MonkeyPatch, use: Callable[[ModelConfig], Any], kind: type[Exception], way_out: str
) -> None:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise hub_error(kind)

    monkeypatch.setattr(hub, "hf_hub_download", refuse)  # below transformers, which makes errors of its own of these
    with pytest.raises(ModelNotFoundError) as caught:
        use(ModelConfig(path="meta-llama/Llama-2-7b-hf", revision="v9"))
    message = str(caught.value)
    assert message.startswith(f"model.path='meta-llama/Llama-2-7b-hf' cannot be loaded: {way_out}")
    assert "\n" not in message


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "weights cut": lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-100]),
    "weights cut in the header": lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:50]
    ),
    "weights garbage": lambda f: (f / "model.safetensors").write_bytes(b"garbage " * 100),
    "weights empty": lambda f: (f / "model.safetensors").write_bytes(b""),
    "weights gone": lambda f: (f / "model.safetensors").unlink(),
    "weights lack a tensor": lambda f: edit_weights(f, lambda w: w.pop("model.layers.1.mlp.up_proj.weight")),
    "weights of another shape": lambda f: edit_weights(
        f, lambda w: w.update({"model.layers.1.mlp.up_proj.weight": torch.zeros(3, 3)})
    ),
    "configuration cut": lambda f: (f / "config.json").write_text("{", encoding="utf-8"),
    "configuration gone": lambda f: (f / "config.json").unlink(),
    "tokenizer cut": lambda f: (f / "tokenizer.json").write_text("{", encoding="utf-8"),
    "tokenizer gone": lambda f: [file.unlink() for file in f.glob("tokenizer*")],
    "tokenizer of another format": lambda f: (f / "tokenizer.json").write_text('{"model": 5}', encoding="utf-8"),
    "tokenizer is a list": lambda f: (f / "tokenizer.json").write_text("[1, 2]", encoding="utf-8"),
    "tokenizer of an unknown kind": lambda f: (f / "tokenizer.json").write_text(
        (f / "tokenizer.json").read_text(encoding="utf-8").replace('"BPE"', '"XPE"'), encoding="utf-8"
    ),
    "configuration is a list": lambda f: (f / "config.json").write_text("[]", encoding="utf-8"),
    "size is a text": lambda f: edit_config(f, hidden_size="many"),
    "size is negative": lambda f: edit_config(f, hidden_size=-32),
    "size is zero": lambda f: edit_config(f, num_attention_heads=0),
    "heads do not divide": lambda f: edit_config(f, num_attention_heads=5),
    "another size": lambda f: edit_config(f, intermediate_size=48),
    "activation nobody knows": lambda f: edit_config(f, hidden_act="sily"),
    "context is a text": lambda f: edit_config(f, max_position_embeddings="long"),
    "dtype nobody knows": lambda f: edit_config(f, dtype="float12"),
    "more layers than weights": lambda f: edit_config(f, num_hidden_layers=5),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_folder_is_refused_in_one_sentence(folder: Path, damage: str) -> None:
    DAMAGES[damage](folder)
    with pytest.raises(ModelNotFoundError, match=r"model.path='.*saved-llama' cannot be loaded") as caught:
        load(folder)
    assert_one_sentence(caught.value, folder)


def test_quantized_checkpoint_is_refused_before_weights_are_read(folder: Path) -> None:
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128})
    (folder / "model.safetensors").unlink()
    for use in (check_model, lambda config: load_language_model(config, PathsConfig())):
        with pytest.raises(UnsupportedModelError, match="holds weights that are quantized already") as caught:
            use(ModelConfig(path=str(folder)))
        assert_one_sentence(caught.value, folder)


def test_check_reads_no_weights_and_accepts_what_can_be_loaded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    check_model(ModelConfig(path=str(folder)))
    with pytest.raises(ModelNotFoundError, match="is not a folder: check the path"):
        check_model(ModelConfig(path=str(folder / "nowhere")))
    edit_config(folder, model_type="gpt2")
    with pytest.raises(UnsupportedModelError, match="architecture 'gpt2'"):
        check_model(ModelConfig(path=str(folder)))


class Malicious:
    """Unpickling it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_pickled_code_is_refused_and_not_run(folder: Path, tmp_path: Path, how: str) -> None:
    trace = tmp_path / "was-run"
    content = {"lm_head.weight": Malicious(trace)}
    (folder / "model.safetensors").unlink()
    if how == "pickle":
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(content, protocol=2))
    else:
        torch.save(content, folder / "pytorch_model.bin")
    try:
        with pytest.raises(ModelNotFoundError, match="cannot be loaded") as caught:
            load(folder)
        assert_one_sentence(caught.value, folder)
    finally:
        assert not trace.exists()
    pickle.loads(pickle.dumps(Malicious(trace)))  # noqa: S301 - shows that the trap works
    assert trace.exists()


def test_code_in_a_model_folder_is_not_run(folder: Path, tmp_path: Path) -> None:
    trace = tmp_path / "was-run"
    (folder / "code.py").write_text(f"open({str(trace)!r}, 'w')\n", encoding="utf-8")
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    edit_config(folder, model_type="my-own", auto_map=auto_map)
    with pytest.raises((UnsupportedModelError, ModelNotFoundError)) as caught:
        load(folder)
    assert not trace.exists()
    assert_one_sentence(caught.value, folder)


@pytest.mark.parametrize("token", [-1, 260, 10**6])
def test_token_outside_the_vocabulary_is_refused(tiny: Tiny, token: int) -> None:
    lm = tiny()
    lm.check_token_ids([0, 259], "search.token_ids")
    with pytest.raises(ConfigError, match=rf"search.token_ids={token} is outside the vocabulary of .*: 0 to 259"):
        lm.check_token_ids([0, token], "search.token_ids")


def test_vocabulary_is_what_both_tokenizer_and_embeddings_have(tiny: Tiny) -> None:
    lm = tiny()
    lm.model.resize_token_embeddings(264)  # padded, as many released models are
    assert lm.vocabulary_size == 260
    lm.model.resize_token_embeddings(250)
    assert lm.vocabulary_size == 250


# ---- fingerprint ----------------------------------------------------------------------------------------------------


def test_fingerprint_is_stable(folder: Path) -> None:
    before = load(folder).fingerprint
    shutil.copytree(folder, folder.parent / "copy")
    shutil.rmtree(folder)
    (folder.parent / "copy").rename(folder)
    assert load(folder).fingerprint == before
    assert load("tiny:llama").fingerprint == load("tiny:llama").fingerprint


def test_fingerprint_follows_weights_dtype_and_source(folder: Path) -> None:
    seen = [load(folder).fingerprint, load(folder, dtype="bfloat16").fingerprint, load("tiny:llama").fingerprint]
    edit_weights(folder, lambda w: w["model.layers.2.mlp.down_proj.weight"][0, 0].add_(1e-3))
    seen.append(load(folder).fingerprint)
    assert len(set(seen)) == 4


def test_fingerprint_follows_the_configuration(folder: Path) -> None:
    """The same weights compute something else under another number of heads or another norm."""
    before = load(folder).fingerprint
    edit_config(folder, rms_norm_eps=0.1)
    assert load(folder).fingerprint != before


def test_fingerprint_of_a_hub_commit_follows_the_dtype() -> None:
    prints = set()
    for dtype in ("float32", "bfloat16"):
        lm = load("tiny:llama", dtype=dtype)
        lm.model.config._commit_hash = "0123abcd"
        prints.add(_fingerprint(lm.model, lm.tokenizer, ModelConfig(path="me/mine")))
    assert len(prints) == 2


def test_a_model_of_a_gguf_file_can_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers keeps the quantizer of a file whose weights it has dequantized, and refuses to save the model."""
    folder = saved_model(tmp_path / "model", lambda model: model)
    for kind in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):

        def load(*words: Any, own: Any = kind.from_pretrained, gguf_file: str | None = None, **options: Any) -> Any:
            found = own(*words, **options)
            if isinstance(found, tuple) and hasattr(
                found[0], "config"
            ):  # a model, as transformers leaves it behind such a file
                settings = QuantizationConfigMixin(quant_method=QuantizationMethod.GGUF)
                found[0].hf_quantizer, found[0].is_quantized = GgufHfQuantizer(settings), True
                found[0].config.quantization_config = settings
            return found

        monkeypatch.setattr(kind, "from_pretrained", load)
    lm = load_language_model(ModelConfig(path=str(folder), gguf_file="tiny.gguf"), PathsConfig())
    lm.model.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())


def test_fingerprint_tells_two_files_of_one_hub_commit_apart(tiny: Tiny) -> None:
    lm = tiny()
    lm.model.config._commit_hash = "0123abcd"
    files = ("model-Q4_0.gguf", "model-Q8_0.gguf")
    prints = {_fingerprint(lm.model, lm.tokenizer, ModelConfig(path="me/mine", gguf_file=name)) for name in files}
    assert len(prints) == 2
