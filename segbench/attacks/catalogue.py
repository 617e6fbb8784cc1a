"""Attacks by name: what is maximised, by which optimiser, on which schedule, how long.

Sources: Croce, Singh, Hein, ECCV 2024 (the losses of SEA, radius reduction, restarts, and the step sizes of the
baselines); Gu et al., ECCV 2022 (SegPGD); Agnihotri et al., ICML 2024 (CosPGD); Matyasko et al. 2026 (TsallisPGD);
Andriushchenko et al., ECCV 2020 (the square search). A new loss is one function and one line in
`segbench.attacks.losses`; its attacks are then here under ``<loss>_red``, ``<loss>_const`` and ``<loss>_3x100``.
``mce_std`` and its like see standardised logits (`segbench.attacks.standardise`). Two kinds have no line of their own
but a pattern: ``js_target_3`` draws every pixel to class 3, and ``mce_from_1a2b3c4d`` is ``mce`` on the model whose
weights' hash begins so, for another one to face.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from segbench.attacks.batch import AttackBatch, Job
from segbench.attacks.evaluator import Evaluator
from segbench.attacks.losses import LOSSES, TARGETED
from segbench.attacks.problem import COUNTERS, AttackResult, check_arguments, frozen
from segbench.attacks.square import square
from segbench.attacks.stages import Stage, reduced
from segbench.attacks.start import random_start
from segbench.errors import UnknownNameError, UsageError, unknown_name

# Step sizes of SegPGD and CosPGD with 300 iterations, on the scale of the images, by the radius over 255
# (Croce, Singh, Hein, ECCV 2024).
STEP_SIZES: Mapping[float, float] = {
    0.25: 0.0008, 0.5: 0.0009, 1: 0.001, 2: 0.002, 4: 0.003, 8: 0.005, 12: 0.006,
}  # fmt: skip
BY_ACCURACY, BY_LOSS = "accuracy", "loss"
LARGEST_MARGIN = 20.0  # of the standardised logits of sea-v2: chosen on training images (docs/attacks.md)
QUERIES = 3  # passes of the square search for each iteration, forward and backward, of the others


@dataclass(frozen=True)
class Attack:
    """An attack.

    Attributes:
        name: under which it is known.
        loss: a name in `segbench.attacks.losses.LOSSES`; empty for the square search.
        optimiser: ``apgd``, ``pgd`` (a fixed step, see `step_size`) or ``square`` (no gradients).
        schedule: ``const`` (one radius) or ``red`` (2ε, 1.5ε, ε in turn).
        iterations: of all restarts together.
        restarts: independent random starts; they share the iterations.
        best: the result is the visited point of the lowest ``accuracy`` or of the highest ``loss``.
        target: class that every pixel is drawn to; None for away from the label.
        source: first `SOURCE_DIGITS` of the weights' hash of the model that is attacked in the place of the evaluated
            one; empty for the evaluated one itself.
        largest_margin: of standardised logits (`segbench.attacks.standardise`); None for the logits themselves.
    """

    name: str
    loss: str
    optimiser: str
    schedule: str
    iterations: int = 300
    restarts: int = 1
    best: str = BY_ACCURACY
    target: int | None = None
    source: str = ""
    largest_margin: float | None = None

    @property
    def seed_name(self) -> str:
        """The name in the seeds of its random starts: the same on another model as on one's own."""
        return self.name.partition("_from_")[0]

    @property
    def runs_outside_batch(self) -> bool:
        """Whether it cannot share a batch of gradients of the evaluated model."""
        return self.optimiser == "square" or bool(self.source)

    @property
    def passes(self) -> int:
        """Forward passes of an image at most, all restarts together."""
        if self.optimiser == "square":
            return QUERIES * self.iterations
        return self.iterations + self.restarts * sum(stage.iterations > 0 for stage in self._stages())

    def parts(self) -> list[str]:
        """The restarts as attacks of one start each, by name; of one restart its own name.

        >>> ATTACKS["js_3x100"].parts(), ATTACKS["js"].parts()
        (['js_3x100_1', 'js_3x100_2', 'js_3x100_3'], ['js'])
        """
        return [f"{self.name}_{number + 1}" for number in range(self.restarts)] if self.restarts > 1 else [self.name]

    def stages(self, eps_255: float) -> tuple[Stage, ...]:
        """Of one restart."""
        stages = self._stages()
        if self.optimiser == "pgd":
            step = step_size(eps_255) / (eps_255 / 255)
            stages = tuple(stage._replace(fixed_step=step) for stage in stages)
        return stages

    def _stages(self) -> tuple[Stage, ...]:
        """Without the step sizes of plain PGD, which depend on the radius."""
        each = self.iterations // self.restarts
        return reduced(each) if self.schedule == "red" else (Stage(1.0, each),)


