"""Plans found without being told anything of the model, and proven."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn
import transformers as hf

from parallel.tensor.blocks import Block, Model, hand_plan
from shardwise.describe.tensor import SequenceParallel, Slice, TensorPlan
from shardwise.parallel.tensor import search
from shardwise.parallel.tensor.plan_tensor import plan_tensor

H = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = torch.arange(2, 22).view(2, 10)
TEXT = {"input_ids": TOKENS, "labels": TOKENS}


def only_unit(plan: TensorPlan) -> Any:
    """The plan of all blocks."""
    plans = [unit for unit in plan.units.values() if not (unit.lookups or unit.joins)]
    assert all(dataclasses.replace(p, proof=None) == dataclasses.replace(plans[0], proof=None) for p in plans)
    return plans[0]


def test_a_hand_written_block_gets_the_plan_that_a_person_would_write() -> None:
    plan = plan_tensor(Model(Block(), Block()), (torch.randn(2, 3, 16, requires_grad=True),), tp=2)
    found, hand = only_unit(plan), hand_plan()

    assert plan.sharded_share == 1.0
    assert list(plan.units) == ["blocks.0", "blocks.1"]
    assert dict(found.slices) == dict(hand.slices)
    assert (set(found.copies), set(found.reduces), found.partial) == (
        set(hand.copies),
        set(hand.reduces),
        hand.partial,
    )
    assert found.attributes == hand.attributes


def test_the_model_is_left_as_it_was() -> None:
    model = Model(Block())
    before = dict(model.named_parameters())
    plan_tensor(model, (torch.randn(2, 3, 16),), tp=2)

    assert all(model.get_parameter(name) is parameter for name, parameter in before.items())
    assert not any(vars(module)["_forward_pre_hooks"] or "forward" in vars(module) for module in model.modules())


def test_a_model_without_values_is_planned_the_same() -> None:
    with torch.device("meta"):
        model = Model(Block())

    assert plan_tensor(model, (torch.randn(2, 3, 16),), tp=2).sharded_share == 1.0


def test_heads_that_do_not_divide_leave_attention_whole_and_say_so() -> None:
    plan = plan_tensor(Model(Block(18, 3, 3)), (torch.randn(2, 3, 18),), tp=2)

    assert set(only_unit(plan).reduces) == {"down"}
    assert set(only_unit(plan).alone) == {"attention.q", "attention.k", "attention.v", "attention.o"}
    assert plan.reasons["blocks.0"] == "what attention.o makes, joined: attention.num_heads = 3 cannot be divided by 2"


def test_heads_that_no_number_counts_are_told_by_the_view_that_does_not_fit() -> None:
    heads = {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 3}
    plan = plan_tensor(llama(**heads), TEXT, tp=2)  # 3 heads of 8: Llama views by the size of a head alone

    told = plan.reasons["model.layers.0"]
    assert told.startswith("what self_attn.o_proj makes, joined: a share of it does not fit: shape '[")
    assert ", -1, 8]' is invalid for input of size" in told


def test_a_width_that_does_not_divide_is_divided_unevenly_layer_by_layer() -> None:
    found = only_unit(plan_tensor(Model(Block(15, 3, 3)), (torch.randn(2, 3, 15),), tp=4))

    assert found.reduces == ()
    assert found.alone["down"] == Slice(dim=-1, size=15, ranges=(((0, 3),), ((3, 7),), ((7, 11),), ((11, 15),)))


def test_a_layer_that_is_small_beside_the_model_stays_whole() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router, self.block = nn.Linear(64, 2), Block(64)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(x * self.router(x).softmax(-1)[..., :1])

    plan = plan_tensor(Model(Routed(), Routed()), (torch.randn(2, 3, 64),), tp=2, units=("blocks.0", "blocks.1"))

    assert only_unit(plan).alone == {}
    assert "router: " in plan.reasons["blocks.0"]


def test_what_a_batch_does_not_call_is_not_counted_and_named() -> None:
    class Crossed(Block):
        def __init__(self) -> None:
            super().__init__()
            self.cross = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
            return super().forward(x if other is None else x + self.cross(other))

    plan = plan_tensor(Model(Crossed()), (torch.randn(2, 3, 16),), tp=2)

    assert plan.sharded_share == 1.0
    assert plan.reasons == {"blocks.0": "cross: not called with this batch"}
    assert "cross.weight" not in plan.units["blocks.0"].slices


def test_a_layer_tied_to_one_outside_stays_whole() -> None:
    first, second = Block(), Block()
    second.down.weight = first.down.weight
    plan = plan_tensor(Model(first, second), (torch.randn(2, 3, 16),), tp=2)

    assert "down.weight" not in plan.units["blocks.0"].slices
    assert "down: down.weight is tied" in plan.reasons["blocks.1"]


def test_a_weight_that_the_models_own_code_reads_stays_whole() -> None:
    class Decayed(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.blocks[0].down.weight.square().sum()

    plan = plan_tensor(Decayed(Block()), (torch.randn(2, 3, 16),), tp=2)

    assert "down.weight" not in plan.units["blocks.0"].slices
    assert "attention.o.weight" in plan.units["blocks.0"].slices
    assert "or read there" in plan.reasons["blocks.0"]


def test_a_norm_between_heads_that_is_a_norm_outside_too_has_no_partial_gradient() -> None:
    class Normed(Model):
        def __init__(self, block: Block) -> None:
            super().__init__(block)
            self.norm = nn.LayerNorm(4)
            self.norm.weight = block.attention.norm.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return self.norm(x.unflatten(-1, (4, 4))).pow(3).mean()

    plan = plan_tensor(Normed(Block()), (torch.randn(2, 3, 16),), tp=2)

    assert plan.units["blocks.0"].partial == frozenset()
    assert plan.units["blocks.0"].reduces == ("down",)
    assert "attention.norm.weight is tied to a tensor outside" in plan.reasons["blocks.0"]


def test_one_group_that_is_not_proven_costs_the_others_nothing() -> None:
    class Odd(nn.Module):
        """Four pairs, of which the third depends on its width: no number says so."""

        def __init__(self) -> None:
            super().__init__()
            self.ups = nn.ModuleList(nn.Linear(8, 12) for _ in range(4))
            self.downs = nn.ModuleList(nn.Linear(12, 8) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for number, (up, down) in enumerate(zip(self.ups, self.downs, strict=True)):
                y = up(x).relu()
                x = x + down(y / y.shape[-1] if number == 2 else y)
            return x

    found = only_unit(plan_tensor(Model(Odd()), (torch.randn(2, 8),), tp=2, units=("blocks.0",)))

    assert found.reduces == ("downs.0", "downs.1", "downs.3")
    assert "ups.2" in found.alone


def test_a_chain_of_layers_is_divided_in_pairs() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*[part for _ in range(4) for part in (nn.Linear(8, 8), nn.GELU())])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.layers(x)

    found = only_unit(plan_tensor(Model(Chain()), (torch.randn(2, 8),), tp=2, units=("blocks.0",)))

    assert (found.copies, found.reduces) == (("layers.0", "layers.4"), ("layers.2", "layers.6"))


def llama(**settings: Any) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=99, **{**H, **settings}))


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(vocab_size=99, **H)),
    "llama": lambda: llama(num_key_value_heads=2),
    "gpt2, packed [q|k|v] in transposed layers": lambda: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0)
    ),
    "bloom, heads interleaved, position biases of heads as an argument": lambda: hf.BloomForCausalLM(
        hf.BloomConfig(vocab_size=99, hidden_size=32, n_layer=2, n_head=4)
    ),
    "falcon, one key head for all in a packed projection": lambda: hf.FalconForCausalLM(
        hf.FalconConfig(vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False)
    ),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(vocab_size=99, **H)),
    "phi3, packed with fewer key heads, sizes read from the configuration": lambda: hf.Phi3ForCausalLM(
        hf.Phi3Config(vocab_size=99, num_key_value_heads=2, pad_token_id=0, **H)
    ),
    "olmo2, norms over the divided width": lambda: hf.Olmo2ForCausalLM(
        hf.Olmo2Config(vocab_size=99, num_key_value_heads=4, **H)
    ),
    "mamba, a state space between": lambda: hf.MambaForCausalLM(
        hf.MambaConfig(vocab_size=99, hidden_size=16, num_hidden_layers=1, state_size=4)
    ),
    "t5, a table of heads in the first block for all": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_a_family_is_divided(family: str) -> None:
    plan = plan_tensor(FAMILIES[family](), TEXT, tp=2)

    assert plan.sharded_share == 1.0, plan.reasons
    assert all("error" in str(unit.proof) for unit in plan.units.values())


def test_key_heads_fewer_than_ranks_are_shared() -> None:
    found = only_unit(plan_tensor(llama(num_key_value_heads=2), TEXT, tp=4))
    pairs = Slice(dim=0, size=16, ranges=(((0, 8),), ((0, 8),), ((8, 16),), ((8, 16),)))

    assert found.slices["self_attn.k_proj.weight"] == pairs


def test_a_shared_key_is_read_by_all_ranks() -> None:
    settings = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    sizes = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    model = hf.DeepseekV3ForCausalLM(
        hf.DeepseekV3Config(vocab_size=99, num_key_value_heads=4, first_k_dense_replace=2, **H, **settings, **sizes)
    )
    found = only_unit(plan_tensor(model, TEXT, tp=2))

    assert found.forks == ("self_attn.kv_a_proj_with_mqa",)
    assert "self_attn.kv_b_proj" not in found.copies
    assert "self_attn.kv_a_layernorm.weight" in found.partial


def test_units_that_are_named_are_divided_like_those_that_are_chosen() -> None:
    model = Model(Block(), Block())
    plan = plan_tensor(model, (torch.randn(2, 3, 16),), tp=2, units=("blocks.1",))

    assert plan.sharded_share == 1.0
    assert set(plan.units) == {"blocks.0", "blocks.1"}


def test_a_unit_whose_forward_is_called_by_itself_is_divided() -> None:
    class Direct(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block.forward(x)
            return x.square().mean()

    plan = plan_tensor(Direct(Block(), Block()), (torch.randn(2, 3, 16),), tp=2)

    assert plan.sharded_share == 1.0
    assert dict(only_unit(plan).slices) == dict(hand_plan().slices)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The degrees of the proofs of groups, as they are made."""
    made: list[int] = []
    prove = search.prove

    def noted(*args: Any, **kwargs: Any) -> Any:
        made.append(kwargs["tp"])
        return prove(*args, **kwargs)

    monkeypatch.setattr(search, "prove", noted)
    return made


