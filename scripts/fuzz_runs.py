"""Small runs of every kind for scripts/fuzz.py, each forked from a process that has imported everything already.

A start from nothing takes ten times as long as such a run.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import importlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from check_sweep import make_text  # sets the environment: no network, no GPU, one thread
from compare_results import exact

from cushion.integrity import is_aside
from cushion.journal import FILES

_COMMON = [
    "tracking=none", "model=tiny", "data=file", "quantizer.calibration.samples=2", "quantizer.calibration.length=16",
    "eval.block_length=32", "eval.blocks=4", "eval.activation_blocks=2",
]  # fmt: skip
_GREEDY = ["search.candidates=12", "search.frequent=4", "search.text_length=16", "search.max_length=2",
           "search.tau=1.0", "search.batch_size=4"]  # fmt: skip
_TUNING = ["tuning.steps=4", "tuning.sequences=6", "tuning.sequence_length=16", "tuning.batch_size=2",
           "tuning.warmup_steps=1", "tuning.evaluate_every=2", "tuning.held_out_sequences=2"]  # fmt: skip

KINDS = {
    "tuned": ["quantizer=per_tensor_static", "search=greedy_sampled", "tuning=learned", *_GREEDY, *_TUNING],
    "qfem": ["quantizer=qfem", "quantizer.qfem.texts=2", "search=newline", "tuning=none"],
    "reconstructed": ["quantizer=w6a6_mse_static", "search=qfep", "search.text_length=16", "tuning=none",
                      "reconstruction=weights", "reconstruction.epochs=1"],
    "tasks": ["quantizer=per_tensor_dynamic", "search=none", "tuning=none", "eval.tasks=[fuzzed]",
              "eval.samples=true"],
}  # fmt: skip
"""By name the arguments of runs that together have every kind of cached step and of file in their folder."""

_TASK = """\
task: fuzzed
dataset_path: json
dataset_kwargs:
  data_files:
    test: {records}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["one", "two"]
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
"""


@dataclass(frozen=True)
class Ended:
    """How a run ended: its exit status (negative: the signal that killed it, None: it hung), and what it printed."""

    status: int | None
    printed: str

    @property
    def has_traceback(self) -> bool:
        """Whether it ended with a bug."""
        return "Traceback (most recent call last)" in self.printed

    @property
    def told(self) -> str:
        """What it said of trouble: warnings, errors, the end of a traceback."""
        lines = self.printed.splitlines()
        starts = [at for at, line in enumerate(lines) if line.startswith("Traceback")]
        said = [found[0] for line in lines if (found := _SAID.search(line))]
        return "\n".join([*said, *(lines[starts[0] :][-12:] if starts else [])])


@dataclass(frozen=True)
class Sound:
    """What an unbroken run left, as `contents` tells it, and the seconds that it took."""

    contents: dict[str, Any]
    seconds: float


def finished(output: Path) -> dict[str, int]:
    """Which file says that an artifact is finished, by the artifact's place: computed again, it is another one."""
    found = {}
    for path in output.glob("cache/*/*/made.json"):
        if path.is_file() and not is_aside(path.relative_to(output)):
            found[path.parent.relative_to(output).as_posix()] = path.stat().st_ino
    return found


_SAID = re.compile(r"(?:WARNING: |cushion: ).*")
"""A warning or an error, also where it stands behind a progress bar on the same line."""


