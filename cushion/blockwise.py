"""The decoder blocks of a model one after another: stop after any of them, and go on with some of the rows alone.

Neither the blocks behind the last one asked for nor the final norm nor lm_head are run. The model is left as it was:
what this needs are hooks that live as long as the call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cushion.activations import hidden_states
from cushion.models import LanguageModel
from cushion.prefix import Prefix

Visitor = Callable[[int, Tensor], "Tensor | None"]
"""Called with a block's number and its output, (rows still alive, tokens, features). Returns which of these rows go on
(their positions, ascending), or None for all of them."""


class _EnoughError(Exception):
    """Leaves the forward pass of a model; never leaves this module."""


@torch.no_grad()
def run_blocks(lm: LanguageModel, prefix: Prefix, input_ids: Tensor, visit: Visitor, depth: int | None = None) -> None:
    """Run the first `depth` decoder blocks (all of them when None) and show the output of each to `visit`.

    Args:
        prefix: stands before every row; its keys and values are expanded over the rows, not copied.
        input_ids: (rows, tokens), all of the same length and without padding.

    """
    blocks = list(lm.blocks)[:depth]
    rows = alive = input_ids.shape[0]
    cache = prefix.cache(lm.model, rows) if len(prefix) else None
    layers: list[Any] = [] if cache is None else cache.layers

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if alive == rows:
            return None
        return args[:1] + _first_rows(args[1:], rows, alive), _first_rows(kwargs, rows, alive)

    def after(index: int) -> Callable[..., Any]:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            nonlocal alive
            hidden = hidden_states(output)
            keep = visit(index, hidden)
            if index == len(blocks) - 1 or (keep is not None and len(keep) == 0):
                raise _EnoughError
            if layers:
                layers[index].reset()  # no later block reads what this one has just written
            if keep is None or len(keep) == alive:
                return None
            alive = len(keep)
            for layer in layers[index + 1 :]:
                layer.keys, layer.values = layer.keys[:alive], layer.values[:alive]
            hidden = hidden[keep.to(hidden.device)]
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    handles = [block.register_forward_pre_hook(before, with_kwargs=True) for block in blocks]
    handles += [block.register_forward_hook(after(index)) for index, block in enumerate(blocks)]
    try:
        lm.body(input_ids, past_key_values=cache, use_cache=cache is not None)
    except _EnoughError:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _first_rows(value: Any, rows: int, alive: int) -> Any:
    """What a model hands to each block beside the hidden states (masks, positions, ALiBi), for fewer rows.

    All rows are alike there, because they have the same length and no padding. A tensor belongs to the rows when its
    first dimension is a multiple of their number (ALiBi: rows x heads); what is shared by all has 1 there.
    """
    if isinstance(value, Tensor):
        if value.dim() < 2 or value.shape[0] % rows:
            return value
        return value[: value.shape[0] // rows * alive]
    if isinstance(value, (tuple, list)):
        return type(value)(_first_rows(item, rows, alive) for item in value)
    if isinstance(value, dict):
        return {key: _first_rows(item, rows, alive) for key, item in value.items()}
    return value