@pytest.mark.parametrize("heads", [4, 3])
def test_what_fewer_shards_leave_whole_is_not_tried_and_the_rest_is_planned_the_same(heads: int, monkeypatch) -> None:
    """Three heads are divided by nothing: with two shards that is found out, with four it is known."""
    model, batch = Model(Block(24, heads, heads)), (torch.randn(2, 3, 24),)
    two = plan_tensor(model, batch, tp=2)
    made = counted(monkeypatch)
    alone = plan_tensor(model, batch, tp=4)
    before = len(made)
    known = plan_tensor(model, batch, tp=4, smaller=two)

    assert {unit: plan.digest for unit, plan in known.units.items()} == {u: p.digest for u, p in alone.units.items()}
    assert known.sharded_share == alone.sharded_share
    assert (len(made) - before < before) if heads == 3 else (len(made) - before == before)


def test_tokens_are_dealt_out_in_a_plan_that_is_known_as_in_one_that_is_found(monkeypatch) -> None:
    model, batch = Model(Block()), (torch.randn(2, 4, 16, requires_grad=True),)
    undealt = plan_tensor(model, batch, tp=2)
    made = counted(monkeypatch)
    known = plan_tensor(model, batch, tp=2, sequence=SequenceParallel.ON, undealt=undealt)
    assert not made
    found = plan_tensor(model, batch, tp=2, sequence=SequenceParallel.ON)

    assert known.deals_tokens
    assert known == found
