"""Ranks start from a plain script: no main guard, classes of its own, killed parents, clean ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

WITHOUT_A_MAIN_GUARD = """
import helper, torch, torch.distributed as dist
from shardwise.launch import init_process_group, run_ranks

class Model(torch.nn.Linear):
    pass

def job(context, model, unit):
    init_process_group(context, timeout_s=30)
    print(f"hello from rank {context.rank}")
    loss = model(torch.ones(1, 2)).sum() * (context.rank + 1)
    loss.backward()
    dist.all_reduce(model.weight.grad)
    return model, helper.double(model.weight.grad.sum().item()), unit

model = Model(2, 1)
model(torch.ones(1, 2)).sum().backward()  # the caller has run a backward
results = run_ranks(job, (model, helper.Unit("block")), world_size=2, timeout_s=60, num_threads=1)
for trained, grad, unit in results:
    assert type(trained) is Model, type(trained)
    assert grad == 12.0, grad  # 2 · (1 + 2) · 2 inputs
    assert unit == helper.Unit("block")
print("done")
"""
HELPER = """
from dataclasses import dataclass
@dataclass(frozen=True)
class Unit:
    name: str
def double(x):
    return 2 * x
"""
PARENT = """
import os, sys, time
from shardwise.launch import run_ranks
def job(context):
    context.post(os.getpid())
    time.sleep(60)
run_ranks(job, world_size=2, on_message=lambda rank, pid: print(pid, flush=True))
"""


def test_a_script_without_a_main_guard_runs_its_classes_on_ranks(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text(HELPER)
    (tmp_path / "script.py").write_text(WITHOUT_A_MAIN_GUARD)
    finished = subprocess.run(
        [sys.executable, tmp_path / "script.py"], capture_output=True, text=True, timeout=90, check=False
    )
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    assert sorted(lines) == ["done", "hello from rank 0", "hello from rank 1"], finished.stdout
    assert finished.stderr == ""


def test_ranks_end_when_the_process_that_started_them_is_killed(tmp_path: Path) -> None:
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdout is not None
    with parent.stdout:
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        parent.send_signal(signal.SIGKILL)
        parent.wait(10)
    limit = time.monotonic() + 15
    while any(Path(f"/proc/{pid}").exists() for pid in pids) or list(tmp_path.iterdir()):
        assert time.monotonic() < limit, "ranks or files outlived their parent by 15 s"
        time.sleep(0.05)
