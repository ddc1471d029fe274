"""How many candidates go through the model at once."""

from __future__ import annotations

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

FIRST_TOKENS = {"cpu": 2048, "cuda": 8192}
"""Tokens of the first batch that is tried, by device type."""

GROWTH = 8
"""A batch has at most this many times the tokens of the one before: what it takes is foretold from that."""

MOST_ROWS = 32768
"""A batch has at most this many rows: kernels of attention give each a place in a grid of fewer than 65,536."""

MEMORY_SHARE = 0.8
"""The part of a GPU's free memory that a batch may take; the rest is for what lies between the pieces in use."""


def tokens_that_fit(free: int, taken: int, tokens: int) -> int:
    """How many tokens the next batch may have.

    Args:
        free: bytes that are there for it.
        taken: bytes that a batch of `tokens` tokens took at its peak.
        tokens: the same batch's.

    Returns:
        At most `GROWTH` times `tokens`.

    """
    if taken <= 0:
        return GROWTH * tokens
    return min(GROWTH * tokens, int(MEMORY_SHARE * free / taken * tokens))


class BatchSizer:
    """How many candidates go through the model at once: as many as memory allows.

    On GPUs every batch that passes tells how much a token takes, and the next one is as large as the memory that is
    free has room for, on each of them. Whenever memory runs out, the batch is halved and stays so. A size that the user
    sets is only ever halved.

    Args:
        devices: where the model's weights are.
        batch_size: the user's; None for as many as fit.

    """

    def __init__(self, devices: set[torch.device], batch_size: int | None) -> None:
        self._gpus = [device for device in devices if device.type == "cuda"]
        self._fixed = batch_size
        self._tokens = FIRST_TOKENS["cuda" if self._gpus else "cpu"]
        self._may_grow = bool(self._gpus) and batch_size is None
        self._before: dict[torch.device, int] = {}

    def size(self, row_length: int) -> int:
        """Rows of `row_length` tokens in the next batch."""
        return min(MOST_ROWS, self._fixed or max(1, self._tokens // row_length))

    def begin(self) -> None:
        """Call it before a batch: from here on its memory is measured."""
        if not self._may_grow:
            return
        for gpu in self._gpus:
            torch.cuda.reset_peak_memory_stats(gpu)
            self._before[gpu] = torch.cuda.memory_allocated(gpu)

    def grow(self, rows: int, row_length: int) -> None:
        """Call it after a batch of `rows` of `row_length` tokens that passed: make the next one as large as fits."""
        if not self._may_grow:
            return
        tokens = rows * row_length
        fits = [tokens_that_fit(_free(gpu), _peak(gpu) - self._before[gpu], tokens) for gpu in self._gpus]
        self._tokens = max(self._tokens, min(fits))

    def can_back_off(self, error: Exception, rows: int) -> bool:
        """Whether memory ran out and a smaller batch than this one is left to try."""
        return rows > 1 and bool(should_reduce_batch_size(error))

    def back_off(self, rows: int, row_length: int) -> None:
        """Halve the batch, which was `rows` of `row_length` tokens, and give memory back."""
        clear_device_cache(garbage_collection=True)
        self._may_grow = False
        self._tokens = rows * row_length // 2
        self._fixed = None if self._fixed is None else max(1, rows // 2)


def _free(gpu: torch.device) -> int:
    """Bytes that nobody uses, and those that torch holds without using them."""
    return torch.cuda.mem_get_info(gpu)[0] + torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu)


def _peak(gpu: torch.device) -> int:
    return torch.cuda.max_memory_allocated(gpu)
