"""Proof that sweeps survive: one sweep of small runs, unbroken, and again in the ways that may go wrong.

    python scripts/check_sweep.py                          # all of it, with 20 runs and five kills: some minutes
    python scripts/check_sweep.py --runs 4 --kills 2 --only killed,joblib

Every way has a folder of its own and must end with the results of the unbroken sweep, every step of it computed once:

- `killed`: SIGKILL to its process group at random moments, and the same command again until it ends
- `twice`: two processes with the same command on one folder, started at once
- `joblib`: two processes at a time (hydra/launcher=joblib_local)
- `slurm`: as jobs of SLURM, on the cluster that is there or one of this machine (scripts/slurm_one_node.sh)
- `full`: on a full disk until it has failed, and again with room; needs root, for a small file system in
  memory, so that only the log of it is kept

A random LLaMA of three blocks, text made on the spot, no network. Exit status 0: no difference.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from compare_results import numbers
from sweep_outcome import Outcome, again, artifacts, compare, completed, look, written

ROOT = Path(__file__).resolve().parent.parent
for name, value in (
    ("OMP_NUM_THREADS", "1"), ("HF_HUB_OFFLINE", "1"), ("WANDB_MODE", "offline"), ("CUDA_VISIBLE_DEVICES", ""),
):  # fmt: skip
    os.environ[name] = value
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

WAYS = ("killed", "twice", "joblib", "slurm", "full")
QUANTIZERS, SEARCHES = ("per_tensor_static", "smoothquant_o3"), ("greedy_sampled", "newline")
"""Of each seed all four, which share the steps that they have in common; one search where there are fewer runs."""

SWEEP = [
    "model=tiny", "data=file", f"quantizer={','.join(QUANTIZERS)}",
    "tuning=short", "tuning.steps=6", "tuning.sequences=6", "tuning.sequence_length=16", "tuning.batch_size=2",
    "tuning.warmup_steps=1", "tuning.evaluate_every=2", "tuning.held_out_sequences=2", "search.candidates=24",
    "search.frequent=8", "search.text_length=16", "search.max_length=2", "search.tau=1.0", "search.batch_size=4",
    "quantizer.calibration.samples=2", "quantizer.calibration.length=16", "eval.block_length=32", "eval.blocks=4",
    "eval.activation_blocks=2",
]  # fmt: skip
DEADLINE = 3600.0
"""Seconds that a way may take; then it is ended, and said to hang."""

# ---- one sweep ----------------------------------------------------------------------------------------------------


def sweep(text: Path, output: Path, runs: int, more: list[str]) -> list[str]:
    """The arguments of `cushion`."""
    searches = SEARCHES[: 2 - runs // len(QUANTIZERS) % 2]
    seeds = ",".join(map(str, range(runs // len(QUANTIZERS) // len(searches))))
    values = [f"search={','.join(searches)}", f"data.path={text}", f"seed={seeds}", f"paths.output_dir={output}"]
    return ["-m", *SWEEP, *values, *more]


class Processes:
    """The command `cushion`, each time as the leader of a process group; all are over at the end of the block."""

    def __init__(self, deadline: float) -> None:
        self._until = time.monotonic() + deadline
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            kill(process)

    def start(self, arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
        """Start it with these arguments; what it prints is added to `log`."""
        command = [sys.executable, "-c", "from cushion.cli import main; main()", *arguments]  # as the installed one
        with log.open("ab") as file:
            process = subprocess.Popen(
                command, start_new_session=True, cwd=log.parent, stdout=file, stderr=subprocess.STDOUT
            )
        self._started.append(process)
        return process

    def check_time(self) -> None:
        """Raise a `TimeoutError` when the time is up."""
        if time.monotonic() > self._until:
            raise TimeoutError("hangs: it was not at its end when the time was up")

    def wait(self, process: subprocess.Popen[bytes]) -> int:
        """Wait for its end, and return the exit status."""
        while process.poll() is None:
            self.check_time()
            time.sleep(0.1)
        return process.returncode

    def run(self, arguments: list[str], log: Path) -> int:
        """Start, wait, and return the exit status."""
        return self.wait(self.start(arguments, log))


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to its process group, if it is not over."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# ---- the ways -----------------------------------------------------------------------------------------------------


def killed(processes: Processes, arguments: list[str], output: Path, whole: Outcome, kills: int, seed: int) -> Outcome:
    """Kill the sweep at random moments: after a number of finished steps, and a random part of a step's time.

    At the latest when one step more is finished: a step may be far shorter than the mean of them.
    """
    draw, log = random.Random(seed), output.with_suffix(".log")
    steps, before, problems, done = len(whole.attempts), {}, [], 0
    started = time.perf_counter()
    for number, moment in enumerate(sorted(draw.sample(range(int(0.95 * steps)), kills)), start=1):
        process = processes.start(arguments, log)
        while process.poll() is None and len(artifacts(output)) < moment:
            processes.check_time()
            time.sleep(0.05)
        late = time.monotonic() + draw.uniform(0, 2 * whole.seconds / steps)
        while process.poll() is None and len(artifacts(output)) <= moment and time.monotonic() < late:
            time.sleep(0.02)
        kill(process)
        if process.returncode == -signal.SIGKILL:
            done += 1
        elif process.returncode != 0:
            problems.append(f"exit status {process.returncode} before it was killed for the {number}. time")
        now = written(output)
        problems += again(before, now)
        before = now
        what = f"kill {number}" if process.returncode == -signal.SIGKILL else f"at its end before kill {number}"
        print(f"  {what}: {len(completed(output))} runs, {len(artifacts(output))} of {steps} steps done", flush=True)
    status = processes.run(arguments, log)
    problems += again(before, written(output))
    outcome = look("killed", output, time.perf_counter() - started, status)
    outcome.problems, outcome.kills = problems + outcome.problems, done
    return outcome


def twice(processes: Processes, arguments: list[str], output: Path) -> Outcome:
    """The same command in two processes at once."""
    started = time.perf_counter()
    both = [processes.start(arguments, output.with_suffix(f".{number}.log")) for number in range(2)]
    status = max(abs(processes.wait(process)) for process in both)
    return look("twice", output, time.perf_counter() - started, status)


def launched(way: str, processes: Processes, arguments: list[str], output: Path) -> Outcome:
    """Through one of Hydra's launchers."""
    more = {
        "joblib": ["hydra/launcher=joblib_local", "hydra.launcher.n_jobs=2"],
        "slurm": ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1"],
    }
    started, log = time.perf_counter(), output.with_suffix(".log")
    with cluster(output.parent) if way == "slurm" else contextlib.nullcontext():
        status = processes.run([*arguments, *more[way]], log)
    return look(way, output, time.perf_counter() - started, status)


