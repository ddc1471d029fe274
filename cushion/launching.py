"""What a run needs that shares its machine with other runs of a sweep: one GPU of its own, and its share of threads."""

from __future__ import annotations

import getpass
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

_POLL_SECONDS = 0.5
_taken: list[str] = []
"""The GPU that this process has computed on: CUDA cannot leave it again."""


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name.strip() for name in named.split(",") if name.strip() not in ("", "-1")]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


@contextmanager
def gpu_of_its_own(folder: Path | None = None) -> Iterator[str | None]:
    """Within the block no other process that asks the same way computes on this process's GPU.

    CUDA_VISIBLE_DEVICES is set to it, so this must come before CUDA is used. Processes wait for each other where there
    are more of them than GPUs. Without a GPU nothing happens.

    Args:
        folder: where the locks are; by default a folder of temporary files, by user.

    """
    gpus = _taken or visible_gpus()
    if not gpus:
        yield None
        return
    folder = folder or Path(tempfile.gettempdir()) / f"cushion-gpus-{getpass.getuser()}"
    folder.mkdir(parents=True, exist_ok=True)
    gpu, lock = _first_free(gpus, folder)
    _taken[:] = [gpu]
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    try:
        yield gpu
    finally:
        lock.release()


def _first_free(gpus: list[str], folder: Path) -> tuple[str, FileLock]:
    while True:
        for gpu in gpus:
            lock = FileLock(folder / f"{gpu}.lock", blocking=False)
            try:
                lock.acquire()
            except Timeout:
                continue
            return gpu, lock
        time.sleep(_POLL_SECONDS)


def share_threads() -> None:
    """Use as many threads as SLURM gave this task, unless OMP_NUM_THREADS says otherwise.

    (joblib sets OMP_NUM_THREADS for its processes by itself.)
    """
    given = os.environ.get("SLURM_CPUS_PER_TASK")
    if given and "OMP_NUM_THREADS" not in os.environ:
        import torch

        torch.set_num_threads(int(given))