def schedules(name: str) -> list[str]:
    """An attack by APGD at one radius, from three starts, and with radius reduction; any other one as it is.

    Source: Croce, Singh, Hein, ECCV 2024, Figures 2 and 4.

    >>> schedules("mce"), schedules("apgd"), schedules("pgd")
    (['mce_const', 'mce_3x100', 'mce'], ['ce_const', 'ce_3x100', 'ce_red'], ['pgd'])
    """
    attack = get_attack(name)
    if attack.optimiser != "apgd" or attack.target is not None or attack.source or attack.largest_margin is not None:
        return [name]
    red = attack.loss if getattr(ATTACKS.get(attack.loss), "schedule", "") == "red" else f"{attack.loss}_red"
    return [f"{attack.loss}_const", f"{attack.loss}_3x100", red]


def step_size(eps_255: float) -> float:
    """The published step size of plain PGD at a radius; between two radii on a straight line of both logarithms.

    Outside of the table it is the same multiple of the radius as at its nearer end.

    >>> step_size(8), round(step_size(6), 5), step_size(24)
    (0.005, 0.00404, 0.012)
    """
    if eps_255 in STEP_SIZES:
        return STEP_SIZES[eps_255]
    radii, steps = list(STEP_SIZES), list(STEP_SIZES.values())
    nearest = radii[0] if eps_255 < radii[0] else radii[-1]
    if eps_255 < radii[0] or eps_255 > radii[-1]:
        return STEP_SIZES[nearest] * (eps_255 / nearest)
    return float(math.exp(np.interp(math.log(eps_255), np.log(radii), np.log(steps))))


def _catalogue() -> dict[str, Attack]:
    found = [
        Attack("pgd", "ce", "pgd", "const"),
        Attack("apgd", "ce", "apgd", "const"),
        Attack("segpgd", "segpgd", "pgd", "const"),
        Attack("cospgd", "cospgd", "pgd", "const"),
        Attack("segpgd_by_loss", "segpgd", "pgd", "const", best=BY_LOSS),
        Attack("cospgd_by_loss", "cospgd", "pgd", "const", best=BY_LOSS),
        Attack("square", "", "square", "const"),
    ]
    for loss in (loss for loss in LOSSES if loss not in TARGETED):
        found.append(Attack(f"{loss}_red", loss, "apgd", "red"))
        found.append(Attack(f"{loss}_const", loss, "apgd", "const"))
        found.append(Attack(f"{loss}_3x100", loss, "apgd", "const", restarts=3))
    sea = [Attack(loss, loss, "apgd", "red") for loss in ("mce_bal", "mce", "js", "tsallis")]
    standardised = [replace(attack, name=f"{attack.name}_std", largest_margin=LARGEST_MARGIN) for attack in sea]
    return {attack.name: attack for attack in [*found, *sea, *standardised]}


ATTACKS: Mapping[str, Attack] = _catalogue()
SOURCE_DIGITS = 8