@contextlib.contextmanager
def cluster(folder: Path) -> Iterator[None]:
    """SLURM: the one that answers, or one of this machine."""
    if subprocess.run(["sinfo", "--noheader"], capture_output=True, timeout=60).returncode == 0:
        yield
        return
    before = dict(os.environ)
    with socket.socket() as one, socket.socket() as other:  # both open at once, so that they differ
        for name, free in (("SLURMCTLD_PORT", one), ("SLURMD_PORT", other)):
            free.bind(("127.0.0.1", 0))
            os.environ[name] = str(free.getsockname()[1])
    script = str(ROOT / "scripts" / "slurm_one_node.sh")
    os.environ["SLURM_CONF"] = str(folder / "cluster" / "slurm.conf")
    try:
        subprocess.run([script, "start", str(folder / "cluster")], check=True, timeout=300)
        yield
    finally:
        subprocess.run([script, "stop", str(folder / "cluster")], check=False, timeout=300)
        for name in ("SLURMCTLD_PORT", "SLURMD_PORT", "SLURM_CONF"):
            del os.environ[name]
            os.environ |= {name: before[name]} if name in before else {}


def full(processes: Processes, arguments: list[str], output: Path) -> Outcome:
    """On a file system that fills up in the middle; then with room."""
    log = output.with_suffix(".log")
    output.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(output)], check=True)
    started = time.perf_counter()
    try:
        status = processes.run(arguments, log)
        problems = [] if status == 1 else [f"exit status {status} on a full disk"]
        if "Traceback" in log.read_text(encoding="utf-8"):
            problems.append("a traceback on a full disk")
        before = written(output)
        print(f"  full: {len(completed(output))} runs, {len(before) - len(completed(output))} steps done")
        subprocess.run(["mount", "-o", "remount,size=1g", str(output)], check=True)
        status = processes.run(arguments, log)
        problems += again(before, written(output))
        outcome = look("full", output, time.perf_counter() - started, status)
    finally:
        subprocess.run(["umount", "--lazy", str(output)], check=True)
    outcome.problems = problems + outcome.problems
    return outcome


def reason_to_skip(way: str) -> str | None:
    """Why a way cannot be gone on this machine."""
    plugin = {"joblib": "hydra_joblib_launcher", "slurm": "hydra_submitit_launcher"}.get(way)
    if plugin is not None:
        from importlib.util import find_spec

        if find_spec("hydra_plugins") is None or find_spec(f"hydra_plugins.{plugin}") is None:
            return f"{plugin} is not installed: pip install {plugin.replace('_', '-')}"
    if way == "slurm":
        absent = [name for name in ("sbatch", "srun", "sinfo") if shutil.which(name) is None]
        if absent:
            return f"SLURM is not installed ({', '.join(absent)}): apt-get install slurm-wlm munge"
    if way == "full" and os.geteuid() != 0:
        return "a small file system can be made by root only"
    return None


# ---- the report ----------------------------------------------------------------------------------------------------


