"""The cache of expensive steps: computed once, whole or not at all, and what does not fit is made again."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_run import processes

from cushion.artifacts import ArtifactStore, Checkpoint, Workspace, read_json, write_json
from cushion.errors import ArtifactError


def counting(made: list[int], value: int = 7) -> Callable[[Workspace], None]:
    def make(workspace: Workspace) -> None:
        made.append(value)
        write_json(workspace.folder / "value.json", value)

    return make


def names(folder: Path) -> list[str]:
    """What is in a folder, its lock files left out."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock") if folder.is_dir() else []


def test_the_same_dependencies_are_computed_once(tmp_path: Path) -> None:
    store, made = ArtifactStore(tmp_path), []
    first = store.get_or_make("step", {"a": 1, "b": [2, None]}, counting(made))
    again = ArtifactStore(tmp_path).get_or_make("step", {"b": [2, None], "a": 1}, counting(made))
    assert first == again == store.folder("step", {"a": 1, "b": [2, None]})
    assert len(made) == 1
    assert read_json(first / "value.json") == 7
    assert read_json(first / "depends_on.json") == {"step": "step", "a": 1, "b": [2, None]}


@pytest.mark.parametrize(
    ("step", "changed"), [("step", {"a": 2}), ("step", {"a": "1"}), ("step", {"a": 1, "b": None}), ("other", {"a": 1})]
)
def test_a_changed_dependency_is_computed_again(tmp_path: Path, step: str, changed: dict[str, object]) -> None:
    store, made = ArtifactStore(tmp_path), []
    first = store.get_or_make("step", {"a": 1}, counting(made))
    second = store.get_or_make(step, changed, counting(made))
    assert first != second
    assert len(made) == 2


def test_an_exception_leaves_nothing_behind_and_the_next_try_succeeds(tmp_path: Path) -> None:
    store, made = ArtifactStore(tmp_path), []

    def fail(workspace: Workspace) -> None:
        (workspace.folder / "half").write_text("half")
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        store.get_or_make("step", {"a": 1}, fail)
    assert names(tmp_path / "step") == []
    folder = store.get_or_make("step", {"a": 1}, counting(made))
    assert names(folder) == ["depends_on.json", "made.json", "value.json"]
    assert len(read_json(folder / "made.json")["attempts"]) == 1, "only what was killed counts as an attempt"


def test_an_interrupted_step_finds_its_checkpoint_and_a_finished_one_drops_it(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)

    def interrupted(workspace: Workspace) -> None:
        assert workspace.checkpoint.load() is None
        workspace.checkpoint.save({"done": 3})
        raise KeyboardInterrupt

    def resumed(workspace: Workspace) -> None:
        saved = workspace.checkpoint.load()
        assert saved is not None
        write_json(workspace.folder / "value.json", saved[0]["done"])

    with pytest.raises(KeyboardInterrupt):
        store.get_or_make("step", {}, interrupted)
    folder = store.get_or_make("step", {}, resumed)
    assert read_json(folder / "value.json") == 3
    assert names(tmp_path / "step") == [folder.name]


def killed_while_making(root: Path) -> None:
    """In a process of its own: set about the artifact, and die without a word."""
    ArtifactStore(root).get_or_make("step", {"a": 1}, lambda workspace: os.kill(os.getpid(), signal.SIGKILL))


def test_every_attempt_that_was_killed_stands_in_the_record(tmp_path: Path) -> None:
    workers = []
    for _ in range(2):
        workers.append(processes().Process(target=killed_while_making, args=(tmp_path,)))
        workers[-1].start()
        workers[-1].join(120)
        assert workers[-1].exitcode == -signal.SIGKILL
    folder = ArtifactStore(tmp_path).get_or_make("step", {"a": 1}, counting([]))
    attempts = read_json(folder / "made.json")["attempts"]
    assert [attempt["process"] for attempt in attempts] == [*(worker.pid for worker in workers), os.getpid()]
    assert names(tmp_path / "step") == [folder.name]


@pytest.mark.parametrize("damaged", ["[{", "7"])
def test_a_damaged_list_of_attempts_stops_no_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: str
) -> None:
    store = ArtifactStore(tmp_path)
    under_way = store.folder("step", {"a": 1}).with_suffix(".partial")
    under_way.mkdir(parents=True)
    (under_way / "attempts.json").write_text(damaged)
    with caplog.at_level(logging.WARNING):
        folder = store.get_or_make("step", {"a": 1}, counting([]))
    assert "earlier attempts at this step are not counted" in caplog.text
    assert len(read_json(folder / "made.json")["attempts"]) == 1
    assert names(tmp_path / "step") == [folder.name]


