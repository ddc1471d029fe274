"""Every shipped YAML file composes and converts to a RunConfig; a new file is covered as soon as it exists."""

from __future__ import annotations

import itertools
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from composing import composed
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from cushion.checks import from_plain
from cushion.cli import config_folder
from cushion.config import RunConfig, SearchRound, to_dict
from cushion.config_warnings import options_without_effect
from cushion.models.architectures import find_architecture
from cushion.models.tiny import TINY

CONF = config_folder()
OPTIONS = sorted(path.relative_to(CONF) for path in CONF.glob("*/*.yaml") if path.parent.name != "experiment")
EXPERIMENTS = sorted(path.relative_to(CONF) for path in CONF.glob("experiment/**/*.yaml"))
MODEL_TYPES = {
    "bloom_7b1": "bloom",
    "falcon_7b": "falcon",
    "gemma_2b": "gemma",
    "gemma2_2b": "gemma2",
    "gemma3_1b": "gemma3_text",
    "gemma3_4b": "gemma3_text",
    "gpt_oss_20b": "gpt_oss",
    "granite_8b": "granite",
    "llama2_7b": "llama",
    "llama2_13b": "llama",
    "llama2_70b": "llama",
    "llama3_8b": "llama",
    "llama3_70b": "llama",
    "mistral_7b": "mistral",
    "mixtral_8x7b": "mixtral",
    "olmo2_7b": "olmo2",
    "opt_6.7b": "opt",
    "opt_13b": "opt",
    "phi3_mini": "phi3",
    "pythia_6.9b": "gpt_neox",
    "qwen2_7b": "qwen2",
    "qwen2_57b_a14b": "qwen2_moe",
    "qwen1.5_moe_a2.7b": "qwen2_moe",
    "qwen3_8b": "qwen3",
    "qwen3_30b_a3b": "qwen3_moe",
    "smollm2_135m": "llama",
    "smollm2_1.7b": "llama",
    "solar_10.7b": "llama",
    "starcoder2_7b": "starcoder2",
}
"""The architecture of every model that is named in conf/model, as its own config.json has it;
of a multimodal one, that of its text part."""

NEEDED = {
    "search/tokens": ["search.tokens=a"],
    "reconstruction/omniquant": ["quantizer=omniquant"],
    "reconstruction/omniquant_short": ["quantizer=omniquant"],
}
"""What a user has to say beside an option, where the option alone is not a whole configuration."""


def mandatory(file: Path) -> list[str]:
    """Overrides for the keys that a file leaves open, with ??? or an empty text."""
    record = OmegaConf.to_container(OmegaConf.load(CONF / file))
    return [f"{file.parent}.{key}=given" for key, value in record.items() if value in ("???", "")]


def command_of(file: Path) -> list[str]:
    """The overrides of the command that an experiment carries in its first lines."""
    head = (CONF / file).read_text(encoding="utf-8").splitlines()[:3]
    commands = [line.removeprefix("# ") for line in head if line.startswith("# cushion ")]
    assert len(commands) == 1, f"{file} says in its first lines by which command it is run"
    return [word for word in shlex.split(commands[0])[1:] if word not in ("-m", "--multirun")]


def test_every_group_of_the_configuration_has_files() -> None:
    assert {file.parent.name for file in OPTIONS} == {
        "model", "data", "quantizer", "search", "tuning", "reconstruction", "eval", "tracking",
    }  # fmt: skip


def together() -> list[list[Path]]:
    """All options, several groups' at a time where none of them asks anything of the others."""
    free = ("model", "data", "quantizer", "search")
    files = {name: [file for file in OPTIONS if file.parent.name == name and not needed(file)] for name in free}
    several = [[file for file in row if file is not None] for row in itertools.zip_longest(*files.values())]
    return several + [[file] for file in OPTIONS if file not in itertools.chain(*files.values())]


def needed(file: Path) -> list[str]:
    return mandatory(file) + NEEDED.get(file.with_suffix("").as_posix(), [])