def report(outcomes: list[Outcome], skipped: dict[str, str]) -> None:
    """Print the table, and every problem."""
    counts = Counter(key.split("/")[0] for key in outcomes[0].attempts)
    print(f"\nsteps of the unbroken sweep: {', '.join(f'{number} {name}' for name, number in sorted(counts.items()))}")
    print(f"numbers compared in every sweep: {numbers(outcomes[0].results)}\n")
    line = "{:<10}{:>6}{:>7}{:>8}{:>14}{:>10}{:>11}"
    print(line.format("", "kills", "runs", "steps", "interrupted", "seconds", "problems"))
    for one in outcomes:
        interrupted = sum(one.attempts.values()) - len(one.attempts)
        values = (one.kills, len(one.results), len(one.attempts), interrupted, f"{one.seconds:.0f}", len(one.problems))
        print(line.format(one.way, *values))
    for way, reason in skipped.items():
        print(f"{way:<10}skipped: {reason}")
    for one in outcomes:
        for problem in one.problems:
            print(f"{one.way}: {problem}", file=sys.stderr)


def make_text(path: Path) -> None:
    """60 different documents: enough for every purpose of a tiny run."""
    words = list("etaoinshrdlu")
    documents = [
        f"Document {index}. " + " ".join(words[(index * 7 + step * (index % 5 + 3)) % 11] * 3 for step in range(120))
        for index in range(60)
    ]
    path.write_text("\n\n".join(documents), encoding="utf-8")


def main() -> None:
    """Run the sweeps, compare them, exit with 1 on any difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=20, help="runs of the sweep, an even number (default: 20)")
    parser.add_argument("--kills", type=int, default=5, help="how often it is killed (default: 5)")
    parser.add_argument("--only", default=",".join(WAYS), metavar="WAYS", help=f"of {', '.join(WAYS)} (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills (default: 0)")
    parser.add_argument("--folder", type=Path, help="keep everything there; it must be new (default: a temporary one)")
    parser.add_argument("--deadline", type=float, default=DEADLINE, metavar="SECONDS",
                        help=f"for each way (default: {DEADLINE:.0f})")  # fmt: skip
    parser.add_argument("--without-wandb", action="store_true", help="run with tracking=none")
    given = parser.parse_args()
    ways = given.only.split(",")
    if given.runs < len(QUANTIZERS) or given.runs % len(QUANTIZERS):
        parser.error(f"--runs {given.runs}: a multiple of {len(QUANTIZERS)}, one for each quantizer")
    if unknown := set(ways) - set(WAYS):
        parser.error(f"--only {', '.join(sorted(unknown))}: of {', '.join(WAYS)}")
    folder: Path = given.folder or Path(tempfile.mkdtemp(prefix="cushion-check-"))
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=given.folder is None)
    make_text(folder / "text.txt")

    outcomes, skipped = go(folder, ways, given)
    report(outcomes, skipped)
    if any(one.problems for one in outcomes):
        print(f"what was printed and found is kept in {folder} (of `full` what was printed)", file=sys.stderr)
        sys.exit(1)
    if given.folder is None:
        shutil.rmtree(folder)


def go(folder: Path, ways: list[str], given: argparse.Namespace) -> tuple[list[Outcome], dict[str, str]]:
    """The unbroken sweep and the others; what came of them, and what was skipped for which reason."""
    skipped: dict[str, str] = {}
    print(f"unbroken: {given.runs} runs in {folder}", flush=True)
    whole = one_way("unbroken", folder, given, None)
    if len(whole.results) != given.runs:
        whole.problems.append(f"{len(whole.results)} runs were completed of {given.runs}; see {folder}/unbroken.log")
    outcomes = [whole]
    for way in ways if len(whole.results) == given.runs else ():
        if reason := reason_to_skip(way):
            skipped[way] = reason
            continue
        print(f"{way}:", flush=True)
        outcomes.append(one_way(way, folder, given, whole))
        print(f"  {len(outcomes[-1].problems)} problems in {outcomes[-1].seconds:.0f} s", flush=True)
    return outcomes, skipped


def one_way(way: str, folder: Path, given: argparse.Namespace, whole: Outcome | None) -> Outcome:
    """Go one way and compare it with the unbroken sweep; what goes wrong on it is a problem, and ends it alone."""
    output, started = folder / way, time.perf_counter()
    arguments = sweep(folder / "text.txt", output, given.runs, ["tracking=none"] if given.without_wandb else [])
    try:
        with Processes(given.deadline) as processes:
            if whole is None:
                status = processes.run(arguments, output.with_suffix(".log"))
                return look(way, output, time.perf_counter() - started, status)
            if way == "killed":
                outcome = killed(processes, arguments, output, whole, given.kills, given.seed)
            elif way == "twice":
                outcome = twice(processes, arguments, output)
            elif way == "full":
                outcome = full(processes, arguments, output)
            else:
                outcome = launched(way, processes, arguments, output)
        compare(whole, outcome)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told in the table, and the other ways are gone
        problem = str(error) if isinstance(error, TimeoutError) else f"{type(error).__name__}: {error}"
        return Outcome(way, time.perf_counter() - started, {}, {}, problems=[problem])
    return outcome


if __name__ == "__main__":
    main()
