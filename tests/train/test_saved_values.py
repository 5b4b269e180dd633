"""Values out of a transformers folder: whatever its files call them, whole or a slice, of which only its bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import tqdm
import transformers as hf
from torch import nn

from shardwise.checkpoint import tensor_file
from shardwise.checkpoint.source import open_safetensors
from shardwise.describe.tensor import Slice
from shardwise.errors import CheckpointError
from shardwise.parallel.tensor.slices import cut
from shardwise.trace.placing import named_tensors
from shardwise.train.saved_values import SavedValues

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def bert() -> nn.Module:
    return hf.BertForMaskedLM(hf.BertConfig(**SIZES, intermediate_size=48))


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=16))


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2))


def mixtral() -> nn.Module:
    config = hf.MixtralConfig(
        **SIZES, intermediate_size=48, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2
    )
    return hf.MixtralForCausalLM(config)


def t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    )


MODELS: tuple[Callable[[], nn.Module], ...] = (bert, gpt2, llama, mixtral, t5)


@pytest.fixture(autouse=True)
def no_thread_of_a_progress_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"])
def test_every_tensor_of_a_model_that_transformers_saved_is_found(
    make: Callable[[], nn.Module], max_shard_size: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() is (max_shard_size == "20KB")
    torch.manual_seed(1)
    other = make()
    values = SavedValues(open_safetensors(tmp_path), other)
    for name, parameter in model.named_parameters():
        assert torch.equal(values([name])[name], parameter), name


def test_a_head_takes_the_values_of_its_base_model_and_a_base_model_those_of_one_with_a_head(tmp_path: Path) -> None:
    whole = bert()
    whole.bert.save_pretrained(tmp_path / "base")
    whole.save_pretrained(tmp_path / "whole")
    name = "embeddings.word_embeddings.weight"
    wanted = whole.get_parameter(f"bert.{name}")
    of_base = SavedValues(open_safetensors(tmp_path / "base"), bert())
    of_whole = SavedValues(open_safetensors(tmp_path / "whole"), bert().bert)
    assert torch.equal(of_base.read(f"bert.{name}", ()), wanted)
    assert torch.equal(of_whole.read(name, ()), wanted)


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many bytes of tensors were read from files, one number a read."""
    counted: list[int] = []
    read = tensor_file.read_exactly

    def counting(file: object, start: int, view: memoryview) -> None:
        counted.append(len(view))
        read(file, start, view)

    monkeypatch.setattr(tensor_file, "read_exactly", counting)
    return counted


def test_of_a_divided_matrix_only_the_rows_of_a_rank_are_read(tmp_path: Path, read_bytes: list[int]) -> None:
    config = hf.LlamaConfig(**SIZES | {"hidden_size": 256}, intermediate_size=512)
    model = hf.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    values = SavedValues(open_safetensors(tmp_path), model)
    name = "model.layers.0.mlp.up_proj.weight"
    part = Slice.even(0, 512, 4)
    assert torch.equal(values.read(name, [(part, 1)]), cut(model.get_parameter(name), part, 1))
    assert sum(read_bytes) == model.get_parameter(name).numel()  # a quarter, of four bytes each


def test_of_divided_experts_only_those_of_a_rank_are_read_and_of_them_a_shard_is_cut(
    tmp_path: Path, read_bytes: list[int]
) -> None:
    model = mixtral()
    model.save_pretrained(tmp_path)
    values = SavedValues(open_safetensors(tmp_path), model)
    name = "model.layers.1.mlp.experts.gate_up_proj"
    whole = model.get_parameter(name)  # (experts, 2 * inner, width)
    experts, shards = Slice.even(0, 4, 2), Slice.even(1, 96, 2, (48, 48))
    assert torch.equal(values.read(name, [(experts, 1)]), whole[2:])
    assert sum(read_bytes) == whole.numel() * 4 // 2
    assert torch.equal(values.read(name, [(experts, 0), (shards, 1)]), cut(whole[:2], shards, 1))


def test_a_rank_with_both_slices_of_a_plain_tensor_gets_its_part(tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path)
    name = "model.layers.0.self_attn.q_proj.weight"
    values, whole = SavedValues(open_safetensors(tmp_path), model), model.get_parameter(name)
    rows, columns, again = Slice.even(0, 32, 2), Slice.even(1, 32, 4), Slice.even(0, 16, 2)
    assert torch.equal(values.read(name, [(rows, 1), (columns, 2)]), whole[16:, 16:24])
    assert torch.equal(values.read(name, [(rows, 1), (again, 0)]), whole[16:24])  # the same dim twice


def test_other_sizes_and_missing_tensors_are_errors(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path / "experts")
    llama().save_pretrained(tmp_path / "dense")
    config = mixtral().config
    config.num_local_experts = 8
    eight = hf.MixtralForCausalLM(config)
    with pytest.raises(CheckpointError, match="give shape .* but the model has"):
        SavedValues(open_safetensors(tmp_path / "experts"), eight)(["model.layers.0.mlp.experts.gate_up_proj"])
    with pytest.raises(CheckpointError, match="no model.layers.0.mlp.experts.gate_up_proj"):
        SavedValues(open_safetensors(tmp_path / "dense"), eight)(["model.layers.0.mlp.experts.gate_up_proj"])


def test_a_model_of_ones_own_is_read_by_its_names(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    save_file(dict(model.state_dict()), tmp_path / "model.safetensors")
    values = SavedValues(open_safetensors(tmp_path), model)
    assert all(torch.equal(values([name])[name], tensor) for name, tensor in named_tensors(model).items())