def test_a_file_that_cannot_be_written_is_named_and_the_old_one_stays(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, "old")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match=f"File too large: '{path}'"):
            write_json(path, "new" * 100)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert read_json(path) == "old"
    assert names(tmp_path) == ["value.json"]


def test_what_a_kill_right_after_the_end_of_a_step_left_is_removed(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    folder = store.get_or_make("step", {"a": 1}, counting([]))
    Checkpoint(tmp_path / "step" / f"{folder.name}.partial" / "checkpoint.json").save({"done": 3})
    assert store.get_or_make("step", {"a": 1}, counting([])) == folder
    assert names(tmp_path / "step") == [folder.name]


def slow_make(root: Path, barrier: object, counter: Path) -> None:
    """In a process of its own: wait for the other process, then ask for the artifact."""

    def make(workspace: Workspace) -> None:
        with counter.open("a") as file:
            file.write("made\n")
        torch.randn(400, 400).svd()  # long enough for the other process to arrive at the lock
        write_json(workspace.folder / "value.json", 1)

    barrier.wait(60)  # type: ignore[attr-defined]
    folder = ArtifactStore(root).get_or_make("step", {"a": 1}, make)
    assert read_json(folder / "value.json") == 1


def test_two_processes_at_once_compute_once(tmp_path: Path) -> None:
    context = processes()
    barrier, counter = context.Barrier(2), tmp_path / "counter"
    workers = [context.Process(target=slow_make, args=(tmp_path / "cache", barrier, counter)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert counter.read_text() == "made\n"


# ---- checkpoints --------------------------------------------------------------------------------------------------


def test_a_checkpoint_gives_back_state_and_tensors(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "c" / "checkpoint.json")
    assert checkpoint.load() is None
    transposed = torch.randn(3, 4, requires_grad=True).T
    checkpoint.save({"step": 1, "names": ["a"]}, {"x": transposed, "y": torch.tensor([1, 2])})
    loaded = Checkpoint(tmp_path / "c" / "checkpoint.json").load()
    assert loaded is not None
    state, tensors = loaded
    assert state == {"step": 1, "names": ["a"]}
    assert set(tensors) == {"x", "y"}
    assert torch.equal(tensors["x"], transposed)
    assert torch.equal(tensors["y"], torch.tensor([1, 2]))


def test_a_checkpoint_keeps_tensors_that_share_memory(tmp_path: Path) -> None:
    both = torch.arange(6.0)
    Checkpoint(tmp_path / "checkpoint.json").save({}, {"current": both, "best": both, "part": both[2:4]})
    loaded = Checkpoint(tmp_path / "checkpoint.json").load()
    assert loaded is not None
    assert {name: tensor.tolist() for name, tensor in loaded[1].items()} == {
        "current": both.tolist(), "best": both.tolist(), "part": [2.0, 3.0],
    }  # fmt: skip


def test_a_new_checkpoint_replaces_the_old_one_with_its_tensors(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "checkpoint.json")
    for step in range(3):
        checkpoint.save({"step": step}, {"x": torch.full((2,), float(step))})
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    loaded = checkpoint.load()
    assert loaded is not None
    assert (loaded[0], loaded[1]["x"].tolist()) == ({"step": 2}, [2.0, 2.0])
    checkpoint.save({"step": 3})
    assert checkpoint.load() == ({"step": 3}, {})
    assert names(tmp_path) == ["checkpoint.json"]


def test_a_checkpoint_is_due_after_its_interval(tmp_path: Path) -> None:
    assert Checkpoint(tmp_path / "a.json", every_seconds=0).due()
    assert not Checkpoint(tmp_path / "a.json", every_seconds=1e9).due()


@pytest.mark.parametrize("damaged", ["checkpoint.json", "tensors"])
@pytest.mark.parametrize("content", ["", "{broken", None])
def test_a_damaged_checkpoint_is_named_and_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damaged: str, content: str | None
) -> None:
    checkpoint = Checkpoint(tmp_path / "checkpoint.json")
    checkpoint.save({"step": 1}, {"x": torch.ones(2)})
    file = tmp_path / damaged if damaged != "tensors" else next(tmp_path.glob("*.safetensors"))
    if content is not None:
        file.write_text(content)
    elif damaged == "tensors":
        file.unlink()
    else:
        file.write_bytes(b"\xff\xff")
    assert checkpoint.load() is None
    assert re.search(r"checkpoint\.json is damaged .*: this step starts over", caplog.text)
    checkpoint.save({"step": 2})
    assert checkpoint.load() == ({"step": 2}, {})


def test_a_checkpoint_that_was_changed_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint = Checkpoint(tmp_path / "checkpoint.json")
    checkpoint.save({"step": 1}, {"x": torch.ones(2)})
    file = tmp_path / "checkpoint.json"
    file.write_text(file.read_text().replace('"step": 1', '"step": 9'))
    assert checkpoint.load() is None
    assert "it was changed after it was saved" in caplog.text


# ---- JSON files ---------------------------------------------------------------------------------------------------


def test_json_comes_back_as_it_was_written(tmp_path: Path) -> None:
    record = {"text": "naïve “text”\n", "numbers": [1, 2.5, None, True], "nested": {"a": {}}}
    write_json(tmp_path / "new" / "folder" / "a.json", record)
    assert read_json(tmp_path / "new" / "folder" / "a.json") == record
    assert names(tmp_path / "new" / "folder") == ["a.json"]


def test_a_failing_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"first": "is written", "then": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("number", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_not_finite_is_no_json(tmp_path: Path, number: float) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"deep": [1.0, {"down": number}]})
    assert read_json(path) == {"old": 1}
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe"])
def test_damaged_json_is_named_with_the_way_out(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"a\.json is damaged .*delete .* and run again"):
        read_json(tmp_path / "a.json")


def test_missing_json_is_an_artifact_error_too(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


# ---- what does not fit --------------------------------------------------------------------------------------------


def _value(number: int) -> Callable[[Workspace], None]:
    def make(workspace: Workspace) -> None:
        write_json(workspace.folder / "value.json", number)
        (workspace.folder / "inner").mkdir()
        (workspace.folder / "inner" / "lines.txt").write_text(f"{number}\n")

    return make


def _loop(path: Path) -> None:
    path.unlink()
    path.symlink_to(path)


def _emptied(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _swapped(folder: Path) -> None:
    """Another artifact of the same step stands in its place, whole."""
    other = ArtifactStore(folder.parent.parent).get_or_make("step", {"a": 2}, _value(8))
    shutil.rmtree(folder)
    shutil.copytree(other, folder)


def _replaced(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("a file")


MISFITS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a digit": (lambda folder: (folder / "value.json").write_text("9\n"), r"was changed .*\(value\.json\)"),
    "a digit below": (lambda folder: (folder / "inner/lines.txt").write_text("9\n"), r"changed .*inner/lines\.txt"),
    "a file gone": (lambda folder: (folder / "value.json").unlink(), r"lacks a file .*value\.json"),
    "a file more": (lambda folder: (folder / "new.json").write_text("1"), r"has one too many \(new\.json\)"),
    "a folder for a file": (lambda folder: _emptied(folder / "value.json"), r"lacks a file"),
    "a loop of links": (lambda folder: _loop(folder / "value.json"), r"cannot be checked|lacks a file"),
    "other dependencies": (lambda folder: (folder / "depends_on.json").write_text('{"step": "step", "a": 2}'),
                           r"was made for something else"),
    "no digests": (lambda folder: (folder / "made.json").write_text('{"attempts": []}'), r"cannot be checked"),
    "damaged digests": (lambda folder: (folder / "made.json").write_text("{"), r"cannot be checked"),
    "another artifact": (_swapped, r"was made for something else"),
    "a file in its place": (_replaced, r"is not a folder"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISFITS)
def test_what_does_not_fit_is_named_set_aside_and_made_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    store, (damage, reason) = ArtifactStore(tmp_path), MISFITS[kind]
    folder = store.get_or_make("step", {"a": 1}, _value(7))
    before = names(folder)
    damage(folder)
    with caplog.at_level(logging.WARNING):
        assert store.get_or_make("step", {"a": 1}, _value(7)) == folder
    assert names(folder) == before and read_json(folder / "value.json") == 7
    (warning,) = caplog.messages
    (aside,) = (tmp_path / "set_aside" / "step").iterdir()
    assert re.search(reason, warning) and str(folder) in warning and f"moved to {aside}" in warning
    assert store.get_or_make("step", {"a": 1}, _value(0)) == folder, "and now it fits"
    assert read_json(folder / "value.json") == 7
