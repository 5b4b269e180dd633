"""`shardwise generate` on a folder of transformers and on a run: what it prints, and what it says is wrong."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from generated_texts import BART_FORCES, bart, settled
from shardwise.cli import run_command
from shardwise.generate import generate
from shardwise.tasks.tokenizer import train_tokenizer
from shardwise.train.model_folder import write_tokenizer
from under_mpi import mpirun, needs_mpi

PROMPTS = ["the quick brown", "lazy"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, as transformers saves it."""
    made = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(
        ["the quick brown fox jumps over the lazy dog. " * 20], vocabulary_size=300, cache=made / "cache"
    )
    torch.manual_seed(0)
    model: Any = tf.LlamaForCausalLM(
        tf.LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=tokenizer.vocabulary_size,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(made / "saved")
    (made / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    write_tokenizer(made / "saved", made / "tokenizer.json", trained_here=True)
    return made / "saved"


def wanted(folder: Path, tokens: int) -> list[list[int]]:
    """What transformers generates behind each prompt by itself."""
    tokenizer, model = tf.AutoTokenizer.from_pretrained(folder), tf.AutoModelForCausalLM.from_pretrained(folder)
    rows = []
    for prompt in PROMPTS:
        given = tokenizer(prompt, return_tensors="pt")["input_ids"]
        out = model.generate(given, max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0)
        rows.append(out[0, given.shape[1] :].tolist())
    return rows


def test_json_says_texts_tokens_and_figures(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["generate", str(folder), *PROMPTS, "--tokens", "6", "--no-stop", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["tokens"] == wanted(folder, 6)
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    assert told["texts"] == [tokenizer.decode(row, skip_special_tokens=True) for row in told["tokens"]]
    assert told["generated_tokens"] == 12
    assert told["first_token_s"] > 0
    assert told["decode_tokens_per_s"] > 0
    # two layers of keys and values, 32 wide, of the longest prompt and all tokens but the last, in both rows
    longest = max(len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS)
    assert told["cache_bytes"] == [2 * 2 * 32 * 4 * 2 * (longest + 5)]


def test_text_is_shown_behind_its_prompt_and_figures_beside_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    options = ["--file", str(tmp_path / "prompts.txt"), "--tokens", "6", "--no-stop"]
    assert run_command(["generate", str(folder), *options]) == 0
    shown = capsys.readouterr()
    texts = generate(folder, PROMPTS, max_new_tokens=6, stop=()).texts
    assert shown.out == "".join(f"── {prompt}\n{text}\n" for prompt, text in zip(PROMPTS, texts, strict=True))
    assert "12 tokens behind" in shown.err
    assert "tokens/s" in shown.err


def test_one_prompt_comes_from_stdin_and_is_shown_alone(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPTS[0] + "\n"))
    assert run_command(["generate", str(folder), "--tokens", "4", "--no-stop"]) == 0
    assert capsys.readouterr().out == generate(folder, PROMPTS[:1], max_new_tokens=4, stop=()).texts[0] + "\n"


def test_token_numbers_go_in_and_come_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["generate", str(folder), "5 6 7", "--token-numbers", "--tokens", "3", "--no-stop"]) == 0
    made = generate(folder, [[5, 6, 7]], max_new_tokens=3, stop=())
    assert [int(word) for word in capsys.readouterr().out.split()] == list(made.tokens[0])


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["tp=2", "pp=2"])
def test_processes_of_a_layout_say_the_same(folder: Path, layout: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tokens", "6", "--no-stop", "--temperature", "0.9", "--seed", "4"]
    alone = generate(folder, PROMPTS, max_new_tokens=6, stop=(), temperature=0.9, seed=4)
    assert run_command(["generate", str(folder), *PROMPTS, "--layout", layout, *options]) == 0
    shown = "".join(f"── {prompt}\n{text}\n" for prompt, text in zip(PROMPTS, alone.texts, strict=True))
    assert capsys.readouterr().out == shown


def test_the_generation_config_of_an_encoder_decoder_is_followed() -> None:
    model = settled(bart)
    rows = [[5, 9, 11, 7], [8, 4]]
    expected = []
    for row in rows:
        out = model.generate(torch.tensor([row]), max_new_tokens=5, do_sample=False, eos_token_id=None)
        expected.append(tuple(out[0, 1:].tolist()))
    assert {row[0] for row in expected} == {BART_FORCES.first}
    assert {row[-1] for row in expected} == {BART_FORCES.last}
    assert generate(model, rows, max_new_tokens=5, stop=()).tokens == tuple(expected)


def shown_alone(folder: Path, **options: Any) -> str:
    """What one process shows."""
    alone = generate(folder, PROMPTS, max_new_tokens=6, stop=(), **options)
    return "".join(f"── {prompt}\n{text}\n" for prompt, text in zip(PROMPTS, alone.texts, strict=True))


@needs_mpi
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", ["gloo", "mpi"])
@pytest.mark.parametrize("layout", ["tp=2", "pp=2", "dp=2"])
def test_ranks_of_mpirun_say_the_same_and_one_reads_and_shows(folder: Path, layout: str, backend: str) -> None:
    options = ["--tokens", "6", "--no-stop", "--layout", layout, "--backend", backend]
    finished = mpirun(
        2, ["-m", "shardwise", "generate", folder, *options], timeout_s=250, stdin="\n".join(PROMPTS) + "\n"
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == shown_alone(folder)
    assert finished.stderr.count("12 tokens behind") == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_ranks_of_torchrun_say_the_same_and_one_reads_and_shows(folder: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    options = ["--tokens", "6", "--no-stop", "--layout", "pp=2", "--temperature", "0.9", "--seed", "4"]
    finished = subprocess.run(
        [*torchrun, "shardwise", "generate", str(folder), *options],
        input="\n".join(PROMPTS) + "\n", capture_output=True, text=True, timeout=250, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout == shown_alone(folder, temperature=0.9, seed=4)


@needs_mpi
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_is_wrong_among_ranks_of_mpirun_is_said_once(folder: Path) -> None:
    finished = mpirun(2, ["-m", "shardwise", "generate", folder, "lazy", "--layout", "pp=4"], timeout_s=250)
    assert finished.returncode != 0
    assert " ".join(finished.stderr.split()).count("pp=4 has 4 and there are 2; start 4, or set layout") == 1


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_example_finds_every_layout_equal(folder: Path) -> None:
    command = [sys.executable, "examples/generate/compare.py", str(folder), "--tokens", "12"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert finished.returncode == 0, finished.stderr
    told = json.loads(finished.stdout.strip().splitlines()[-1])
    assert (told["equal"], told["tokens"], told["differs"]) == (True, 3 * 12, {})
    assert all(told[layout] > 0 for layout in ("one device", "tp=2", "pp=2"))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere", "x"], "nowhere is none of them"),
        (["{}", "x", "--layout", "fsdp=2"], "text is generated under layouts of dp, tp and pp"),
        (["{}", "x", "--device", "tpu"], "a device is cpu or cuda"),
        (["{}", "x", "--dtype", "floaty"], "dtype is one of torch"),
        (["{}", "x", "--backend", "smoke"], "a backend is auto, gloo, nccl or mpi, got 'smoke'"),
        (["{}", "x", "--layout", "pp=2", "--backend", "mpi"], "use `mpirun -np 2 shardwise generate CHECKPOINT`"),
        (["{}", "1 two", "--token-numbers"], "a prompt is numbers with blanks between"),
        (["{}", "x", "--temperature", "-1"], "a temperature is 0"),
        (["{}", "--file", "none.txt"], "a file of prompts, one a line, is a file that can be read"),
    ],
)
def test_what_is_wrong_is_said(
    folder: Path, arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(["generate", *(argument.format(folder) for argument in arguments)]) == 1
    assert told in " ".join(capsys.readouterr().err.split())
