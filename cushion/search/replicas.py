"""Copies of a model on several GPUs of one machine, among which the candidates of a batch are shared out.

Each copy is driven by a thread of its own: a forward pass hands its work to a GPU and goes on, so the threads of one
process keep several of them busy. That needs no launcher, and nothing is communicated but the scores.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from cushion.config import SearchConfig
from cushion.errors import ConfigError
from cushion.models import LanguageModel
from cushion.prefix import Prefix
from cushion.registry import SEARCH_METHODS
from cushion.search.objective import Judged, Objective


def check_replicas(config: SearchConfig, device: str) -> None:
    """Refuse more copies than there are GPUs for them.

    Raises:
        ConfigError: fewer GPUs than `search.replicas`.

    """
    gpus = torch.cuda.device_count() if torch.device(device).type == "cuda" else 0
    if "replicas" in SEARCH_METHODS[config.method].reads and (config.replicas or 1) > max(gpus, 1):
        raise ConfigError(
            f"search.replicas={config.replicas} needs as many GPUs, and this run has {gpus}: use search.replicas=1, "
            "or null for as many as there are"
        )


def replica_devices(count: int | None, first: torch.device) -> list[torch.device]:
    """Where `count` copies go (None: one on each GPU), the model itself, which is on `first`, among them."""
    if first.type != "cuda":
        return [first]
    own = first.index or 0
    others = [index for index in range(torch.cuda.device_count()) if index != own]
    return [first, *(torch.device("cuda", index) for index in others)][:count]


@contextmanager
def replicated(lm: LanguageModel, objective: Objective, devices: list[torch.device]) -> Iterator[Replicas]:
    """Within the block there is a copy of the model on each of `devices`; the model itself is the first.

    Raises:
        ConfigError: a GPU has no room for its copy.

    """
    if len(devices) == 1:
        yield Replicas([lm], objective, [])
        return
    lms = [lm]
    with ExitStack() as stack:
        stack.callback(_free, lms)
        lms += (_copy_to(lm, device) for device in devices[1:])
        threads = [
            stack.enter_context(ThreadPoolExecutor(1, initializer=_work_on, initargs=(device,))) for device in devices
        ]
        yield Replicas(lms, objective, threads)


class Replicas:
    """A model and its copies, judging the rows of a batch at the same time, each in a thread of its own."""

    def __init__(self, lms: list[LanguageModel], objective: Objective, threads: list[ThreadPoolExecutor]) -> None:
        self._lms, self._objective, self._threads = lms, objective, threads

    def __len__(self) -> int:
        """How many there are, the model itself included."""
        return len(self._lms)

    @property
    def devices(self) -> set[torch.device]:
        """Where the weights of all of them are."""
        return {weight.device for lm in self._lms for weight in lm.model.parameters()}

    @property
    def dtype(self) -> torch.dtype:
        """That of their weights."""
        dtype: torch.dtype = self._lms[0].model.dtype
        return dtype

    def share(self, rows: int) -> int:
        """The rows of the largest part of a batch of `rows`."""
        return -(-rows // len(self))

    def place(self, prefix: Prefix) -> list[Prefix]:
        """The prefix for each of them, on its device: a batch that moved it itself would wait for the first GPU."""
        return [prefix, *(moved(prefix, lm.device) for lm in self._lms[1:])]

    def judge(self, prefixes: list[Prefix], rows: Tensor, depth: int, bound: float = math.inf) -> Judged:
        """`Objective.judge` of `rows`, a candidate in front of a text each, shared out evenly.

        An error of one of them is raised when all have ended.

        Args:
            prefixes: what `place` gave.

        """
        if len(self) == 1:
            return self._objective.judge(self._lms[0], prefixes[0], rows, 1, depth, bound)
        parts = [part for part in rows.tensor_split(len(self)) if len(part)]
        tasks = [
            thread.submit(self._objective.judge, lm, prefix, part, 1, depth, bound)
            for thread, lm, prefix, part in zip(self._threads, self._lms, prefixes, parts, strict=False)
        ]
        wait(tasks)
        judged = [task.result() for task in tasks]
        return Judged(
            torch.cat([part.scores for part in judged]),
            torch.cat([part.blocks for part in judged]),
            torch.cat([part.complete for part in judged]),
        )


def _free(lms: list[LanguageModel]) -> None:
    """Leave the GPUs as free as they were, for what follows the search and for other processes."""
    lms.clear()
    torch.cuda.empty_cache()


def _work_on(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)


def moved(prefix: Prefix, target: torch.device | torch.dtype) -> Prefix:
    """The prefix with its keys and values on a device, or in a dtype."""
    keys, values = (tuple(tensor.to(target) for tensor in part) for part in (prefix.keys, prefix.values))
    return replace(prefix, keys=keys, values=values)


def copied(lm: LanguageModel, weights: torch.device | torch.dtype, buffers: torch.device | None) -> LanguageModel:
    """The model once more, its weights on a device or in a dtype, made tensor by tensor.

    Args:
        weights: where they go, or what they become.
        buffers: where they go; None leaves them to both.

    """
    copies: dict[int, object] = {
        id(weight): nn.Parameter(weight.detach().to(weights, copy=True), requires_grad=False)
        for weight in lm.model.parameters()
    }
    copies |= {
        id(buffer): buffer if buffers is None else buffer.to(buffers, copy=True) for buffer in lm.model.buffers()
    }
    return replace(lm, model=copy.deepcopy(lm.model, copies))


def _copy_to(lm: LanguageModel, device: torch.device) -> LanguageModel:
    """The model once more on `device`; tensor by tensor, so that its own device holds no second copy on the way."""
    try:
        return copied(lm, device, device)
    except torch.OutOfMemoryError as error:
        raise ConfigError(
            f"search.replicas: {device} has no room for a copy of {lm.label}: use fewer of them, or a GPU that is free"
        ) from error