class Runs:
    """The runs of `KINDS`: what they read lies in a folder, and what they leave wherever they are started.

    Args:
        folder: where text and tasks are made; it must be new.
        deadline: seconds of the processor after which a run is said to hang, or seconds in which it took none: a busy
            machine makes no run hang.

    """

    def __init__(self, folder: Path, deadline: float) -> None:
        self._deadline = deadline
        folder.mkdir()
        self._text, self._tasks = folder / "text.txt", folder / "tasks"
        make_text(self._text)
        self._tasks.mkdir()
        records = [{"question": f"question {number}", "answer": number % 2} for number in range(4)]
        path = self._tasks / "records.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
        (self._tasks / "fuzzed.yaml").write_text(_TASK.format(records=path), encoding="utf-8")
        _import_everything(str(self._tasks))

    def start(self, kind: str, folder: Path, more: Sequence[str] = ()) -> int:
        """Start a run of a kind in a folder; returns its process. What it prints is added to `printed` there.

        `more` are further words of the command line.
        """
        words = [*self._words(kind), *more]
        sys.stdout.flush()
        sys.stderr.flush()
        process = os.fork()
        if process == 0:
            _be_cushion(words, folder)
        return process

    def _words(self, kind: str) -> list[str]:
        words = [*_COMMON, *KINDS[kind], f"data.path={self._text}", "paths.output_dir=outputs"]
        return [*words, f"eval.include_path={self._tasks}"] if kind == "tasks" else words

    def compose_once(self) -> None:
        """From here on a run of a kind without further words is forked with its configuration: two thirds of its work.

        Only for a campaign that changes nothing that a configuration is composed from, and waits for the end of a run.
        """
        _keep_configurations()
        place = Path.cwd()
        os.chdir(self._tasks.parent)
        for kind in KINDS:
            _compose(self._words(kind))
        os.chdir(place)

    def wait(self, process: int, folder: Path) -> Ended:
        """How a run that was started in this folder ends. One that hangs is killed."""
        status, used, until = None, -1.0, 0.0
        while status is None:
            done, found = os.waitpid(process, os.WNOHANG)
            if done:
                status = os.waitstatus_to_exitcode(found)
            elif (now := _processor_seconds(process)) > used + 0.1:
                used, until = now, time.monotonic() + self._deadline
            elif used > self._deadline or time.monotonic() > until:
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
                break
            else:
                time.sleep(0.005)
        return Ended(status, (folder / "printed").read_text(encoding="utf-8", errors="replace"))

    def run(self, kind: str, folder: Path, more: Sequence[str] = ()) -> Ended:
        """Start, wait, and say how it ended; of what is printed only what this run prints."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "printed").unlink(missing_ok=True)
        return self.wait(self.start(kind, folder, more), folder)

    def sound(self, kind: str, folder: Path) -> Sound:
        """What an unbroken run leaves.

        Raises:
            RuntimeError: if it fails.

        """
        started = time.monotonic()
        ended = self.run(kind, folder)
        seconds = time.monotonic() - started
        if ended.status != 0:
            raise RuntimeError(f"the sound run of {kind} failed:\n{ended.printed}")
        return Sound(contents(folder / "outputs"), seconds)


def _import_everything(tasks: str) -> None:
    """What every run needs, here once: it is forked with it."""
    import torch

    torch.set_num_threads(1)
    for name in ("cushion.start", "cushion.pipeline", "cushion.cli", "cushion.reporting.cli",
                 "cushion.evaluation.harness",
                 "transformers.models.llama.modeling_llama"):  # fmt: skip
        importlib.import_module(name)
    indexed = importlib.import_module("cushion.evaluation.tasks")
    manager = importlib.import_module("lm_eval.tasks").TaskManager(include_defaults=False, include_path=tasks)
    # lm-eval's own 26,000 files take seconds, and are not asked for
    indexed._task_manager = lambda include_path: manager
    importlib.import_module("cushion.code").package_version()
    importlib.import_module("cushion.reporting.figures").draw_figures = lambda *_: None  # as long as all the rest
    gc.collect()
    gc.freeze()


def _keep_configurations() -> None:
    """Let Hydra read the files of a configuration once for each command line."""
    loader = importlib.import_module("hydra._internal.config_loader_impl").ConfigLoaderImpl
    load, known = loader.load_configuration, dict[str, Any]()

    def load_once(self: Any, *given: Any, **options: Any) -> Any:
        asked = repr((given, sorted(options.items())))
        if asked not in known:
            known[asked] = load(self, *given, **options)
        return copy.deepcopy(known[asked])

    loader.load_configuration = load_once


def _compose(words: list[str]) -> None:
    """Be the command in this process, up to where the run would begin."""
    cli = importlib.import_module("cushion.cli")
    execute, before = cli.execute, sys.argv
    cli.execute, sys.argv = lambda *_, **__: Path(), ["cushion", *words]
    try:
        cli.main()
    finally:
        cli.execute, sys.argv = execute, before


def _processor_seconds(process: int) -> float:
    """What a child has taken of the processor so far; 0 where the system does not tell."""
    with contextlib.suppress(OSError):
        told = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(told[11]) + int(told[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def _be_cushion(words: list[str], folder: Path) -> None:
    """In a process of its own: be the command, and never return."""
    status = 70
    try:
        os.fsync = lambda _: None  # what is written need not outlive a power cut here
        os.chdir(folder)
        printed = os.open("printed", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(printed, 1)
        os.dup2(printed, 2)
        sys.argv = ["cushion", *words]
        importlib.import_module("cushion.start").main()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001 - what Python does with it where no `try` is
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def contents(output: Path) -> dict[str, Any]:
    """What runs left in their folders and must be the same each time, by its path below the output folder.

    JSON without seconds and places, everything else as bytes, also JSON that is damaged. Not locks, nor what was set
    aside; nor the cache: an artifact that no run has read since it was damaged may lie there as it is.
    """
    found: dict[str, Any] = {}
    for path in sorted(output.rglob("*")):
        place = path.relative_to(output)
        if place.parts[0] in ("cache", "sweeps") or path.name in (".lock", *FILES) or is_aside(place) or path.is_dir():
            continue
        try:
            content: Any = path.read_bytes()
        except OSError as error:  # a loop of links
            content = error.strerror
        if path.suffix == ".json":
            with contextlib.suppress(ValueError, TypeError):
                content = exact(json.loads(content))
        found[place.as_posix()] = content
    return found
