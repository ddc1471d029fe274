"""The architecture table: its entries name the parts that the models really have, and how those hang together."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import FAMILIES
from torch import Tensor, nn

from cushion.errors import ConfigError, UnsupportedModelError
from cushion.models import LanguageModel
from cushion.models.architectures import ARCHITECTURES, find_architecture
from cushion.models.tiny import TINY

Tiny = Callable[..., LanguageModel]
IDS = torch.tensor([[5, 80, 200, 7]])

# family, path of the blocks, last parts of the names of a block's linears
ROWS = [
    ("llama", "model.layers", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
    ("mistral", "model.layers", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
    ("qwen2", "model.layers", "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"),
    ("opt", "model.decoder.layers", "q_proj k_proj v_proj out_proj fc1 fc2"),
    ("bloom", "transformer.h", "query_key_value dense dense_h_to_4h dense_4h_to_h"),
]


def test_every_family_has_a_row_here_and_a_tiny_model() -> None:
    assert {row[0] for row in ROWS} == set(ARCHITECTURES) == set(TINY) == set(FAMILIES)


@pytest.mark.parametrize(("family", "path", "names"), ROWS)
def test_blocks_and_linears_are_found(tiny: Tiny, family: str, path: str, names: str) -> None:
    lm = tiny(family)
    assert lm.blocks is lm.model.get_submodule(path)
    assert len(lm.blocks) == lm.model.config.num_hidden_layers
    linears = lm.linears()
    assert {name.rsplit(".", 1)[-1] for name in linears} == set(names.split())
    assert len(linears) == len(lm.blocks) * len(names.split())


@pytest.mark.parametrize("family", FAMILIES)
def test_linears_are_those_of_the_blocks_and_no_lm_head(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    every = {name: m for name, m in lm.model.named_modules() if isinstance(m, nn.Linear)}
    head = lm.model.get_output_embeddings()
    linears = lm.linears()
    assert linears == {name: m for name, m in every.items() if m is not head}
    assert len(every) == len(linears) + 1
    assert lm.linears(["all"]) == linears


@pytest.mark.parametrize("family", FAMILIES)
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
    """The output of each norm of a block and the input of each of its linears, in one forward pass."""
    norms: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}
    handles = []
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            handles.append(module.register_forward_pre_hook(lambda _m, a, n=name: inputs.update({n: a[0].clone()})))
        elif "norm" in name:
            handles.append(module.register_forward_hook(lambda _m, _a, out, n=name: norms.update({n: out.clone()})))
    lm.model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    return norms, inputs


@pytest.mark.parametrize("family", FAMILIES)
def test_smoothing_pairs_are_exactly_who_reads_whom(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    pairs = dict(lm.architecture.smoothing)
    for block in lm.blocks:
        norms, inputs = norms_and_inputs(lm, block)
        assert set(norms) == set(pairs)
        for norm, output in norms.items():
            readers = {name for name, values in inputs.items() if torch.equal(values.flatten(), output.flatten())}
            assert readers == set(pairs[norm])


@pytest.mark.parametrize("family", FAMILIES)
def test_changing_a_norm_reaches_its_linears(tiny: Tiny, family: str) -> None:
    lm = tiny(family)
    block = lm.blocks[1]
    for norm, linears in lm.architecture.smoothing:
        _, before = norms_and_inputs(lm, block)
        block.get_submodule(norm).weight[3] *= 2  # one channel
        _, after = norms_and_inputs(lm, block)
        for name in linears:
            assert isinstance(block.get_submodule(name), nn.Linear)
            changed = (after[name] != before[name]).flatten(0, -2).any(0)
            assert changed[3]
            if getattr(block.get_submodule(norm), "bias", None) is None:
                assert torch.equal(after[name][..., 3], 2 * before[name][..., 3])


# ---- what is not in the table ---------------------------------------------------------------------------------------


def test_unknown_architecture_names_the_model_and_the_choice() -> None:
    message = r"model.path='me/mine' has the architecture 'gpt2'.*supported: bloom, llama, mistral, opt, qwen2"
    with pytest.raises(UnsupportedModelError, match=message):
        find_architecture("gpt2", "me/mine")


def test_misspelt_architecture_gets_a_hint() -> None:
    with pytest.raises(UnsupportedModelError, match="did you mean 'llama'"):
        find_architecture("llamma", "me/mine")
