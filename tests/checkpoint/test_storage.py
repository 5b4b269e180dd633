"""A save appears whole or not at all, wherever it dies; pruning never takes the last good one."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shardwise.checkpoint.load import load_slices, verify_checkpoint
from shardwise.checkpoint.save import Shard, save_checkpoint, write_rank
from shardwise.checkpoint.slices import TensorSlice
from shardwise.checkpoint.source import open_checkpoint
from shardwise.checkpoint.storage import begin, commit, complete_steps, latest, prune
from shardwise.errors import CheckpointError


class Killed(BaseException):
    """The process is gone: no handler of ours may run anything after it that touches the disk."""


class DyingDisk:
    """Lets `survives` calls that change the disk happen, then kills this one and every later one."""

    CHANGES = ("replace", "rename", "fsync", "mkdir", "unlink", "rmdir")

    def __init__(self, patch: pytest.MonkeyPatch, *, survives: int) -> None:
        self.calls = 0
        self._survives = survives
        for name in self.CHANGES:
            patch.setattr(os, name, self._wrap(getattr(os, name)))

    def _wrap(self, change: Callable[..., object]) -> Callable[..., object]:
        def wrapped(*args: object, **options: object) -> object:
            self.calls += 1
            if self.calls > self._survives:
                raise Killed(change.__name__)
            return change(*args, **options)

        return wrapped


def save(root: Path, step: int, *, value: float | None = None) -> Path:
    """Two ranks save the halves of a tensor filled with `value` (default: the step)."""
    folder = begin(root, step)
    entries = []
    for rank in range(2):
        region = TensorSlice(offsets=(rank,), sizes=(1,))
        tensor = torch.full((1,), float(step if value is None else value))
        shard = Shard(name="w", kind="parameter", global_shape=(2,), region=region, tensor=tensor)
        entries.append(write_rank(folder, rank, [shard]))
    return commit(folder, entries, state={"value": value})


def loaded(root: Path) -> tuple[int, float]:
    """Step and value of the latest checkpoint, all of it checked."""
    source = open_checkpoint(root)
    verify_checkpoint(source.folder)
    first, second = load_slices(source, {"w": TensorSlice.whole((2,))})["w"].tolist()
    assert first == second
    return source.manifest.step, first


def die_everywhere(action: Callable[[Path], object], root_of: Callable[[int], Path]) -> list[Path]:
    """Run `action` on fresh roots, dying one step later each time, until it ends; the roots where it died."""
    died: list[Path] = []
    for survives in range(1000):
        root = root_of(survives)
        with pytest.MonkeyPatch.context() as patch:
            DyingDisk(patch, survives=survives)
            try:
                action(root)
            except Killed:
                died.append(root)
                continue
        return died
    raise AssertionError("the action never ends")


def test_a_saved_checkpoint_is_the_latest_and_leaves_nothing_else(tmp_path: Path) -> None:
    assert save(tmp_path, 9) == tmp_path / "step_9"
    assert save(tmp_path, 10) == latest(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_10", "step_9"]
    assert list(complete_steps(tmp_path)) == [9, 10]
    assert loaded(tmp_path) == (10, 10.0)


def test_a_save_that_dies_anywhere_leaves_the_former_one_or_is_whole(tmp_path: Path) -> None:
    def root_of(number: int) -> Path:
        save(tmp_path / f"run_{number}", 1)
        return tmp_path / f"run_{number}"

    died = die_everywhere(lambda root: save(root, 2), root_of)
    outcomes = [loaded(root) for root in died]
    assert set(outcomes) == {(1, 1.0), (2, 2.0)}  # before and after the folder's rename or the pointer's
    assert outcomes == sorted(outcomes)
    assert len(died) >= 9
    for root in died:  # the next save needs no cleaning up by hand
        save(root, 3)
        prune(root, keep=1)
        assert loaded(root) == (3, 3.0)
        assert sorted(path.name for path in root.iterdir()) == ["latest", "step_3"]


def test_a_first_save_that_dies_is_no_checkpoint(tmp_path: Path) -> None:
    died = die_everywhere(lambda root: save(root, 1), lambda number: tmp_path / f"run_{number}")
    with pytest.raises(CheckpointError, match=r"run_3 must hold a finished checkpoint, but has none \(1 unf"):
        latest(died[3])


def test_saving_a_step_again_that_dies_anywhere_leaves_one_of_the_two(tmp_path: Path) -> None:
    def root_of(number: int) -> Path:
        root = tmp_path / f"run_{number}"
        save(root, 1)
        save(root, 2, value=20)
        return root

    died = die_everywhere(lambda root: save(root, 2, value=21), root_of)
    outcomes = [loaded(root) for root in died]
    assert set(outcomes) == {(2, 20.0), (2, 21.0)}
    assert outcomes == sorted(outcomes)
    assert any(".old-" in path.name for root in died for path in root.iterdir())
    for root in died:
        save(root, 3)
        prune(root, keep=2)
        assert list(complete_steps(root)) == [2, 3]
        assert len(list(root.iterdir())) == 3


def test_pruning_that_dies_anywhere_leaves_only_whole_checkpoints(tmp_path: Path) -> None:
    def root_of(number: int) -> Path:
        root = tmp_path / f"run_{number}"
        for step in range(4):
            save(root, step)
        return root

    for root in die_everywhere(lambda root: prune(root, keep=1), root_of):
        assert loaded(root) == (3, 3.0)
        for folder in complete_steps(root).values():
            verify_checkpoint(folder)
        prune(root, keep=1)
        assert sorted(path.name for path in root.iterdir()) == ["latest", "step_3"]


def test_pruning_keeps_the_highest_steps_and_the_latest(tmp_path: Path) -> None:
    for step in (30, 40, 50, 20):  # 20: resumed from an early step
        save(tmp_path, step)
    begin(tmp_path, 60)  # a save that is being written
    begin(tmp_path, 10)  # one that died long ago
    (tmp_path / "step_7").mkdir()  # not ours: it has no manifest
    gone = prune(tmp_path, keep=2)
    assert [path.name.split(".")[0] for path in gone] == ["step_30", "step_10"]
    assert list(complete_steps(tmp_path)) == [20, 40, 50]
    assert latest(tmp_path).name == "step_20"
    assert (tmp_path / "step_7").is_dir()
    prune(tmp_path, keep=1)
    assert list(complete_steps(tmp_path)) == [20, 50]
    with pytest.raises(CheckpointError, match="at least one"):
        prune(tmp_path, keep=0)
    assert prune(tmp_path / "nowhere", keep=1) == ()


@pytest.mark.parametrize("pointer", [b"", b"step_77\n", b"../step_1\n", b"\xff\xff", None])
def test_without_a_good_pointer_the_highest_step_is_the_latest(tmp_path: Path, pointer: bytes | None) -> None:
    save(tmp_path, 2)
    save(tmp_path, 1)
    assert latest(tmp_path).name == "step_1"
    (tmp_path / "latest").unlink()
    if pointer is not None:
        (tmp_path / "latest").write_bytes(pointer)
    assert latest(tmp_path).name == "step_2"


def test_a_commit_without_every_piece_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1)
    folder = begin(tmp_path, 2)
    region = TensorSlice(offsets=(0,), sizes=(1,))
    half = Shard(name="w", kind="parameter", global_shape=(2,), region=region, tensor=torch.zeros(1))
    entries = write_rank(folder, 0, [half])
    with pytest.raises(CheckpointError, match=r"\[1:2\] of w with shape \(2,\) is in none of its 1 slices"):
        commit(folder, [entries], state={})
    whole = write_rank(folder, 1, [Shard.whole("w", torch.zeros(2))])
    (folder / "rank_1.safetensors").unlink()
    with pytest.raises(CheckpointError, match="rank_1.safetensors is missing; wait until write_rank"):
        commit(folder, [whole], state={})
    with pytest.raises(CheckpointError, match="call begin first"):
        commit(tmp_path / "step_1", [entries], state={})
    with pytest.raises(CheckpointError, match="0 or more, got -1"):
        begin(tmp_path, -1)
    assert loaded(tmp_path) == (1, 1.0)


def test_a_disk_that_refuses_is_told_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CheckpointError, match=r"could not make .*file/step_1.*Not a directory"):
        begin(tmp_path / "file", 1)
    folder = save_checkpoint(tmp_path / "run", 1, [Shard.whole("w", torch.zeros(2))], state={})
    (folder / "rank_0.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"could not read .*rank_0.safetensors: No such file"):
        load_slices(folder, {"w": TensorSlice.whole((2,))})


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's table of open files")
def test_bytes_are_safe_before_names_and_names_before_the_pointer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: list[str] = []
    fsync, replace = os.fsync, os.replace

    def name_of(path: object) -> str:
        return Path(str(path)).name.split(".tmp-")[0]

    def logged_fsync(descriptor: int) -> None:
        log.append(f"sync {name_of(os.readlink(f'/proc/self/fd/{descriptor}'))}")
        fsync(descriptor)

    def logged_replace(source: Path, target: Path) -> None:
        log.append(f"rename to {name_of(target)}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    save(tmp_path / "run", 1)
    assert log == [
        "sync rank_0.safetensors",
        "sync step_1",
        "sync rank_1.safetensors",
        "sync step_1",
        "sync manifest.json",
        "sync step_1",
        "rename to step_1",
        "sync run",
        "sync latest",
        "rename to latest",
        "sync run",
    ]
