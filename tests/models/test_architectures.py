"""The architecture table: its entries name the parts that the models really have, and how those hang together."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import EXPERTS, FAMILIES, SMOOTHABLE, VARIANTS
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    DynamicCache,
    FalconConfig,
    GPT2Config,
    Llama4Config,
    Llama4TextConfig,
    LlavaConfig,
    PreTrainedConfig,
    Qwen3MoeConfig,
)

from cushion.errors import ConfigError, UnsupportedModelError
from cushion.models import LanguageModel
from cushion.models.architectures import ARCHITECTURES, find_architecture
from cushion.models.tiny import TINY

Tiny = Callable[..., LanguageModel]
IDS = torch.tensor([[5, 80, 200, 7]])

LLAMA = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj"
MIXTURE = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj " + " ".join(
    f"mlp.experts.{e}.{name}" for e in range(4) for name in ("gate_proj", "up_proj", "down_proj")
)
FUSED = "dense_h_to_4h mlp.dense_4h_to_h"

# name of the tiny model, path of the blocks, linears of a block
ROWS = [
    ("llama", "model.layers", LLAMA),
    ("mistral", "model.layers", LLAMA),
    ("mixtral", "model.layers", MIXTURE),
    ("qwen2", "model.layers", LLAMA),
    ("qwen3", "model.layers", LLAMA),
    (
        "qwen2_moe",
        "model.layers",
        f"{MIXTURE} mlp.shared_expert.gate_proj mlp.shared_expert.up_proj mlp.shared_expert.down_proj",
    ),
    ("qwen3_moe", "model.layers", MIXTURE),
    ("gpt_oss", "model.layers", MIXTURE),
    ("granite", "model.layers", LLAMA),
    ("olmo2", "model.layers", LLAMA),
    (
        "starcoder2",
        "model.layers",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.c_fc mlp.c_proj",
    ),
    ("gemma", "model.layers", LLAMA),
    ("gemma2", "model.layers", LLAMA),
    ("gemma3_text", "model.layers", LLAMA),
    ("phi3", "model.layers", "self_attn.qkv_proj self_attn.o_proj mlp.gate_up_proj mlp.down_proj"),
    (
        "opt",
        "model.decoder.layers",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj fc1 fc2",
    ),
    (
        "opt_post_norm",
        "model.decoder.layers",
        "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj fc1 fc2",
    ),
    ("bloom", "transformer.h", f"self_attention.query_key_value self_attention.dense mlp.{FUSED}"),
    ("gpt_neox", "gpt_neox.layers", f"attention.query_key_value attention.dense mlp.{FUSED}"),
    ("gpt_neox_sequential", "gpt_neox.layers", f"attention.query_key_value attention.dense mlp.{FUSED}"),
    ("falcon", "transformer.h", f"self_attention.query_key_value self_attention.dense mlp.{FUSED}"),
    ("falcon_new_decoder", "transformer.h", f"self_attention.query_key_value self_attention.dense mlp.{FUSED}"),
    (
        "falcon_new_decoder_one_norm",
        "transformer.h",
        f"self_attention.query_key_value self_attention.dense mlp.{FUSED}",
    ),
    ("falcon_alibi", "transformer.h", f"self_attention.query_key_value self_attention.dense mlp.{FUSED}"),
]


def test_every_family_has_a_row_here_and_a_tiny_model() -> None:
    assert {row[0] for row in ROWS} == set(TINY) == set(VARIANTS)
    assert {TINY[name]().model_type for name in TINY} == set(ARCHITECTURES) == set(FAMILIES)


@pytest.mark.parametrize(("family", "path", "names"), ROWS, ids=[row[0] for row in ROWS])
def test_blocks_and_linears_are_found(tiny: Tiny, family: str, path: str, names: str) -> None:
    lm = tiny(family)
    assert lm.blocks is lm.model.get_submodule(path)
    assert len(lm.blocks) == lm.model.config.num_hidden_layers == 3
    assert sorted(lm.linears()) == sorted(f"{path}.{i}.{name}" for i in range(3) for name in names.split())


@pytest.mark.parametrize("family", VARIANTS)
def test_linears_are_those_of_the_blocks_and_nothing_else_is(tiny: Tiny, family: str) -> None:
    """Counted by walking the model: linears outside of the blocks are the head and projections of embeddings."""
    lm = tiny(family)
    every = {name: m for name, m in lm.model.named_modules() if isinstance(m, nn.Linear)}
    outside = {"lm_head", "embed_out", "model.decoder.project_in", "model.decoder.project_out"}
    path, routers = lm.architecture.blocks, lm.architecture.full_precision
    outside |= {f"{path}.{i}.{name}" for i in range(3) for name in routers}  # such as the gate of a shared expert
    linears = lm.linears()
    assert linears == {name: m for name, m in every.items() if name not in outside}
    assert lm.model.get_output_embeddings() not in linears.values()
    assert len(every) - len(linears) == {"opt_post_norm": 3, "qwen2_moe": 4}.get(family, 1)
    assert lm.linears(["all"]) == linears


@pytest.mark.parametrize("family", VARIANTS)
def test_weights_of_the_blocks_that_multiply_are_in_linears_but_for_routers(tiny: Tiny, family: str) -> None:
    """Whatever has two dimensions or more multiplies with hidden states: no fused or odd module is passed over."""
    lm = tiny(family)
    path = lm.architecture.blocks
    left = {name for name, p in lm.model.named_parameters() if name.startswith(path + ".") and p.dim() > 1}
    left -= {f"{name}.weight" for name in lm.linears()}
    assert left == {f"{path}.{i}.{name}.weight" for i in range(3) for name in lm.architecture.full_precision}
    assert bool(left) == (family in EXPERTS)


@pytest.mark.parametrize("family", VARIANTS)
def test_hidden_states_flow_through_all_blocks_in_order(tiny: Tiny, family: str) -> None:
    lm, order = tiny(family), []
    for index, block in enumerate(lm.blocks):
        block.register_forward_hook(lambda _m, _a, out, i=index: order.append((i, out)))
    with torch.no_grad():
        lm.model(input_ids=IDS)
    assert [index for index, _ in order] == [0, 1, 2]
    for _, output in order:
        hidden = output[0] if isinstance(output, tuple) else output
        assert hidden.shape == (1, 4, lm.model.config.hidden_size)


def test_targets_choose_linears_by_their_last_name(tiny: Tiny) -> None:
    lm = tiny("llama")
    chosen = lm.linears(["down_proj", "q_proj"])
    assert len(chosen) == 6
    assert all(
        name.endswith(("down_proj", "q_proj")) and lm.model.get_submodule(name) is m for name, m in chosen.items()
    )


@pytest.mark.parametrize("target", ["down_prj", "lm_head", "fc1"])
def test_unknown_target_is_refused(tiny: Tiny, target: str) -> None:
    with pytest.raises(ConfigError, match=rf"quantizer.targets names '{target}'.* are called .*down_proj") as caught:
        tiny("llama").linears(["q_proj", target])
    assert ("did you mean 'down_proj'" in str(caught.value)) == (target == "down_prj")


# ---- smoothing pairs ------------------------------------------------------------------------------------------------


@torch.no_grad()
def norms_and_inputs(lm: LanguageModel, block: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The output of each norm of a block and the input of each of its linears and routers, in one forward pass."""
    norms: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    handles = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear) or name in lm.architecture.full_precision:
            handles.append(module.register_forward_pre_hook(lambda _m, a, n=name: inputs.update({n: a[0].clone()})))
        elif "norm" in name or name in ("ln_attn", "ln_mlp"):
            handles.append(module.register_forward_hook(lambda _m, _a, out, n=name: norms.update({n: out.clone()})))
    lm.model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    return norms, inputs


