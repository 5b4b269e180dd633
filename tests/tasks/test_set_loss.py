"""Boxes by hand; the matching against every assignment there is; the set loss of a batch and of its parts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from shardwise.errors import ConfigError
from shardwise.tasks.boxes import corners, generalised_iou, middles
from shardwise.tasks.set_loss import SetLoss, boxes_of
from shardwise.tasks.set_matching import matched_queries, matching_cost

TERMS = (1.0, 5.0, 2.0)


def outputs(batch: int = 4, queries: int = 5, classes: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "logits": torch.randn(batch, queries, classes + 1, generator=generator, requires_grad=True),
        "pred_boxes": torch.rand(batch, queries, 4, generator=generator).requires_grad_(),
    }


def targets(batch: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Three boxes, one, none, two; what is none stands anywhere."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.tensor([[0, 2, 1], [-100, 2, -100], [-100, -100, -100], [1, -100, 1]])[:batch]
    return labels, torch.rand(batch, 3, 4, generator=generator) * 0.5 + 0.1


def test_generalised_iou_by_hand() -> None:
    #   ┌──┬─┐      a = 2 x 2, b = 2 x 2 one to the right: 2 of 6 shared, the hull is their union
    #   └──┴─┘
    a = torch.tensor([[0.0, 0.0, 2.0, 2.0]] * 4)
    b = torch.tensor([[1.0, 0.0, 3.0, 2.0], [0.0, 0.0, 2.0, 2.0], [3.0, 0.0, 5.0, 2.0], [1.0, 1.0, 3.0, 3.0]])
    wanted = [2 / 6, 1.0, 0 - 2 / 10, 1 / 7 - 2 / 9]  # apart: a hull of 10 of which 8 are covered; askew: 9 and 7
    assert generalised_iou(a, b).tolist() == pytest.approx(wanted)
    assert generalised_iou(a[:, None], b[None]).shape == (4, 4)


def test_a_box_without_area_has_nothing_of_another_and_a_gradient() -> None:
    flat = torch.zeros(1, 4, requires_grad=True)
    iou = generalised_iou(flat, torch.zeros(1, 4))
    iou.sum().backward()
    assert iou.isfinite().all()
    assert flat.grad is not None
    assert flat.grad.isfinite().all()


def test_corners_and_middles_are_each_other_back() -> None:
    box = torch.tensor([[0.5, 0.4, 0.2, 0.6]])
    assert corners(box).tolist() == [pytest.approx([0.4, 0.1, 0.6, 0.7])]
    assert torch.allclose(middles(corners(box)), box)


def test_the_matching_costs_least_of_all_assignments() -> None:
    found = outputs(batch=3, queries=5)
    labels, boxes = targets(3)
    matched = matched_queries(found["logits"], found["pred_boxes"], labels, boxes, terms=TERMS)
    cost = matching_cost(found["logits"], found["pred_boxes"], labels, boxes, terms=TERMS).tolist()
    for image in range(3):
        places = [t for t in range(3) if labels[image, t] != -100]
        totals = {
            queries: sum(cost[image][q][t] for q, t in zip(queries, places, strict=True))
            for queries in itertools.permutations(range(5), len(places))
        }
        assert tuple(matched[image, places].tolist()) == min(totals, key=totals.__getitem__)
        assert matched[image].eq(-1).tolist() == labels[image].eq(-100).tolist()


def test_a_cost_is_the_sum_of_its_three_terms() -> None:
    logits = torch.tensor([[[0.0, math.log(3.0), 0.0]]])  # 0.2, 0.6, 0.2
    box, target = torch.tensor([[[0.5, 0.5, 0.2, 0.2]]]), torch.tensor([[[0.6, 0.5, 0.2, 0.2]]])
    cost = matching_cost(logits, box, torch.tensor([[1]]), target, terms=TERMS)
    assert float(cost) == pytest.approx(-0.6 + 5 * 0.1 - 2 * (1 / 3))


def test_equal_queries_are_told_apart_by_their_numbers_and_not_by_rounding() -> None:
    logits, boxes = torch.zeros(2, 6, 4), torch.full((2, 6, 4), 0.5)
    labels, wanted = torch.tensor([[0, 1], [1, 1]]), torch.full((2, 2, 4), 0.4)
    first = matched_queries(logits, boxes, labels, wanted, terms=TERMS)
    rounded = logits + 1e-7 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(first, matched_queries(rounded, boxes, labels, wanted, terms=TERMS))
    assert first.sort(-1).values.tolist() == [[0, 1], [0, 1]]


def test_more_boxes_than_queries_and_unknown_labels_are_refused() -> None:
    labels, boxes = targets()
    few = outputs(queries=2)
    with pytest.raises(ConfigError, match=r"an image has up to 3 boxes and the model 2 queries; give it at least 3"):
        matched_queries(few["logits"], few["pred_boxes"], labels, boxes, terms=TERMS)
    small = outputs(classes=2)
    with pytest.raises(ConfigError, match=r"this one has 3 and a box is of class 2; give it at least 4"):
        matched_queries(small["logits"], small["pred_boxes"], labels, boxes, terms=TERMS)


def test_what_is_no_number_is_matched_last_and_told_by_the_loss() -> None:
    labels, boxes = targets(1)
    found = {name: tensor.detach().clone() for name, tensor in outputs(batch=1).items()}
    found["logits"][0, :2] = torch.nan
    matched = matched_queries(found["logits"], found["pred_boxes"], labels, boxes, terms=TERMS)
    assert sorted(matched[0].tolist()) == [2, 3, 4]
    assert bool(SetLoss().of(found, labels, boxes).isnan())


def test_the_loss_of_a_perfect_answer_is_that_of_its_certainty() -> None:
    labels, boxes = torch.tensor([[1, -100]]), torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.0, 0.0, 0.0, 0.0]]])
    logits = torch.tensor([[[0.0, 0.0, 20.0], [0.0, 20.0, 0.0]]])  # none, class 1
    found = {"logits": logits, "pred_boxes": torch.tensor([[[0.1, 0.1, 0.1, 0.1], [0.5, 0.5, 0.2, 0.4]]])}
    assert float(SetLoss().of(found, labels, boxes)) == pytest.approx(0.0, abs=1e-6)
    certain = {**found, "logits": torch.zeros_like(logits)}
    # a third each: of the box and, a tenth of it, of none
    assert float(SetLoss().of(certain, labels, boxes)) == pytest.approx(1.1 * math.log(3), rel=1e-5)
    assert float(SetLoss(per_image=2.0).of(certain, labels, boxes)) == pytest.approx(0.55 * math.log(3), rel=1e-5)


def test_the_loss_of_a_batch_is_the_mean_of_its_images_also_of_those_without_a_box() -> None:
    labels, boxes = targets()
    found = {name: tensor.detach() for name, tensor in outputs().items()}
    whole = SetLoss().of(found, labels, boxes)
    parts = [
        SetLoss().of({k: v[rows] for k, v in found.items()}, labels[rows], boxes[rows])
        for rows in (slice(0, 3), slice(3, 4))
    ]
    assert float(whole) == pytest.approx(float((3 * parts[0] + parts[1]) / 4), rel=1e-6)
    empty = SetLoss().of({k: v[2:3] for k, v in found.items()}, labels[2:3], boxes[2:3])
    assert float(empty) > 0


def test_boxes_of_none_have_no_gradient_and_others_have() -> None:
    found, (labels, boxes) = outputs(), targets()
    SetLoss(l1_term=1.0).of(found, labels, boxes).backward()
    moved = found["pred_boxes"].grad
    assert moved is not None
    assert moved.abs().sum(-1).gt(0).sum(-1).tolist() == [3, 1, 0, 2]
    assert found["logits"].grad is not None
    assert bool(found["logits"].grad.abs().sum(-1).gt(0).all())


def test_outputs_without_boxes_and_negative_terms_are_refused() -> None:
    with pytest.raises(ConfigError, match="a detector returns logits and pred_boxes; got dict"):
        boxes_of({"logits": torch.zeros(1)})
    with pytest.raises(ConfigError, match="not negative"):
        SetLoss(no_object=-0.1)
