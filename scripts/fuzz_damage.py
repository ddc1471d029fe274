"""Damage one file of a finished run, repeat the run, and compare what it left with what the sound run left.

A quarter of the cases leaves the result as it is, so that it must be told from a sound one; in the others it is gone,
so that the cached steps are read again. A case ends well where the run mends what was damaged and says so, where what
was damaged is not used, or where one line says what to do.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from fuzz_report import Case, Limits
from fuzz_runs import KINDS, Ended, Runs, contents, finished

from cushion.journal import FILES

DEADLINE = 60.0
"""Seconds of the processor, or of waiting, after which a run is said to hang, if nothing else is asked for."""

_LEFT_OUT = (".lock", *FILES)
"""Ends of names of files that hold nothing, or only say how a run came about."""


def cases(limits: Limits, given: argparse.Namespace) -> Iterator[Case]:
    """One damage after the other, each to a copy of a sound run."""
    runs = Runs(limits.folder / "inputs", given.deadline)
    runs.compose_once()
    sound = {kind: runs.sound(kind, limits.folder / f"sound-{kind}").contents for kind in KINDS}
    for index, draw in limits.draws():
        kind, folder = list(KINDS)[index % len(KINDS)], limits.folder / f"case-{index}"
        shutil.copytree(limits.folder / f"sound-{kind}", folder)
        output = folder / "outputs"
        results = list(output.glob("*/*/*/*/result.json"))
        keeps_result = draw.random() < 0.25
        if not keeps_result:
            for result in results:
                result.unlink()
        place, way = damaged(output, draw)
        before = finished(output)
        ended = runs.run(kind, folder)
        name = f"case {index}: {way} {place} of {kind}, {'with' if keeps_result else 'without'} its result"
        yield _judged(name, ended, output, sound[kind], place, before)
        shutil.rmtree(folder)


def damaged(output: Path, draw: random.Random) -> tuple[str, str]:
    """Damage a random file, or the folder of a random one; where it is, and what was done."""
    paths = [path for path in sorted(output.rglob("*")) if path.is_file() and not path.name.endswith(_LEFT_OUT)]
    while True:
        path, way = draw.choice(paths), draw.choice(list(WAYS))
        if WAYS[way](path, draw):
            return path.relative_to(output).as_posix(), way


def _flip(path: Path, draw: random.Random) -> bool:
    """Another bit somewhere."""
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    return True


def _digit(path: Path, draw: random.Random) -> bool:
    """Another digit in a text."""
    content = bytearray(path.read_bytes())
    digits = [at for at, byte in enumerate(content) if 48 <= byte <= 57]
    if not digits or path.suffix == ".safetensors":
        return False
    at = draw.choice(digits)
    content[at] = draw.choice([byte for byte in range(48, 58) if byte != content[at]])
    path.write_bytes(content)
    return True


def _truncate(path: Path, draw: random.Random) -> bool:
    """Only the first part."""
    os.truncate(path, draw.randrange(1, path.stat().st_size))
    return True


def _empty(path: Path, draw: random.Random) -> bool:
    """Nothing in it."""
    os.truncate(path, 0)
    return True


def _delete(path: Path, draw: random.Random) -> bool:
    """Not there."""
    path.unlink()
    return True


def _delete_folder(path: Path, draw: random.Random) -> bool:
    """Neither the file nor what lies beside it."""
    shutil.rmtree(path.parent)
    return True


def _swap(path: Path, draw: random.Random) -> bool:
    """The content of a file of the same name in another folder, and that one's here."""
    return _exchange(path, [one for one in path.parents[1].glob(f"*/{path.name}") if one != path], draw)


def _swap_folder(path: Path, draw: random.Random) -> bool:
    """The folder of another artifact of the step, and that one's here."""
    folders = [one for one in path.parent.parent.glob("*") if one.is_dir() and one != path.parent]
    return _exchange(path.parent, folders, draw)


def _exchange(one: Path, others: list[Path], draw: random.Random) -> bool:
    if not others:
        return False
    other, aside = draw.choice(sorted(others)), one.with_name("exchanged")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    return True


def _folder(path: Path, draw: random.Random) -> bool:
    """A folder in its place."""
    path.unlink()
    path.mkdir()
    return True


def _loop(path: Path, draw: random.Random) -> bool:
    """A link to itself."""
    path.unlink()
    path.symlink_to(path.name)
    return True


def _file_for_folder(path: Path, draw: random.Random) -> bool:
    """A file where its folder was."""
    shutil.rmtree(path.parent)
    path.parent.write_text("a file", encoding="utf-8")
    return True


def _loop_for_folder(path: Path, draw: random.Random) -> bool:
    """A link to itself where its folder was."""
    shutil.rmtree(path.parent)
    path.parent.symlink_to(path.parent.name)
    return True


def _add(path: Path, draw: random.Random) -> bool:
    """One file too many beside it."""
    (path.parent / "added.json").write_text("{}", encoding="utf-8")
    return True


WAYS: dict[str, Callable[[Path, random.Random], bool]] = {
    "bit flipped in": _flip, "digit changed in": _digit, "cut short": _truncate, "emptied": _empty,
    "deleted": _delete, "folder deleted of": _delete_folder, "content swapped of": _swap,
    "folder swapped of": _swap_folder, "folder for": _folder, "loop of links for": _loop,
    "file for the folder of": _file_for_folder, "loop of links for the folder of": _loop_for_folder,
    "a file added beside": _add,
}  # fmt: skip
"""What may happen to a file, by name; each says whether it could be done to this one."""


def _judged(
    name: str, ended: Ended, output: Path, sound: dict[str, object], place: str, before: dict[str, int]
) -> Case:
    if ended.status is None:
        return Case(name, "hang", True, ended.printed[-2000:])
    if ended.has_traceback or ended.status not in (0, 1):
        return Case(name, "traceback", True, ended.told)
    is_told = any(part and part in ended.told for part in (place, place.rpartition("/")[0]))
    if ended.status == 1:
        is_clear = is_told and len(ended.told.splitlines()) == 1
        return Case(name, "refused in one line" if is_clear else "refused unclearly", not is_clear, ended.told)
    found = contents(output)
    added = {path for path in found if path.endswith("added.json")}
    if differing := sorted(
        path for path in (sound.keys() | found.keys()) - added if sound.get(path) != found.get(path)
    ):
        return Case(name, "a silent difference", True, "\n".join([f"differs: {path}" for path in differing]))
    now = finished(output)
    if twice := [one for one, file in before.items() if now.get(one) != file and one not in ended.told]:
        return Case(name, "computed twice", True, "\n".join(twice))
    return Case(name, "mended and named" if is_told else "mended, or not used")
