"""The attack on files: some of its cases on every run of the suite, all of them in `make verify-all`."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pickle
import subprocess
from pathlib import Path

import pytest

from benchmarks.fuzz.run import attack, main
from benchmarks.fuzz.samples import plain_samples
from benchmarks.fuzz.watch import Forbidden, Watch

_PLAIN = ["run file", "cluster file", "layout", "schedule", "profile", "checkpoint alone"]


def test_changed_files_are_refused_or_read_as_what_they_say(tmp_path: Path) -> None:
    with contextlib.chdir(tmp_path):
        cases = list(itertools.islice(attack(tmp_path, _PLAIN, seed=3, samples=plain_samples), 15 * len(_PLAIN)))
    assert [case for case in cases if not case.fine] == []
    assert sum(case.outcome == "refused" for case in cases) > len(cases) // 2


class _Runs:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("true",)


def test_code_that_a_file_runs_is_seen_even_where_its_error_is_caught() -> None:
    watch = Watch(seconds=5.0, max_bytes=1 << 30)
    with pytest.raises(Forbidden, match=r"pickle.find_class"), watch.reading(), contextlib.suppress(BaseException):
        pickle.loads(pickle.dumps(_Runs()))
    with pytest.raises(Forbidden, match=r"subprocess.Popen"), watch.reading():
        subprocess.run(["true"], check=False)
    subprocess.run(["true"], check=True)  # not watched


@pytest.mark.slow
def test_a_hundred_of_all_targets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--count", "100", "--seed", "5"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (ended.value.code, told["bad"]) == (0, 0)
    assert told["refused"] == 100
