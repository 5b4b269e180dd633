"""Checkpoint folders: a save appears whole under its name or not at all, and old ones are pruned.

Knows folders and the order of steps. Refuses to know tensors and process groups: with several ranks on a
shared folder, the caller stands a barrier where the picture says so.

    rank 0       folder = begin(root, 20)                  makes root/step_20.tmp-5f3a; all ranks are told
    every rank   entries = write_rank(folder, rank, ...)   writes rank_0.safetensors, ...
    --------     gather the entries on rank 0              (the barrier)
    rank 0       commit(folder, all_entries, state=...)    writes manifest.json, renames folder to step_20,
                                                           and lets root/latest name it
    rank 0       prune(root, keep=3)
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from shardwise.checkpoint.disk import disk_errors, replace_file, sync_folder, temporary_name, write_synced
from shardwise.checkpoint.manifest import Manifest, TensorEntry, merge_entries
from shardwise.errors import CheckpointError

__all__ = ["MANIFEST", "begin", "commit", "complete_steps", "latest", "prune"]

MANIFEST = "manifest.json"
_LATEST = "latest"
_TEMPORARY = re.compile(r"step_(\d+)\.tmp-[0-9a-f]+")
# While a step is saved once more, its former folder stands aside; should the save die there, it still counts.
_COMPLETE = re.compile(r"step_(\d+)(\.old-[0-9a-f]+)?")


def begin(root: Path | str, step: int) -> Path:
    """Make the temporary folder of a save under `root` (made if missing); one rank calls this."""
    if step < 0:
        raise CheckpointError(f"a step is 0 or more, got {step}; count optimizer steps from 0")
    folder = Path(root) / temporary_name(f"step_{step}")
    with disk_errors("make", folder):
        folder.mkdir(parents=True)
    return folder


def commit(folder: Path, entries_of_ranks: Iterable[Mapping[str, TensorEntry]], *, state: Mapping[str, object]) -> Path:
    """Finish a save: one rank gives what every rank's `write_rank` has returned, in rank order.

    Returns the final folder. Raises CheckpointError, and leaves what was saved before as it is, when the
    pieces do not cover every tensor, a rank's file is missing, or the disk refuses.
    """
    found = _TEMPORARY.fullmatch(folder.name)
    if found is None:
        raise CheckpointError(f"commit takes the folder that begin made, got {folder}; call begin first")
    manifest = Manifest(step=int(found[1]), tensors=merge_entries(entries_of_ranks), state=state)
    for file in sorted({piece.file for entry in manifest.tensors.values() for piece in entry.pieces}):
        if not (folder / file).is_file():
            raise CheckpointError(
                f"every piece must be on disk before the commit, but {folder / file} is missing; wait until "
                "write_rank has returned on every rank, on a folder that all ranks share"
            )
    final = folder.with_name(f"step_{manifest.step}")
    with disk_errors("finish", final):
        write_synced(folder / MANIFEST, manifest.to_bytes())
        sync_folder(folder)
        if final.exists():
            os.replace(final, final.with_name(f"{final.name}.old-{secrets.token_hex(4)}"))
        os.replace(folder, final)
        sync_folder(final.parent)
    replace_file(final.parent / _LATEST, f"{final.name}\n".encode())
    return final


def complete_steps(root: Path | str) -> dict[int, Path]:
    """Step -> folder of every finished checkpoint under `root`, lowest step first."""
    steps: dict[int, Path] = {}
    for path, found in _matching(Path(root), _COMPLETE):
        step = int(found[1])
        if _is_complete(path) and (step not in steps or found[2] is None):
            steps[step] = path
    return dict(sorted(steps.items()))


def latest(root: Path | str) -> Path:
    """The folder of the checkpoint that was finished last; of the highest step where `latest` names none.

    Raises CheckpointError when there is no finished checkpoint under `root`.
    """
    root = Path(root)
    steps = complete_steps(root)
    if not steps:
        unfinished = len(_matching(root, _TEMPORARY))
        raise CheckpointError(
            f"{root} must hold a finished checkpoint, but has none ({unfinished} unfinished); give the "
            "folder of a run that has saved, or start without resuming"
        )
    try:
        named = (root / _LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        named = ""
    found = _COMPLETE.fullmatch(named)
    return steps[int(found[1]) if found and int(found[1]) in steps else max(steps)]


def prune(root: Path | str, *, keep: int) -> tuple[Path, ...]:
    """Delete all but the `keep` highest steps and the latest one; returns the deleted folders.

    Leftovers go too: unfinished saves up to the latest step, and former folders of a step saved again.
    """
    if keep < 1:
        raise CheckpointError(f"at least one checkpoint is kept, got keep={keep}; use 1 or more")
    root = Path(root)
    steps = complete_steps(root)
    if not steps:
        return ()
    newest = latest(root)
    kept = {newest, *list(steps.values())[-keep:]}
    newest_step = next(step for step, path in steps.items() if path == newest)
    doomed = [path for path, _ in _matching(root, _COMPLETE) if path not in kept and _is_complete(path)]
    # A save that is still being written is of a later step than the latest finished one.
    doomed += [path for path, found in _matching(root, _TEMPORARY) if int(found[1]) <= newest_step]
    for path in doomed:
        _delete(path)
    with disk_errors("clean", root):
        for path in root.glob(f"{_LATEST}.tmp-*"):  # of a pointer that was being replaced
            path.unlink()
    return tuple(doomed)


def _is_complete(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def _delete(folder: Path) -> None:
    """Take the folder out of the list first, then delete: a crash in between leaves no half a checkpoint."""
    with disk_errors("delete", folder):
        aside = folder
        if _TEMPORARY.fullmatch(folder.name) is None:
            aside = folder.with_name(temporary_name(folder.name.split(".")[0]))
            os.replace(folder, aside)
        shutil.rmtree(aside)


def _matching(root: Path, pattern: re.Pattern[str]) -> list[tuple[Path, re.Match[str]]]:
    if not root.is_dir():
        return []
    with disk_errors("list", root):
        found = [(path, pattern.fullmatch(path.name)) for path in sorted(root.iterdir())]
    return [(path, match) for path, match in found if match is not None]