def reads(values: Tensor, output: Tensor) -> bool:
    """Whether a linear's input is the norm's output: all of its tokens, or those that are routed to an expert."""
    rows, tokens = values.flatten(0, -2), output.flatten(0, -2)
    if rows.shape[-1] != tokens.shape[-1]:
        return False
    return all((tokens == row).all(1).any() for row in rows)


@pytest.mark.parametrize("family", SMOOTHABLE)
def test_smoothing_pairs_are_exactly_who_reads_whom(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    for index, block in enumerate(lm.blocks):
        path = f"{lm.architecture.blocks}.{index}."
        pairs = {norm: set(readers) for norm, readers in lm.norm_readers(index)}
        norms, inputs = norms_and_inputs(lm, block)
        for norm, output in norms.items():
            readers = {path + name for name, values in inputs.items() if reads(values, output)}
            assert readers == {name for name in pairs.pop(path + norm, set()) if name.removeprefix(path) in inputs}
        assert not pairs  # the table names no norm that does not run


def test_every_expert_reads_the_norm_before_the_experts(tiny: Tiny) -> None:
    (_, attention), (_, experts) = tiny("mixtral").norm_readers(1)
    path = "model.layers.1.mlp."
    assert set(experts) == {path + "gate"} | {
        f"{path}experts.{e}.{name}" for e in range(4) for name in ("gate_proj", "up_proj")
    }
    assert len(attention) == 3


@pytest.mark.parametrize("family", SMOOTHABLE)
def test_changing_a_norm_reaches_its_readers(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    block, path, offset = lm.blocks[1], f"{lm.architecture.blocks}.1.", lm.architecture.norm_offset
    for norm, readers in lm.norm_readers(1):
        _, before = norms_and_inputs(lm, block)
        weight = lm.model.get_submodule(norm).weight
        weight[3] = 2 * (offset + weight[3]) - offset  # one channel of the norm's output is doubled
        _, after = norms_and_inputs(lm, block)
        for name in (name.removeprefix(path) for name in readers):
            if name not in before or name not in after or ".experts." in name:
                continue  # which tokens an expert sees depends on the router, which reads the norm too
            changed = (after[name] != before[name]).flatten(0, -2).any(0)
            assert changed[3]
            if getattr(lm.model.get_submodule(norm), "bias", None) is None:
                torch.testing.assert_close(after[name][..., 3], 2 * before[name][..., 3])


# ---- what is not in the table ---------------------------------------------------------------------------------------


def test_unknown_architecture_names_the_model_and_the_choice() -> None:
    known = ", ".join(sorted(FAMILIES))
    message = rf"model.path='me/mine' has the architecture 'gpt2'.*\(supported: {known}\)"
    with pytest.raises(UnsupportedModelError, match=message):
        find_architecture(GPT2Config(), "me/mine")


def test_misspelt_architecture_gets_a_hint() -> None:
    with pytest.raises(UnsupportedModelError, match="did you mean 'llama'"):
        find_architecture(SimpleNamespace(model_type="llamma"), "me/mine")


def test_a_variant_without_an_entry_is_refused_by_the_keys_that_decide() -> None:
    config = SimpleNamespace(model_type="falcon", new_decoder_architecture=False, parallel_attn="maybe")
    message = r"'me/mine' is a variant of 'falcon'.*new_decoder_architecture=False.*parallel_attn=maybe"
    with pytest.raises(UnsupportedModelError, match=message):
        find_architecture(config, "me/mine")
    with pytest.raises(UnsupportedModelError, match=r"a variant of 'qwen3_moe'.*mlp_only_layers=\[0\]"):
        find_architecture(Qwen3MoeConfig(mlp_only_layers=[0]), "me/mine")


@pytest.mark.parametrize("config", [DeepseekV2Config(), DeepseekV3Config(), Llama4Config(), Llama4TextConfig()])
def test_a_family_that_an_entry_cannot_add_is_refused_with_the_reason(config: PreTrainedConfig) -> None:
    message = rf"'me/mine' has the architecture '{config.model_type}'.* cannot add it: its .*blocks"
    with pytest.raises(UnsupportedModelError, match=message):
        find_architecture(config, "me/mine")


def test_a_multimodal_model_whose_text_part_alone_is_known_is_refused() -> None:
    """Which of its tensors are the text part's, and whether that is all that reads text, is not known."""
    config = LlavaConfig(text_config=TINY["llama"]())
    assert config.get_text_config().model_type == "llama"
    with pytest.raises(UnsupportedModelError, match=r"has the architecture 'llava', which is not supported"):
        find_architecture(config, "me/mine")


@pytest.mark.parametrize(
    ("options", "heads", "norms"),
    [
        ({}, 1, ["input_layernorm"]),
        ({"multi_query": False}, 4, ["input_layernorm"]),
        ({"parallel_attn": False}, 1, ["input_layernorm", "post_attention_layernorm"]),
        ({"parallel_attn": False, "multi_query": False}, 4, ["input_layernorm", "post_attention_layernorm"]),
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, 4, ["ln_attn", "ln_mlp"]),
        ({"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}, 4, ["input_layernorm"]),
    ],
)
def test_falcons_have_the_cache_and_the_norms_of_their_variant(
    options: dict[str, Any], heads: int, norms: list[str]
) -> None:
    config = FalconConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, vocab_size=64, **options)
    model, cache = AutoModelForCausalLM.from_config(config).eval(), DynamicCache()
    architecture = find_architecture(config, "me/mine")
    model(IDS % 64, past_key_values=cache, use_cache=True)
    assert architecture.cache_shape(config) == (1, heads, 8) == (1, cache.layers[0].keys.shape[1], 8)
    assert [norm for norm, _ in architecture.smoothing] == norms
    for norm in norms:
        assert isinstance(model.transformer.h[0].get_submodule(norm), nn.LayerNorm)
