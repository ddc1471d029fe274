"""The decoder blocks of a model one after another: stop after any of them, or run one of them alone.

`run_blocks` may go on with some of the rows alone; `BlockRunner` runs a single block on hidden states that were kept.
Neither the blocks behind the last one asked for nor the final norm nor lm_head are run. The model is left as it was:
what this needs are hooks, and passes through blocks, that live as long as the call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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


class BlockRunner:
    """Runs one decoder block on hidden states, as the model itself would: with its masks, positions and cache.

    Every call goes into the model by the front door and skips the blocks before the one asked for, so whatever is on
    the model (a rotation, quantized attention) is in effect. Gradients reach the hidden states and what is on the
    block.

    Args:
        lm: the model.
        prefix: stands before every row; its keys and values are expanded over the rows, not copied.

    """

    def __init__(self, lm: LanguageModel, prefix: Prefix) -> None:
        self._lm, self._prefix = lm, prefix
        self._in_tuples = False

    @torch.no_grad()
    def inputs(self, texts: Tensor) -> Tensor:
        """What reaches the first block of `texts`, token ids (rows, tokens): (rows, tokens, features)."""
        seen: list[Tensor] = []

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(args[0] if args else kwargs["hidden_states"])

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            self._in_tuples = isinstance(output, tuple)
            raise _EnoughError

        self._run(self._lm.blocks[0], texts, before, after)
        return seen[0]

    def __call__(self, index: int, texts: Tensor, hidden: Tensor) -> Tensor:
        """The output of block `index`; call `inputs` before.

        Args:
            index: the block's number.
            texts: token ids of the rows, (rows, tokens).
            hidden: what reaches the block, (rows, tokens, features).

        Returns:
            (rows, tokens, features).

        """
        found: list[Tensor] = []

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            found.append(hidden_states(output))
            raise _EnoughError

        with _skipped(list(self._lm.blocks)[:index], self._in_tuples):
            self._run(self._lm.blocks[index], texts, before, after)
        return found[0]

    def _run(self, block: nn.Module, texts: Tensor, before: Callable[..., Any], after: Callable[..., Any]) -> None:
        cache = self._prefix.cache(self._lm.model, len(texts)) if len(self._prefix) else None
        handles = [
            block.register_forward_pre_hook(before, with_kwargs=True),
            block.register_forward_hook(after),
        ]
        try:
            self._lm.body(texts, past_key_values=cache, use_cache=cache is not None)
        except _EnoughError:
            pass
        finally:
            for handle in handles:
                handle.remove()


@contextmanager
def _skipped(blocks: Sequence[nn.Module], in_tuples: bool) -> Iterator[None]:
    """The blocks give back what they get, for the length of a `with` block."""

    def give_back(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) if in_tuples else hidden

    own = [vars(block).get("forward") for block in blocks]  # of a model that is spread over devices
    try:
        for block in blocks:
            vars(block)["forward"] = give_back
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del vars(block)["forward"]
            if forward is not None:
                vars(block)["forward"] = forward
