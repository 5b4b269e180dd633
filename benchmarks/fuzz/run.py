"""`python -m benchmarks.fuzz [--count 1000] [--seed 0] [--only WORD ...]`: one line a target, then one JSON line.

Every case takes a sound file, changes it, and reads it as a user's command would. What may come of it: `refused` (an
error of shardwise's own that says rule and repair), `same` (read as what was written), `other` (a forged or legally
changed file, read as what it says). What may not: any other error, an end that does not come, memory without bound,
code that runs, damage that checksums should have found, a checkpoint beside it that changed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fuzz.damage import DAMAGES, MARK
from benchmarks.fuzz.samples import make_samples
from benchmarks.fuzz.targets import TARGETS, Target
from benchmarks.fuzz.watch import Forbidden, TimedOut, Watch
from shardwise.errors import ShardwiseError

__all__ = ["Case", "attack", "main"]

_SECONDS, _BYTES = 20.0, 4 << 30  # beyond which a reader hangs, or eats memory (address space)
_FINE = ("refused", "same", "other")
_WORDY = 4000  # characters beyond which a message is none


@dataclass(frozen=True, kw_only=True)
class Case:
    """What one changed file came to."""

    target: str
    file: str
    change: str
    outcome: str
    message: str = ""

    @property
    def fine(self) -> bool:
        return self.outcome in _FINE


def main(arguments: list[str] | None = None) -> None:
    """Run the cases; exit status 1 where one is not fine."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="cases that are refused, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="targets whose names have a word")
    parser.add_argument("--show", action="store_true", help="every case with its message")
    options = parser.parse_args(arguments)
    names = [name for name in TARGETS if not options.only or any(word in name for word in options.only)]
    cases: list[Case] = []
    with tempfile.TemporaryDirectory() as made, contextlib.chdir(made):
        for case in attack(Path(made), names, seed=options.seed):
            cases.append(case)
            if options.show or not case.fine:
                print(f"{case.outcome:10s} {case.target}: {case.file}: {case.change}: {case.message}", flush=True)
            if sum(each.outcome == "refused" for each in cases) >= options.count:
                break
    for name in names:
        print(f"{name:28s}", dict(sorted(Counter(case.outcome for case in cases if case.target == name).items())))
    counts = Counter(case.outcome for case in cases)
    bad = sum(not case.fine for case in cases)
    print(json.dumps({"cases": len(cases), **dict(sorted(counts.items())), "bad": bad, "seed": options.seed}))
    sys.exit(1 if bad else 0)


def attack(
    folder: Path, names: list[str], *, seed: int, samples: Callable[[Path], Mapping[str, Path]] = make_samples
) -> Iterator[Case]:
    """Cases without end, target after target, each of its own generator; files are made under `folder`.

    The current folder is where code that a file smuggles in would leave its mark.
    """
    made = samples(folder / "samples")
    watch = Watch(seconds=_SECONDS, max_bytes=_BYTES)
    sound = {name: TARGETS[name].read(made[TARGETS[name].sample]) for name in names}
    number = 0
    while True:
        for name in names:
            chance = random.Random(f"{seed} {number} {name}")
            yield _case(name, TARGETS[name], made, folder / "attacked", chance, watch, sound[name])
        number += 1


def _case(
    name: str,
    target: Target,
    samples: Mapping[str, Path],
    place: Path,
    chance: random.Random,
    watch: Watch,
    sound: object,
) -> Case:
    sample = samples[target.sample]
    copied = place / sample.name
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    shutil.copytree(sample, copied, symlinks=True) if sample.is_dir() else shutil.copyfile(sample, copied)
    files = [file for pattern in target.files for file in (sorted(copied.glob(pattern)) if pattern else [copied])]
    file = chance.choice(files)
    change = chance.choice([*target.forgeries, *(DAMAGES[each] for each in target.damages)])
    told = change(file, chance)
    before = _digest(copied, without=file)
    outcome, message = _outcome(target, copied, watch, sound, forged=change in target.forgeries)
    if _digest(copied, without=file) != before:
        outcome = "changed"
    if (Path.cwd() / MARK).exists() or (place / MARK).exists():
        outcome = "executed"
        (Path.cwd() / MARK).unlink(missing_ok=True)
    where = str(file.relative_to(place))
    return Case(target=name, file=where, change=told, outcome=outcome, message=message)


def _outcome(target: Target, path: Path, watch: Watch, sound: object, *, forged: bool) -> tuple[str, str]:
    try:
        with watch.reading():
            read = target.read(path)
    except ShardwiseError as error:
        message = str(error)
        clear = ";" in message and len(message) < _WORDY and "Traceback" not in message
        return "refused" if clear else "unclear", message
    except Forbidden as error:
        return "executed", str(error)
    except TimedOut:
        return "hung", _place(sys.exc_info()[1])
    except (MemoryError, RuntimeError) as error:
        greedy = isinstance(error, MemoryError) or "memory" in str(error)
        return "memory" if greedy else "crashed", f"{type(error).__name__}: {error} {_place(error)}"
    except Exception as error:
        return "crashed", f"{type(error).__name__}: {error} {_place(error)}"
    if _same(read, sound):
        return "same", ""
    return ("silent", "damaged, and read as something else") if target.exact and not forged else ("other", "")


def _place(error: BaseException | None) -> str:
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__ if error else None) if "shardwise" in frame.filename
    ]
    return f"({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""


def _same(read: object, sound: object) -> bool:
    return bool(read == sound) or repr(read) == repr(sound)


def _digest(path: Path, *, without: Path) -> str:
    """Of all files of a folder but the attacked one: the checkpoints beside it are intact."""
    found = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else []:
        if file != without and file.is_file() and not os.path.islink(file):
            found.update(str(file).encode() + file.read_bytes())
    return found.hexdigest()
