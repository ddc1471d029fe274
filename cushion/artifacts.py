"""A content-addressed cache of expensive steps: the same inputs, the same folder, computed once.

The key of an artifact is a hash of everything it depends on (model fingerprint, configuration of the step, hash of the
text, version of the step's code), and those dependencies are written beside it, with a digest of every file. What does
not fit its key or its digests, because it was damaged, changed or put into the wrong place, is set aside with a warning
and made again. A file lock keeps two processes from computing the same thing; a folder appears whole or not at all; a
step under way keeps a checkpoint, so that a killed run loses at most a few seconds.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cushion.errors import ArtifactError
from cushion.hashing import digest, file_digest
from cushion.integrity import SET_ASIDE

logger = logging.getLogger(__name__)

DEPENDENCIES, MADE = "depends_on.json", "made.json"
CHECKPOINT_SECONDS = 10.0
"""How much work, in seconds, a kill may cost at most."""


def write_json(path: Path, record: Any) -> None:
    """Write JSON atomically: readers see the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1, ensure_ascii=False, allow_nan=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):  # what writing raises names no file, or the temporary one
            error.filename = str(path)
        raise


def read_json(path: Path, artifact: Path | None = None) -> Any:
    """Read JSON; a file that is missing or damaged is an `ArtifactError` that names it and the folder to delete.

    That folder is `artifact`, where the file does not stand in it directly.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _damaged(path, artifact, error) from error


def read_tensors(path: Path, device: str = "cpu", artifact: Path | None = None) -> dict[str, Tensor]:
    """Read safetensors; what is missing or damaged is told as by `read_json`."""
    try:
        return load_file(path, device=device)
    except (OSError, SafetensorError) as error:
        raise _damaged(path, artifact, error) from error


def _damaged(path: Path, artifact: Path | None, error: Exception) -> ArtifactError:
    return ArtifactError(f"{path} is damaged ({error}): delete the folder {artifact or path.parent} and run again")


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well, and vanishes when it does not.

    Call it with a lock on `target`: what an earlier process left behind when it was killed is removed.
    """
    for left_over in target.parent.glob(f".{target.name}-*"):
        shutil.rmtree(left_over)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.replace(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turn what reading a damaged artifact raises into an `ArtifactError` that says which folder to delete."""
    try:
        yield
    except (ArtifactError, KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"the cached step in {folder} is damaged ({error}): delete that folder") from error


class Checkpoint:
    """The state of a step under way: JSON and optionally tensors, replaced atomically, at most every few seconds."""

    def __init__(self, path: Path, every_seconds: float = CHECKPOINT_SECONDS) -> None:
        self._path = path
        self._every = every_seconds
        self._last = time.monotonic()

    def load(self) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """What was saved last, or None. Of one that is not as it was saved nothing is used, and a warning says so."""
        if not os.path.lexists(self._path):
            return None
        try:
            record = read_json(self._path)
            file = None if record["tensors"] is None else self._path.with_name(record["tensors"])
            if record["digest"] != _saved(record["state"], file):
                raise ArtifactError("it was changed after it was saved")
            return record["state"], {} if file is None else load_file(file)
        except (ArtifactError, OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            logger.warning("the checkpoint %s is damaged (%s): this step starts over", self._path, error)
            self._drop()
            return None

    def _drop(self) -> None:
        """Leave nothing where the next save writes."""
        if self._path.is_dir() and not self._path.is_symlink():
            shutil.rmtree(self._path)
        else:
            self._path.unlink(missing_ok=True)

    def due(self) -> bool:
        """Whether enough time has passed since the last save."""
        return time.monotonic() - self._last >= self._every

    def save(self, state: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
        """Replace what was saved. The tensors are written under a new name first, so a kill leaves a matching pair."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        name, file = None, None
        if tensors is not None:
            name = f"{self._path.stem}-{time.time_ns()}.safetensors"
            copies = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
            file = self._path.with_name(name)
            save_file(copies, file)
        write_json(self._path, {"state": state, "tensors": name, "digest": _saved(state, file)})
        for old in self._path.parent.glob(f"{self._path.stem}-*.safetensors"):
            if old.name != name:
                old.unlink(missing_ok=True)
        self._last = time.monotonic()


def _saved(state: Any, tensors: Path | None) -> str:
    """A digest of a state and of the file of its tensors."""
    return digest([json.loads(json.dumps(state)), None if tensors is None else file_digest(tensors)])


class Workspace:
    """The folder in which one artifact is being made, and the checkpoint of its making."""

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        self.folder = folder
        self.checkpoint = checkpoint


class ArtifactStore:
    """Finished artifacts under `root/<step>/<key>/`, each with the dependencies that its key was made of."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, step: str, depends_on: dict[str, Any]) -> Path:
        """Where the artifact of this step with these dependencies is, or will be."""
        return self.root / step / digest({"step": step, **depends_on})

    def get_or_make(self, step: str, depends_on: dict[str, Any], make: Callable[[Workspace], None]) -> Path:
        """The folder of an artifact, made now by `make` if it does not exist yet, or is not what it should be.

        Args:
            step: name of the step.
            depends_on: everything the artifact is a function of, as plain JSON.
            make: fills `workspace.folder`; it may keep `workspace.checkpoint`, and finds an interrupted one there.

        """
        folder = self.folder(step, depends_on)
        under_way = folder.with_name(folder.name + ".partial")
        made_for = {"step": step, **depends_on}
        if misfit(folder, made_for) is None:
            if under_way.is_dir():  # a process was killed just after it had finished
                shutil.rmtree(under_way, ignore_errors=True)
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(folder) + ".lock"):
            reason = misfit(folder, made_for)
            if reason is None:  # another process made it while this one waited
                return folder
            if os.path.lexists(folder):
                place = self._set_aside(folder)
                logger.warning("the cached step in %s %s: it was moved to %s and is made again", folder, reason, place)
            checkpoint = under_way / "checkpoint.json"
            try:
                attempts = _one_more_attempt(under_way / "attempts.json")
                with whole_folder(folder) as temporary:
                    make(Workspace(temporary, Checkpoint(checkpoint)))
                    write_json(temporary / DEPENDENCIES, made_for)
                    write_json(temporary / MADE, {"attempts": attempts, "files": _digests(temporary)})
            finally:
                if folder.is_dir() or not checkpoint.is_file():
                    shutil.rmtree(under_way, ignore_errors=True)
        return folder

    def _set_aside(self, folder: Path) -> Path:
        """Move what stands at the place of an artifact to where nothing looks for one; its new place."""
        place = self.root / SET_ASIDE / folder.parent.name / f"{folder.name}-{time.time_ns()}"
        place.parent.mkdir(parents=True, exist_ok=True)
        return folder.rename(place)


def misfit(folder: Path, made_for: dict[str, Any]) -> str | None:
    """Why a folder is not the artifact that was made for these dependencies, in words; None where it is.

    Every file is read: it must be there, as it was written, and nothing else may be.
    """
    if not folder.is_dir():
        return "is not a folder" if os.path.lexists(folder) else "is not there"
    try:
        kept = json.loads((folder / DEPENDENCIES).read_text(encoding="utf-8"))
        files = json.loads((folder / MADE).read_text(encoding="utf-8"))["files"]
        found = _digests(folder)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        return f"cannot be checked ({type(error).__name__}: {error})"
    if kept != json.loads(json.dumps(made_for)):
        return "was made for something else"
    if not isinstance(files, dict) or found.keys() != files.keys():
        differing = sorted(found.keys() ^ set(files if isinstance(files, dict) else ()))
        return f"lacks a file or has one too many ({', '.join(differing)})"
    changed = [name for name, content in found.items() if content != files[name]]
    return f"was changed after it was made ({', '.join(changed)})" if changed else None


def _digests(folder: Path) -> dict[str, str]:
    """By path below the folder the SHA-256 of every file in it, but of the one that holds them.

    Raises:
        OSError: something in it is not a file or a folder, or cannot be read.

    """
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name != MADE and not path.is_dir():
            found[name] = file_digest(path)
    return found


def _one_more_attempt(path: Path) -> list[dict[str, Any]]:
    """Note in `path` that this process sets about a step; all attempts so far, those that were killed included."""
    try:
        attempts = list(read_json(path)) if path.is_file() else []
    except (ArtifactError, TypeError) as error:
        logger.warning("earlier attempts at this step are not counted: %s", error)
        attempts = []
    started = datetime.now(UTC).isoformat(timespec="milliseconds")
    attempts.append({"started": started, "host": socket.gethostname(), "process": os.getpid()})
    write_json(path, attempts)
    return attempts
