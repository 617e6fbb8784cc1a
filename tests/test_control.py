"""The step control: the same rules in NumPy, which a CPU uses, and in torch, which a GPU uses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from segbench.attacks.control import NUMBERS, _decided, _keep, _keep_on_device
from segbench.attacks.evaluator import Evaluator
from segbench.attacks.stages import ScheduleRow, Stage, reduced, schedule

IMAGES = 400
FLAGS, WHOLE = ("by_loss", "was_halved"), ("at", "rises", "correct")
ODD = (float("nan"), float("inf"), -float("inf"), 0.0)


def state(seed: int, *, fixed: bool) -> tuple[dict[str, torch.Tensor], ScheduleRow, torch.Tensor, list[torch.Tensor]]:
    """Images at random rows of a schedule, with odd values among their numbers."""
    generator = torch.Generator().manual_seed(seed)

    def numbers(odd: bool = True) -> torch.Tensor:
        values = torch.randn(IMAGES, generator=generator, dtype=torch.float64).mul(4).round().div(4)  # ties
        where = torch.rand(IMAGES, generator=generator) < 0.2
        choice = torch.tensor(ODD, dtype=torch.float64)[torch.randint(len(ODD), (IMAGES,), generator=generator)]
        return torch.where(where, choice, values) if odd else values

    def integers(end: int) -> torch.Tensor:
        return torch.randint(end, (IMAGES,), generator=generator)

    stages = (Stage(2.0, 9, 0.1), Stage(1.0, 9, 0.1)) if fixed else reduced(60)
    table = torch.tensor(schedule(stages), dtype=torch.float64).T.contiguous()
    rows = {name: numbers() for name in NUMBERS}
    rows |= {name: integers(4) for name in NUMBERS if name in WHOLE or name.endswith(("wards", "gradients"))}
    rows |= {name: integers(2).bool() for name in FLAGS}
    rows |= {"at": integers(table.shape[1]), "eps": numbers(odd=False).abs()}
    now = [numbers(), integers(4), numbers(), numbers()]  # tracked loss, correct pixels, extremes of the gradient
    return rows, ScheduleRow(*table[:, rows["at"]]), table, now


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("with_gradient", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_numpy_and_torch_decide_the_same(seed, with_gradient, fixed):
    rows, at, table, (tracked, correct, lowest, highest) = state(seed, fixed=fixed)
    extremes = [lowest, highest] if with_gradient else []
    numbers, change = _decided(torch, rows, at, table, tracked, correct, extremes)
    ours, ours_change = _decided(
        np,
        {name: values.numpy() for name, values in rows.items()},
        ScheduleRow._make(values.numpy() for values in at),
        table.numpy(),
        tracked.numpy(),
        correct.numpy(),
        [values.numpy() for values in extremes],
    )
    assert numbers.keys() == ours.keys()
    for name, values in numbers.items():
        assert values.numpy().dtype == ours[name].dtype, name
        np.testing.assert_array_equal(values.numpy(), ours[name], err_msg=name)
    for name, values, mine in zip(change._fields, change, ours_change, strict=True):
        np.testing.assert_array_equal(values.numpy(), mine, err_msg=name)
    assert all(0 < int(flags.sum()) < IMAGES for flags in (change.better, change.improved, change.starts))
    assert fixed or int(change.halve.sum())


@pytest.mark.parametrize("where", [[False, False, False], [True, False, True], [True, True, True]])
@pytest.mark.parametrize("shape", [(3, 3, 2, 2), (3, 2, 2)])
def test_images_are_kept_alike_one_by_one_and_all_at_once(where, shape):
    old, new, flags = torch.zeros(shape), torch.ones(shape), torch.tensor(where)
    one_by_one, at_once = old.clone(), old.clone()
    _keep(one_by_one, new, flags)
    _keep_on_device(at_once, new, flags)
    assert torch.equal(one_by_one, at_once)
    assert one_by_one.flatten(1).mean(dim=1).bool().tolist() == where


@pytest.mark.parametrize("size", [1, 2, 5])
def test_parts_that_share_memory_find_what_one_whole_pass_finds(size):
    """Also for the identity, whose input gradient is the gradient of the logits itself."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(5, 3, 4, 4, generator=generator)
    labels = torch.randint(3, (5, 4, 4), generator=generator).masked_fill(images[:, 0] > 0.8, 255)
    for model in (nn.Identity(), nn.Conv2d(3, 3, 1)):
        found = []
        for images_at_once in (size, None):
            evaluator = Evaluator(model, size=images_at_once, fill=True)
            parts = evaluator.parts(labels, [("ce", None)])
            assert len({id(part.scratch) for part in parts}) == 1
            evaluator(images.flip(0), parts, 1, 5, backward=True)  # leaves something in the memory that they share
            found.append(evaluator(images, parts, 1, 5, backward=True))
        for ours, whole in zip(*found, strict=True):
            torch.testing.assert_close(ours, whole, rtol=0, atol=1e-7)
