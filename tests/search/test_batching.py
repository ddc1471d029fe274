"""How large a batch may be: what fits the free memory of every GPU, and halves once it did not."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from cushion.search.batching import FIRST_TOKENS, GROWTH, MEMORY_SHARE, MOST_ROWS, BatchSizer, tokens_that_fit

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda:0"), torch.device("cuda:1")
MIB = 2**20


def test_what_fits_is_in_proportion_to_what_was_taken() -> None:
    assert tokens_that_fit(free=1000 * MIB, taken=100 * MIB, tokens=1000) == int(10 * MEMORY_SHARE * 1000)
    assert tokens_that_fit(free=100 * MIB, taken=100 * MIB, tokens=1000) == int(MEMORY_SHARE * 1000)
    assert tokens_that_fit(free=0, taken=100 * MIB, tokens=1000) == 0


@pytest.mark.parametrize("taken", [0, 1])
def test_a_batch_grows_step_by_step(taken: int) -> None:
    assert tokens_that_fit(free=10**12, taken=taken, tokens=1000) == GROWTH * 1000


@dataclass
class Memory:
    """The memory of a GPU: `held` by the weights, `per_token` by a token of a batch, `cached` by torch's own pool."""

    total: int
    held: int
    per_token: int
    cached: int = 0
    peak: int = 0

    def run(self, tokens: int) -> bool:
        """Whether a batch of that many tokens passes."""
        self.peak = self.held + tokens * self.per_token
        self.cached = max(self.cached, self.peak - self.held)
        return self.peak <= self.total


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> dict[torch.device, Memory]:
    found: dict[torch.device, Memory] = {}
    answers = {
        "reset_peak_memory_stats": lambda gpu: None,
        "memory_allocated": lambda gpu: found[gpu].held,
        "memory_reserved": lambda gpu: found[gpu].held + found[gpu].cached,
        "max_memory_allocated": lambda gpu: found[gpu].peak,
        "mem_get_info": lambda gpu: (found[gpu].total - found[gpu].held - found[gpu].cached, found[gpu].total),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    return found


def settle(sizer: BatchSizer, gpus: dict[torch.device, Memory], row_length: int, batches: int = 12) -> list[int]:
    """The sizes of some batches, each of which must pass."""
    sizes = []
    for _ in range(batches):
        rows = sizer.size(row_length)
        sizer.begin()
        assert all(gpu.run(rows * row_length) for gpu in gpus.values())
        sizer.grow(rows, row_length)
        sizes.append(rows)
    return sizes


def test_a_batch_grows_into_the_free_memory_and_never_beyond(gpus: dict[torch.device, Memory]) -> None:
    gpus[FIRST] = Memory(total=80_000 * MIB, held=14_000 * MIB, per_token=MIB // 10)
    sizes = settle(BatchSizer({FIRST}, None), gpus, 513)
    assert sizes[0] == FIRST_TOKENS["cuda"] // 513
    assert sizes == sorted(sizes)
    taken = sizes[-1] * 513 * (MIB // 10) / (66_000 * MIB)
    assert MEMORY_SHARE - 0.01 < taken <= MEMORY_SHARE


def test_a_batch_of_short_rows_fits_the_grids_of_kernels(gpus: dict[torch.device, Memory]) -> None:
    gpus[FIRST] = Memory(total=80_000 * MIB, held=14_000 * MIB, per_token=MIB // 10)
    assert settle(BatchSizer({FIRST}, None), gpus, 2)[-1] == MOST_ROWS < 65_536
    assert BatchSizer({FIRST}, 100_000).size(2) == MOST_ROWS


def test_the_fullest_of_several_gpus_decides(gpus: dict[torch.device, Memory]) -> None:
    gpus[FIRST] = Memory(total=80_000 * MIB, held=14_000 * MIB, per_token=MIB // 10)
    gpus[SECOND] = Memory(total=24_000 * MIB, held=14_000 * MIB, per_token=MIB // 10)
    sizes = settle(BatchSizer({FIRST, SECOND, CPU}, None), gpus, 513)
    assert MEMORY_SHARE - 0.01 < sizes[-1] * 513 * (MIB // 10) / (10_000 * MIB) <= MEMORY_SHARE


def test_a_batch_that_was_too_large_is_halved_and_stays_so(gpus: dict[torch.device, Memory]) -> None:
    gpus[FIRST] = Memory(total=80_000 * MIB, held=0, per_token=1)
    sizer = BatchSizer({FIRST}, None)
    rows = settle(sizer, gpus, 100, batches=2)[-1]
    assert sizer.can_back_off(torch.cuda.OutOfMemoryError("CUDA out of memory."), rows)
    sizer.back_off(rows, 100)
    assert settle(sizer, gpus, 100) == [rows // 2] * 12


@pytest.mark.parametrize(("devices", "batch_size"), [({CPU}, None), ({CPU}, 7), ({FIRST}, 7)])
def test_a_cpu_and_a_size_of_the_users_own_do_not_grow(
    gpus: dict[torch.device, Memory], devices: set[torch.device], batch_size: int | None
) -> None:
    sizer = BatchSizer(devices, batch_size)
    expected = batch_size or FIRST_TOKENS["cpu"] // 129
    assert settle(sizer, {}, 129) == [expected] * 12
    sizer.back_off(expected, 129)
    assert sizer.size(129) == expected // 2
