"""The GPU benchmark takes its whole path at tiny sizes, and says plainly where there is no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.contenders import CONTENDERS
from benchmarks.gpu.run import figures, main
from benchmarks.gpu.shapes import SHAPES, peak_flops


def test_flops_are_six_a_parameter_and_attention() -> None:
    shape = SHAPES["1b"]
    # 16 blocks of 60.8 M, and a head of 262.7 M: Llama 3.2 1B has 1.236 B parameters, norms of 67.6 k among them
    assert shape.num_multiplied + 67_584 == 1_235_814_400
    assert shape.flops_a_token == 6 * shape.num_multiplied + 12 * 16 * 2048 * 4096
    assert SHAPES["3b"].num_multiplied == pytest.approx(3.21e9, rel=1e-2)


def test_a_device_is_known_by_its_name() -> None:
    assert peak_flops("NVIDIA H200") == 989e12
    assert peak_flops("NVIDIA H100 PCIe") == 756e12
    assert peak_flops("Some Other Card") is None


def test_figures_are_of_the_median_step_behind_the_warm_up() -> None:
    def run(seconds: list[float]) -> dict[str, object]:
        return {"seconds": seconds, "losses": [3.0, 2.0], "peak_bytes": 7}

    found = {"warm_up": 1, "runs": {"ours": [run([9.0, 1.0, 2.0, 3.0])], "plain": [run([9.0, 4.0, 4.0, 4.0])]}}
    told = figures("1b", found, "NVIDIA H200")
    assert told["ours"]["tokens_per_s"] == SHAPES["1b"].tokens / 2.0
    assert told["ours"]["mfu"] == pytest.approx(SHAPES["1b"].tokens / 2.0 * SHAPES["1b"].flops_a_token / 989e12)
    assert told["ours_vs_best"] == 2.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which would be measured")
def test_without_a_gpu_it_says_so_and_ends_well(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--output", str(tmp_path / "out.json")])
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"gpu": None}
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["gpu"] is None
    assert "no GPU" in written["note"]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch, as it compiles
def test_ours_and_the_plain_loop_train_the_same_model_on_the_same_tokens() -> None:
    ours, plain = (CONTENDERS[name](SHAPES["tiny"], torch.device("cpu"), "eager", 3) for name in ("ours", "plain"))
    assert ours["losses"] == pytest.approx(plain["losses"], rel=1e-3)
    assert len(ours["seconds"]) == 3
    assert "units compiled by eager" in ours["notes"][0]
