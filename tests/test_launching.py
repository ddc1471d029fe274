"""Runs side by side: no two processes on one GPU, SLURM's share of threads, launchers that are named when absent."""

from __future__ import annotations

import json
import os
import select
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hydra.core.plugins import Plugins
from test_cli import Outcome, arguments, cushion, one_error  # noqa: F401 - fixtures

from cushion import launching
from cushion.launching import gpu_of_its_own, share_threads, visible_gpus
from cushion.results import FILE_NAME

JOBLIB = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"
SUBMITIT = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"


@pytest.fixture(autouse=True)
def fresh_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "_taken", [])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 7")


COMPUTE = """
import os, sys
from pathlib import Path
from cushion.launching import gpu_of_its_own
with gpu_of_its_own(Path(sys.argv[1])) as gpu:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == gpu
    print(gpu, flush=True)
    sys.stdin.read()
"""
"""A process that says which GPU it has, and computes on it until its standard input is closed."""


def test_every_process_has_a_gpu_of_its_own_and_more_processes_wait(tmp_path: Path) -> None:
    def start() -> subprocess.Popen[str]:
        source = str(Path(launching.__file__).resolve().parent.parent)
        return subprocess.Popen([sys.executable, "-c", COMPUTE, str(tmp_path)], stdin=subprocess.PIPE, text=True,
                                stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": source})  # fmt: skip

    def gpu_of(process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        return process.stdout.readline().strip()

    with start() as first, start() as second:
        assert {(one := gpu_of(first)), gpu_of(second)} == {"3", "7"}
        with start() as third:
            assert third.stdout is not None and first.stdin is not None and third.stdin is not None
            assert select.select([third.stdout], [], [], 2)[0] == [], "both are taken"
            first.stdin.close()
            assert gpu_of(third) == one
            third.stdin.close()
        assert second.stdin is not None
        second.stdin.close()
    assert [process.returncode for process in (first, second, third)] == [0, 0, 0]


def test_a_process_stays_with_its_gpu_and_lets_go_of_it_between_runs(tmp_path: Path) -> None:
    with gpu_of_its_own(tmp_path) as gpu:
        assert gpu == "3"
    with gpu_of_its_own(tmp_path) as again:
        assert again == "3"
    launching._taken.clear()  # as another process would see it
    os.environ["CUDA_VISIBLE_DEVICES"] = "3,7"
    with gpu_of_its_own(tmp_path) as other:
        assert other == "3", "it was free"


@pytest.mark.parametrize("named", ["", "-1"])
def test_without_a_gpu_nothing_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == []
    with gpu_of_its_own(tmp_path) as gpu:
        assert gpu is None
    assert list(tmp_path.iterdir()) == []


def test_slurms_share_of_threads_is_used_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        share_threads()
        assert torch.get_num_threads() == before
        monkeypatch.delenv("OMP_NUM_THREADS")
        share_threads()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def has(target: str) -> bool:
    return target in Plugins.instance().class_name_to_class


@pytest.mark.parametrize(
    ("launcher", "package"), [("joblib_local", "hydra-joblib-launcher"), ("slurm", "hydra-submitit-launcher")]
)
def test_a_launcher_that_is_not_installed_is_named_with_the_way_out(
    cushion: Callable[..., Outcome], arguments: list[str], launcher: str, package: str, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    known = {
        name: kind for name, kind in Plugins.instance().class_name_to_class.items() if "launcher.joblib" not in name
    }
    known = {name: kind for name, kind in known.items() if "submitit" not in name}
    monkeypatch.setattr(Plugins.instance(), "class_name_to_class", known)
    line = one_error(cushion("-m", *arguments, f"hydra/launcher={launcher}", "seed=0,1"))
    assert f"hydra/launcher={launcher} is not installed: pip install {package}" in line
    assert not Path("outputs").exists()


@pytest.fixture
def found_from_anywhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    source = str(Path(launching.__file__).resolve().parent.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    yield


def metrics(folder: str) -> list[tuple[str, object]]:
    results = [json.loads(path.read_text()) for path in Path(folder).rglob(FILE_NAME)]
    return sorted((result["status"] + str(result["config"]["seed"]), result["metrics"]) for result in results)


@pytest.mark.skipif(not has(JOBLIB), reason="hydra-joblib-launcher is not installed")
@pytest.mark.usefixtures("found_from_anywhere")
def test_joblib_gives_the_same_metrics_and_the_same_exit_status(
    cushion: Callable[..., Outcome], arguments: list[str]  # noqa: F811
) -> None:  # fmt: skip
    arguments = [argument for argument in arguments if not argument.startswith("eval.blocks=")]
    sweep = ["-m", *arguments, "seed=0,1", "eval.blocks=2,100000"]

    assert cushion(*sweep).code == 1
    parallel = cushion(*sweep, "hydra/launcher=joblib_local", "paths.output_dir=parallel")
    assert parallel.code == 1
    assert metrics("parallel") == metrics("outputs")
    assert [status[:-1] for status, _ in metrics("parallel")] == ["completed", "completed", "failed", "failed"]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A SLURM cluster of this machine, on free ports."""
    absent = [
        program for program in ("slurmctld", "slurmd", "munged", "srun", "sbatch") if shutil.which(program) is None
    ]
    if absent:
        pytest.skip(f"SLURM is not installed ({', '.join(absent)}): apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("a cluster of one node must be started by root")
    for name in ("SLURMCTLD_PORT", "SLURMD_PORT"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            monkeypatch.setenv(name, str(free.getsockname()[1]))
    script, folder = Path(__file__).parent.parent / "scripts" / "slurm_one_node.sh", tmp_path / "slurm"
    done = subprocess.run([str(script), "start", str(folder)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    try:
        yield
    finally:
        subprocess.run([str(script), "stop", str(folder)], check=True, timeout=120)


@pytest.mark.skipif(not has(SUBMITIT), reason="hydra-submitit-launcher is not installed")
@pytest.mark.usefixtures("found_from_anywhere", "cluster")
def test_slurm_gives_the_same_metrics(cushion: Callable[..., Outcome], arguments: list[str]) -> None:  # noqa: F811
    sweep = ["-m", *arguments, "seed=0,1"]
    assert cushion(*sweep).code == 0
    on_nodes = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "paths.output_dir=nodes"]
    assert cushion(*sweep, *on_nodes).code == 0
    assert metrics("nodes") == metrics("outputs")
    assert len(metrics("nodes")) == 2