@pytest.mark.parametrize("files", together(), ids=lambda files: "+".join(str(file.with_suffix("")) for file in files))
def test_every_option_composes_and_brings_its_values(files: list[Path]) -> None:
    config = composed(*(f"{file.parent.name}={file.stem}" for file in files), *itertools.chain(*map(needed, files)))
    assert isinstance(config, RunConfig)
    for file in files:
        group, values = file.parent.name, OmegaConf.to_container(OmegaConf.load(CONF / file))
        part = to_dict(config)[group]
        for key, value in values.items():
            if value in ("???", ""):
                assert part[key] == "given"
            elif isinstance(value, dict):
                assert {name: part[key][name] for name in value if value[name] != "${data.path}"} == {
                    name: item for name, item in value.items() if item != "${data.path}"
                }
            else:
                assert part[key] == value
        if group in ("quantizer", "search") and not needed(file):
            own = getattr(config, group)
            assert own == from_plain(type(own), values)
        if len(files) > 1:  # none of the others has to be there for it to have an effect
            assert options_without_effect(replace(composed(), **{group: getattr(config, group)})) == []
    assert options_without_effect(config) == []


def test_an_options_name_is_its_files_name() -> None:
    for file in OPTIONS:
        if file.parent.name != "model":
            assert OmegaConf.load(CONF / file)["name"] == file.stem, file


@pytest.mark.parametrize("file", [file for file in OPTIONS if mandatory(file)], ids=str)
def test_a_value_left_open_must_be_given(file: Path) -> None:
    with pytest.raises(ValueError, match="path"):
        composed(f"{file.parent.name}={file.stem}")


def test_the_architecture_of_every_model_is_in_the_table() -> None:
    """Tried on a tiny model of the same class; `tests/models/test_architectures.py` says what it finds there."""
    options = {file.stem for file in OPTIONS if file.parent.name == "model"}
    assert options - {"hub", "tiny"} == set(MODEL_TYPES)
    for model_type in set(MODEL_TYPES.values()):
        settings = TINY[model_type]()
        assert settings.model_type == model_type
        architecture = find_architecture(settings, "me/mine")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
        assert len(model.get_submodule(architecture.blocks)) == settings.num_hidden_layers


def test_a_map_of_devices_can_be_given_on_the_command_line() -> None:
    assert composed("model.device_map=auto").model.device_map == "auto"
    by_module = composed("model.device_map={model.layers.0:0,lm_head:cuda:1}").model.device_map
    assert by_module == {"model.layers.0": 0, "lm_head": "cuda:1"}


def test_one_path_serves_all_purposes_of_a_file() -> None:
    config = composed("data=file", "data.path=mine.txt")
    assert {corpus.path for corpus in config.data.purposes().values()} == {"mine.txt"}


@pytest.mark.parametrize("file", EXPERIMENTS, ids=str)
def test_every_experiment_composes_by_the_command_in_its_head(file: Path) -> None:
    overrides = command_of(file)
    assert f"experiment={file.relative_to('experiment').with_suffix('')}" in [word.lstrip("+") for word in overrides]
    config = composed(*overrides)
    assert config.experiment == file.stem
    assert options_without_effect(config) == []


def test_no_experiment_says_by_key_what_the_command_line_chooses_by_option() -> None:
    """`search=none` would leave a `search.method` of the experiment's own file as it is."""
    for file in EXPERIMENTS:
        own = OmegaConf.to_container(OmegaConf.load(CONF / file))
        for group in {option.parent.name for option in OPTIONS} & set(own):
            assert not {"name", "method"} & set(own[group]), (file, group)


@pytest.mark.parametrize("name", ["main", "cushioncache_table1", "smollm2/cushioncache_table1", "ablation_tau"])
def test_the_command_line_wins_over_an_experiment(name: str) -> None:
    """Alone, that sweeps, that starts from another one, and that sets keys of the groups."""
    config = composed(f"experiment={name}", "tuning=none", "search=none", "seed=7")
    assert (config.tuning.method, config.search.method, config.seed) == ("none", "none", 7)


