"""A prefix as a PEFT adapter of the kind `PREFIX_TUNING`: two files and a model card, written without PEFT.

PEFT keeps one matrix, a row for each position of the prefix, and makes the cache from it: per position the key then the
value of each layer, head by head. Keys have their rotary positions applied, as in the cache of a forward pass, and PEFT
counts the positions of the text behind them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from cushion.errors import ConfigError
from cushion.export.card import model_card
from cushion.export.finished import FinishedRun
from cushion.prefix import Prefix


def write(run: FinishedRun, folder: Path) -> None:
    """Write the adapter into an empty folder.

    Raises:
        ConfigError: what others load the model by is not known, or the layers' keys and values differ in shape.

    """
    write_adapter(run.prefix(), folder, *run.base_model())
    (folder / "README.md").write_text(model_card(run, folder.name), encoding="utf-8")


def write_adapter(prefix: Prefix, folder: Path, base_model: str, revision: str | None) -> None:
    """Write the two files that PEFT reads.

    Raises:
        ConfigError: the layers' keys and values differ in shape.

    """
    embeddings = prompt_embeddings(prefix)
    settings = adapter_config(prefix, base_model, revision)
    save_file({"prompt_embeddings": embeddings}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def prompt_embeddings(prefix: Prefix) -> Tensor:
    """The matrix that PEFT makes the cache from: (length, layers x 2 x key-value heads x head size), float32.

    Raises:
        ConfigError: the layers' keys and values differ in shape.

    """
    _shape(prefix)
    layers = [
        torch.stack([key.detach().cpu().float(), value.detach().cpu().float()])
        for key, value in zip(prefix.keys, prefix.values, strict=True)
    ]
    stacked = torch.stack(layers)  # (layers, 2, heads, length, head size)
    return stacked.permute(3, 0, 1, 2, 4).reshape(len(prefix), -1).contiguous()


def adapter_config(prefix: Prefix, base_model: str, revision: str | None) -> dict[str, Any]:
    """The content of adapter_config.json, with every shape: PEFT's guess fails on heads of a size of their own."""
    heads, size = _shape(prefix)
    return {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
        "num_virtual_tokens": len(prefix),
        "num_layers": len(prefix.keys),
        "num_attention_heads": heads,
        "token_dim": heads * size,
        "num_transformer_submodules": 1,
        "prefix_projection": False,
        "encoder_hidden_size": heads * size,
    }


def _shape(prefix: Prefix) -> tuple[int, int]:
    """Key-value heads and head size, which an adapter has once for all layers."""
    shapes = sorted({(tensor.shape[0], tensor.shape[2]) for tensor in (*prefix.keys, *prefix.values)})
    if len(shapes) != 1:
        raise ConfigError(
            f"--to=peft cannot express keys and values of several shapes (heads, head size), here "
            f"{' and '.join(map(str, shapes))}: use the prefix from Python, as docs/python.md says"
        )
    return shapes[0]