def get_attack(name: str, iterations: int | None = None) -> Attack:
    """The attack of that name, with other iterations of all restarts together if wanted.

    Args:
        name: of the catalogue; one of its `Attack.parts`; ``js_target_<class>``; ``<attack>_from_<source>``.
        iterations: None for 300.

    Raises:
        UsageError: unknown name, or fewer iterations than restarts.
    """
    if match := re.fullmatch(r"js_target_([0-9]+)", name):
        number = Attack.iterations if iterations is None else iterations
        if number < 1:
            raise UsageError(f"{name} needs at least 1 iteration, not {number}.")
        return Attack(name, "js_target", "apgd", "red", number, target=int(match[1]))
    if match := re.fullmatch(rf"(\w+)_from_([0-9a-f]{{{SOURCE_DIGITS}}})", name):
        return replace(get_attack(match[1], iterations), name=name, source=match[2])
    whole = name if name in ATTACKS else name.rpartition("_")[0]
    is_part = whole != name
    if whole not in ATTACKS or (is_part and name not in ATTACKS[whole].parts()):
        raise UnknownNameError(unknown_name("attack", name, ATTACKS))
    attack = ATTACKS[whole] if iterations is None else replace(ATTACKS[whole], iterations=iterations)
    if attack.iterations < attack.restarts:
        raise UsageError(f"{name} needs at least {attack.restarts} iterations, one for each restart, not {iterations}.")
    if is_part:
        return replace(attack, name=name, iterations=attack.iterations // attack.restarts, restarts=1)
    return attack


def perform(
    attack: Attack,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps_255: float,
    seeds: Sequence[Sequence[int]],
    class_weights: Tensor | None = None,
    ignore_index: int = 255,
) -> AttackResult:
    """Attacks each image; of several restarts the best result is returned, and the passes of all are counted.

    Args:
        attack: of the catalogue, or one's own.
        model: images (N,3,H,W) in [0,1] to logits (N,K,H,W); used in the mode that it is in.
        images: (N,3,H,W) in [0,1].
        labels: (N,H,W) int64 in 0..K-1 or ``ignore_index``; of a targeted attack it matters only which pixels count.
        eps_255: l_inf radius as a numerator over 255.
        seeds: for each image one seed for each restart, 0 <= seed < 2^63.
        class_weights: (K,), needed by ``mce_bal``.
        ignore_index: label of pixels that do not count.

    Raises:
        UsageError: an argument is out of range.
    """
    eps = eps_255 / 255
    if len(seeds) != len(images) or any(len(each) != attack.restarts for each in seeds):
        raise UsageError(f"{attack.name} needs {attack.restarts} seeds for each of {len(images)} images.")
    if attack.optimiser == "square":
        return square(
            model, images, labels, eps=eps, queries=attack.passes, seeds=[each[0] for each in seeds],
            ignore_index=ignore_index,
        )  # fmt: skip
    check_arguments(images, labels, eps=eps, loss=attack.loss, iterations=attack.iterations, start=None)
    labels = target_labels(attack, labels, ignore_index)
    weights = None if class_weights is None else class_weights.to(images.device)
    stages = attack.stages(eps_255)
    batch = AttackBatch(Evaluator(model, class_weights=weights, ignore_index=ignore_index))
    rounds: list[AttackResult] = []
    with frozen(model):
        for restart in range(attack.restarts):
            starts = random_start(images, eps=stages[0].radius * eps, seeds=[each[restart] for each in seeds])
            jobs = [
                Job(image, label, attack.loss, eps, stages, start, attack.best == BY_LOSS, attack.largest_margin)
                for image, label, start in zip(images, labels, starts, strict=True)
            ]
            keys = batch.add(jobs)
            found = batch.run()
            rounds.append(AttackResult(*map(torch.stack, zip(*(found[key] for key in keys), strict=True))))
    return best_of(rounds, by_loss=attack.best == BY_LOSS)


def target_labels(attack: Attack, labels: Tensor, ignore_index: int = 255) -> Tensor:
    """The labels that the attack works with: those given, or its target wherever a pixel counts."""
    return labels if attack.target is None else torch.where(labels == ignore_index, labels, attack.target)


def best_of(rounds: Sequence[AttackResult], *, by_loss: bool = False) -> AttackResult:
    """For each image the result of the lowest accuracy, or the highest loss, the first of equals; all passes."""
    values = torch.stack([-each.tracked_loss if by_loss else each.accuracy for each in rounds])
    choice, images = values.argmin(dim=0), torch.arange(values.shape[1], device=values.device)
    stacked = AttackResult(*(torch.stack(each) for each in zip(*rounds, strict=True)))
    return AttackResult(
        *(
            values.sum(dim=0) if name in COUNTERS else values[choice, images]
            for name, values in stacked._asdict().items()
        )
    )