def test_the_first_experiments_need_no_network_and_little_time() -> None:
    """`smoke` has every step, on a random model; `quick` the effect of one token on a real one."""
    smoke, quick = composed("experiment=smoke"), composed("experiment=quick")
    for config in (smoke, quick):
        assert {corpus.source for corpus in config.data.purposes().values()} == {"embedded"}
        assert (config.quantizer.name, config.tracking.backend, config.eval.tasks) == ("per_tensor_static", "none", [])
    assert (smoke.model.path, smoke.search.method, smoke.tuning.method) == ("tiny:llama", "greedy", "prefix")
    assert smoke.search.candidates * smoke.search.max_length <= 64 and smoke.tuning.steps <= 6
    assert smoke.eval.blocks * smoke.eval.block_length <= 256
    assert (quick.model.path, quick.search.method, quick.search.tokens) == ("embedded:smollm2-135m", "tokens", " ")
    assert quick.tuning.method == "none" and quick.eval.blocks * quick.eval.block_length <= 2048


def test_the_default_is_the_embedded_model_and_the_embedded_text() -> None:
    config = composed()
    assert config.model.path.startswith("embedded:")
    assert {corpus.source for corpus in config.data.purposes().values()} == {"embedded"}


def test_the_quantizers_of_qfep_and_qfem_are_the_dynamic_one_with_weights_per_channel() -> None:
    dynamic = to_dict(composed("quantizer=per_tensor_dynamic", "quantizer.weights.granularity=per_channel").quantizer)
    for name in ("qfep", "qfem", "qfem_qfep"):
        own = to_dict(composed(f"quantizer={name}").quantizer)
        assert {**own, "name": "", "qfem": None} == {**dynamic, "name": "", "qfem": None}, name


def test_quantizers_and_searches_combine_freely() -> None:
    """All pairs, made of what the files say, which is what composing gives: no check of a whole refuses one."""
    parts: dict[str, dict[str, Any]] = {"quantizer": {}, "search": {}}
    for file in OPTIONS:
        group = file.parent.name
        if group in parts and not needed(file):
            kind = type(getattr(RunConfig(), group))
            parts[group][file.stem] = from_plain(kind, OmegaConf.to_container(OmegaConf.load(CONF / file)))
    for (quantizer, one), (search, other) in itertools.product(parts["quantizer"].items(), parts["search"].items()):
        config = replace(RunConfig(), quantizer=one, search=other)
        assert (config.quantizer.name, config.search.name) == (quantizer, search)
    both = composed("quantizer=w4a8", "search=qfep")
    assert (both.quantizer, both.search) == (parts["quantizer"]["w4a8"], parts["search"]["qfep"])


def test_a_share_of_records_and_the_largest_batch_can_be_given_as_lm_eval_has_them() -> None:
    found = composed("eval.tasks=[copa]", "eval.limit=0.1", "eval.task_batch_size=auto").eval
    assert (found.limit, found.task_batch_size) == (0.1, "auto")


def test_rounds_can_be_given_on_the_command_line() -> None:
    rounds = composed("search.rounds=[{depth: 0.2, tokens: 8, keep: 500}, {keep: 3, text: start}]").search.rounds
    assert rounds == [SearchRound(0.2, 8, 500, "spikes"), SearchRound(1.0, 8, 3, "start")]


def test_a_file_that_has_changed_is_read_as_it_is_now(tmp_path: Path) -> None:
    """The suite reads the same text once; that must not hide a change."""
    found = []
    for value in (1, 2):
        (tmp_path / "own.yaml").write_text(f"value: {value}\nagain: ${{value}}\n")
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(tmp_path), version_base="1.3"):
            found.append(compose("own").again)
    assert found == [1, 2]
