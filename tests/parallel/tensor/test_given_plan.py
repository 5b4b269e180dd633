"""Plans from outside: used where they are right, refused by name where they are wrong, before any process starts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn
import transformers as hf

import shardwise as sw
from parallel.tensor.blocks import Block, Model
from shardwise.describe.tensor import TensorPlan
from shardwise.errors import LayoutError, ModelError
from shardwise.parallel.tensor.plan_tensor import plan_tensor
from shardwise.parallel.tensor.written_plan import words_by_hand
from shardwise.train.build import Job
from shardwise.train.checks import check_tensor
from shardwise.train.run_file import run_from

TOKENS = torch.arange(2, 22).view(2, 10)
TEXT = {"input_ids": TOKENS, "labels": TOKENS}
X = (torch.randn(2, 3, 16),)
RIGHT = {
    **{f"blocks.*.attention.{name}": "colwise" for name in "qkv"},
    "blocks.*.attention.o": "rowwise",
    "blocks.*.attention.norm": "replicated_with_grad_allreduce",
    "blocks.*.gate_up": "packed_colwise",
    "blocks.*.down": "rowwise",
}


def qwen3(**changes: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 99}
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**{**sizes, **heads, **changes}))


def swapped(words: dict[str, str]) -> dict[str, str]:
    other = {"colwise": "rowwise", "rowwise": "colwise"}
    return {name: other.get(style, style) if "mlp" in name else style for name, style in words.items()}


class NoRanks:
    """A starter that must not be asked."""

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"ranks were started: {name}")


# -- right ones ---------------------------------------------------------------------------------


def test_words_for_a_model_written_by_hand_find_the_numbers_of_heads_themselves() -> None:
    plan = plan_tensor(Model(Block(dropout=0.1), Block(dropout=0.1)), X, tp=2, tp_plan=RIGHT)

    unit = plan.units["blocks.1"]
    assert plan.sharded_share == 1.0
    assert plan.origin == "as written"
    assert unit.attributes["attention", "num_heads"] == (2, 2)
    assert unit.proof is not None
    assert unit.proof.dropout
    assert unit.proof.error < 1e-9


def test_a_plan_set_on_a_model_is_used_and_says_so() -> None:
    model = Model(Block())
    model.tp_plan = {**RIGHT}
    del model.tp_plan["blocks.*.gate_up"], model.tp_plan["blocks.*.down"]

    plan = plan_tensor(model, X, tp=2)

    assert plan.origin == "as set on the model"
    assert "down.weight" not in plan.units["blocks.0"].slices


def test_the_plan_of_a_library_is_no_word_of_the_user() -> None:
    model = qwen3()
    assert words_by_hand(model) is None
    assert words_by_hand(Model(Block())) is None
    assert plan_tensor(model, TEXT, tp=2).origin == "found by dataflow"


def test_an_odd_vocabulary_by_hand_is_divided_unevenly_and_proven() -> None:
    words = {"embed_tokens": "embedding_rowwise", "lm_head": "colwise_rep"}
    plan = plan_tensor(qwen3(vocab_size=101), TEXT, tp=2, tp_plan=words)

    part = plan.slice_of("lm_head.weight")
    assert part is not None
    assert part.ranges == (((0, 50),), ((50, 101),))
    assert plan.slice_of("model.embed_tokens.weight") == part
    assert plan.reasons["model.layers.0"] == "the written plan does not name it"


def test_what_words_leave_whole_inside_a_block_is_listed_layer_by_layer() -> None:
    words = {"blocks.*.gate_up": "packed_colwise", "down": "rowwise"}
    reason = plan_tensor(Model(Block()), X, tp=2, tp_plan=words).reasons["blocks.0"]

    assert reason.split("; ") == [f"attention.{name}: the written plan leaves it whole" for name in "qkvo"]


def test_a_value_is_a_plan_too() -> None:
    found = plan_tensor(Model(Block()), X, tp=2)
    again = plan_tensor(Model(Block()), X, tp=2, tp_plan=found)

    assert again.units["blocks.0"].slices == found.units["blocks.0"].slices
    with pytest.raises(LayoutError, match=r"made for tp=2 and the layout has tp=4"):
        plan_tensor(Model(Block()), X, tp=4, tp_plan=found)


# -- wrong ones ---------------------------------------------------------------------------------


def test_rows_and_columns_swapped_on_a_model_name_the_module_that_fails() -> None:
    model = qwen3()
    model.tp_plan = swapped(model.tp_plan)

    with pytest.raises(ModelError, match=r"model.layers.0 does not run on 2 .* fails in model.layers.0.mlp.gate_proj"):
        plan_tensor(model, TEXT, tp=2)


def test_rows_and_columns_swapped_where_all_sizes_are_equal_name_the_first_tensor_that_differs() -> None:
    class Square(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(torch.relu(self.up(x)))

    words = {"up": "colwise_rep", "down": "all_reduce"}
    with pytest.raises(ModelError, match=r"blocks.0 on 2 ranks is not equal .* output 0 .* blocks.0.down is the first"):
        plan_tensor(Model(Square()), (torch.randn(3, 8),), tp=2, tp_plan=words)


def test_a_query_norm_whose_gradient_is_not_summed_is_refused_by_its_name() -> None:
    model = qwen3()
    words = {name: style for name, style in model.tp_plan.items() if "q_norm" not in name}

    with pytest.raises(ModelError, match=r"model.layers.0 .* gradient of self_attn.q_norm.weight differs"):
        plan_tensor(model, TEXT, tp=2, tp_plan=words)


def test_a_config_that_says_otherwise_than_its_class_is_refused_too() -> None:
    config = qwen3().config
    config.base_model_tp_plan = swapped(config.base_model_tp_plan)

    with pytest.raises(ModelError, match=r"model.layers.0 does not run"):
        plan_tensor(hf.Qwen3ForCausalLM(config), TEXT, tp=2)


def test_an_odd_vocabulary_that_nobody_joins_is_refused_by_name() -> None:
    with pytest.raises(LayoutError, match=r"lm_head is 'colwise' on 2 ranks: parts \(101,\) of 101.*write 'colwise_g"):
        plan_tensor(qwen3(vocab_size=101), TEXT, tp=2, tp_plan={"lm_head": "colwise"})


def test_a_block_that_does_not_run_by_itself_is_no_fault_of_the_plan() -> None:
    class OfWholeNumbers(nn.Module):
        """Takes activations of its own model alone."""

        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if type(x) is torch.Tensor and x.dtype == torch.float64:
                raise ValueError("never float64")
            return x + self.down(torch.relu(self.up(x)))

    with pytest.raises(ModelError, match=r"blocks.0 does not run by itself on random numbers: ValueError: never float"):
        plan_tensor(Model(OfWholeNumbers()), X, tp=2, tp_plan={"up": "colwise", "down": "rowwise"})


# -- before any process starts ------------------------------------------------------------------


@pytest.mark.parametrize("as_factory", [False, True])
def test_verify_refuses_a_wrong_plan_before_it_starts_ranks(as_factory: bool) -> None:
    words = {**RIGHT, "blocks.*.attention.norm": "replicate"}

    def model() -> nn.Module:
        return Model(Block())

    with pytest.raises(ModelError, match="gradient of attention.norm.weight differs"):
        sw.verify(model if as_factory else model(), X, layout="tp=2", tp_plan=words, starter=NoRanks())  # type: ignore[arg-type]


def test_training_refuses_a_wrong_plan_before_it_starts_ranks() -> None:
    config = {"model_type": "qwen3", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "head_dim": 8}
    run = run_from(
        {
            "layout": "tp=2",
            "model": {"config": {**config, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}},
            "task": {"kind": "random_tokens", "sequence_length": 8},
            "training": {"steps": 1, "global_batch": 2},
            "tp_plan": {"layers.*.mlp.up_proj": "colwise"},
        }
    )
    job = Job(run=run, task_options=run.task_options)

    with pytest.raises(ModelError, match="model.layers.0 does not run on 2 ranks: it fails in model.layers.0.mlp"):
        check_tensor(job)


def test_the_plan_in_words_names_shares_proofs_and_reasons() -> None:
    told = str(plan_tensor(Model(Block(dropout=0.1)), X, tp=2))

    assert "divided among 2 shards, found by dataflow: 100% of the blocks' matrix products" in told
    assert "of a forward's flops" in told
    assert "proven: the block, 1 signature, training and evaluation, dropout on, tp=2: error" in told
    assert max(map(len, told.splitlines())) <= 120


def test_proofs_hold_for_a_key_that_another_structure_or_signature_changes() -> None:
    def key(model: nn.Module, batch: tuple[torch.Tensor, ...] = X) -> str:
        proof = plan_tensor(model, batch, tp=2).units["blocks.0"].proof
        assert proof is not None
        return proof.key

    assert key(Model(Block())) == key(Model(Block(), Block())) != key(Model(Block(32)), (torch.randn(2, 3, 32),))
    assert key(Model(Block())) != key(Model(Block()), (torch.randn(2, 4, 16),))


def test_flops_count_what_is_divided_and_what_is_not() -> None:
    words = {"blocks.*.gate_up": "packed_colwise", "down": "rowwise"}
    plan: TensorPlan = plan_tensor(Model(Block()), X, tp=2, tp_plan=words)

    products = {"q": 16 * 16, "k": 16 * 8, "v": 16 * 8, "o": 16 * 16, "mlp": 16 * 64 + 32 * 16}
    attention = 2 * 3 * 16  # scores and their product with values, for one token
    assert plan.flops_share == pytest.approx(products["mlp"] / (sum(products.values()) + attention), rel=1e-6)
