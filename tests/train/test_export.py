"""A trained run becomes a folder that transformers reads: the same logits, the same tokens; of a live program too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import tqdm
import transformers as hf
from torch import nn

from shardwise.checkpoint.source import open_checkpoint, open_safetensors
from shardwise.cli import run_command
from shardwise.errors import CheckpointError
from shardwise.execute.assemble import assemble
from shardwise.launch import RankContext
from shardwise.layout import Layout
from shardwise.tasks.tokenizer import load_tokenizer
from shardwise.testing import on_ranks
from shardwise.train.export import export
from shardwise.train.model import values_of
from shardwise.train.run import prepare, train_on_rank
from shardwise.train.run_file import run_from

TEXTS = ("def loss(outputs):\n    return outputs.mean()\n", "Zürich, naïve café — 日本 🙂", "", "  spaces\tand\ttabs  ")


@pytest.fixture(autouse=True)
def no_thread_of_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)


def alone() -> RankContext:
    return RankContext(rank=0, world_size=1, local_rank=0, rendezvous="file:///unused")


def trained(folder: Path, **model: Any) -> None:
    """Two steps of a small model on text, with a checkpoint of each."""
    text = folder / "text.py"
    text.write_text("\n".join(f"x{n} = {n * n}  # square of {n}" for n in range(400)), encoding="utf-8")
    config = {"model_type": "llama", "vocab_size": 300, "hidden_size": 16, "intermediate_size": 24,
              "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1} | model  # fmt: skip
    run = {
        "folder": str(folder / "run"),
        "model": {"config": config},
        "task": {"sources": [str(text)], "vocabulary_size": 300, "sequence_length": 16},
        "training": {"steps": 2, "global_batch": 4, "learning_rate": 1e-2},
        "checkpoint": {"every": 1, "keep": 2},
    }
    train_on_rank(alone(), prepare(run_from(run)))


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def of_checkpoint(folder: Path, model: nn.Module) -> nn.Module:
    """The model with the values of a checkpoint."""
    values = values_of(open_checkpoint(folder), model)
    for name, parameter in model.named_parameters():
        parameter.data.copy_(values([name])[name])
    return model


def test_an_exported_run_has_the_same_logits_and_tokens_in_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(tmp_path)
    assert run_command(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--max-file", "20kB"]) == 0
    assert "model.safetensors.index.json" in capsys.readouterr().out
    loaded, told = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    wanted = of_checkpoint(tmp_path / "run" / "checkpoints", hf.LlamaForCausalLM(loaded.config))
    assert torch.equal(logits(loaded), logits(wanted))
    assert loaded.config.use_cache
    tokenizer = hf.AutoTokenizer.from_pretrained(tmp_path / "out")
    (ours,) = (tmp_path / "run" / "data").glob("tokens-*")
    live = load_tokenizer(ours)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == live.live.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token_id == loaded.config.eos_token_id == live.end_of_text
    made = loaded.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False)
    assert made.shape[1] <= 6


def test_a_step_and_a_dtype_can_be_chosen_and_a_wrong_step_is_an_error(tmp_path: Path) -> None:
    trained(tmp_path)
    export(tmp_path / "run", tmp_path / "first", step=1, dtype="bfloat16")
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert loaded.dtype == torch.bfloat16
    wanted = of_checkpoint(tmp_path / "run" / "checkpoints" / "step_1", hf.LlamaForCausalLM(loaded.config))
    assert torch.equal(loaded.model.norm.weight, wanted.model.norm.weight.to(torch.bfloat16))
    with pytest.raises(CheckpointError, match="has checkpoints of steps 1, 2, but step 3"):
        export(tmp_path / "run", tmp_path / "third", step=3)


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16))


def mixtral() -> nn.Module:
    config = hf.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return hf.MixtralForCausalLM(config)


def t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def bert() -> nn.Module:
    config = hf.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    return hf.BertForMaskedLM(config)


@on_ranks(2, timeout_s=100.0)
@pytest.mark.parametrize("make, layout", [(gpt2, "pp=2"), (mixtral, "ep=2"), (t5, "tp=2"), (bert, "fsdp=2")])
def test_a_live_program_is_exported_as_transformers_itself_would_save_it(
    rank: RankContext, tmp_path: Path, make: Callable[[], nn.Module], layout: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tqdm.tqdm, "monitor_interval", 0)
        check_export(rank, tmp_path, make(), layout)


def check_export(rank: RankContext, folder: Path, model: nn.Module, layout: str) -> None:
    wanted = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    if rank.rank == 0:
        model.save_pretrained(folder / "theirs")
    ids = torch.arange(16).view(2, 8)
    program = assemble(model, {"input_ids": ids, "labels": ids}, layout=Layout.parse(layout), rank=rank.rank)
    files = export(program, folder / "ours")
    assert bool(files) is (rank.rank == 0)
    program.close()
    if rank.rank:
        return
    theirs, ours = (open_safetensors(folder / each).manifest.tensors for each in ("theirs", "ours"))
    assert {name: entry.global_shape for name, entry in ours.items()} == {
        name: entry.global_shape for name, entry in theirs.items()
    }
    loaded = type(model).from_pretrained(folder / "ours")
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.state_dict().items())
    kept = {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in (folder / "ours").iterdir()} <= kept


class Own(nn.Module):
    """A model that transformers does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 8), nn.Linear(8, 64)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(input_ids))


def test_a_model_of_ones_own_becomes_its_safetensors_alone(tmp_path: Path) -> None:
    run = {
        "folder": str(tmp_path / "run"),
        "task": {"kind": "random_tokens", "num_train": 8, "num_held_out": 0},
        "training": {"steps": 1, "global_batch": 4},
        "checkpoint": {"every": 1},
    }
    train_on_rank(alone(), prepare(run_from(run), model=Own))
    (file,) = export(tmp_path / "run", tmp_path / "out")
    assert file.name == "model.safetensors"
    assert open_safetensors(tmp_path / "out").manifest.tensors.keys() == Own().state_dict().keys()
