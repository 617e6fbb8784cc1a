"""Whether attacks find on this device what they must find: against golden vectors, and against the plain loop."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from segbench import attacks, counts, ensemble
from segbench.attacks import losses, reference
from segbench.attacks.batch import AttackBatch, Job
from segbench.attacks.evaluator import Evaluator
from segbench.attacks.problem import AttackResult, frozen
from segbench.attacks.stages import reduced
from segbench.engine.compute.session import open_session
from segbench.engine.selftest import golden
from segbench.engine.selftest.outcome import DIFFERS, OK, Outcome, at_most

ITERATIONS = 40


def golden_losses(device: torch.device) -> Outcome:
    """Values of the losses and their gradients, in float64 and in float32."""
    data = golden.arrays()
    errors = {}
    for dtype in (torch.float64, torch.float32):
        worst = 0.0
        for name in ("ce", "mce", "mce_bal", "js"):
            logits = torch.tensor(data["loss_logits"]).to(device, dtype).requires_grad_()
            labels, weights = (torch.tensor(data[f"loss_{key}"]).to(device) for key in ("labels", "class_weights"))
            arguments = {"class_weights": weights.to(dtype)} if name == "mce_bal" else {}
            with torch.enable_grad():
                values = getattr(losses, name)(logits, labels, **arguments)
                (gradient,) = torch.autograd.grad(values.sum(), logits)
            for found, kind in ((values, "value"), (gradient, "grad")):
                expected = torch.tensor(data[f"loss_{kind}_{name}"])
                worst = max(worst, _largest(found.detach().cpu().double() - expected))
        errors[dtype] = worst
    if errors[torch.float64] > 1e-10:
        return at_most(errors[torch.float64], 1e-10, f"float64: largest difference {errors[torch.float64]:.1g}")
    return at_most(
        errors[torch.float32], 1e-5, f"4 losses, values and gradients: largest difference {errors[torch.float32]:.1g}"
    )


def golden_attacks(device: torch.device) -> Outcome:
    """APGD, and APGD with radius reduction: the points, their accuracy and predictions of the released code."""
    data, problem = golden.arrays(), golden.problem(device)
    pixels, largest = 0, 0.0
    for name in golden.ATTACKS:
        kind, loss, eps = name.split("_")
        attack, iterations = (attacks.apgd, 25) if kind == "const" else (attacks.red_eps_apgd, 30)
        found = attack(
            problem.model, problem.images, problem.labels, eps=int(eps) / 255, loss=golden.LOSSES[loss],
            iterations=iterations, class_weights=problem.class_weights,
        )  # fmt: skip
        pixels += int((found.predictions.cpu() != torch.tensor(data[f"{name}_pred"])).sum())
        largest = max(largest, _largest(found.accuracy.cpu() - torch.tensor(data[f"{name}_acc"]).double()))
        if f"{name}_xadv" in data:
            points = torch.tensor(data[f"{name}_xadv"]).double()
            largest = max(largest, _largest(found.adversarial.cpu() - points))
    if pixels:
        return Outcome(DIFFERS, f"{pixels} pixels are predicted differently from the released code", float(pixels))
    return at_most(
        largest, 1e-6, f"{len(golden.ATTACKS)} attacks on {golden.IMAGES} images: largest difference {largest:.1g}"
    )


def golden_worst_case(device: torch.device) -> Outcome:
    """The worst case over attacks, on the CPU: never above what the released search reached."""
    data = golden.arrays()
    labels = data["worst_labels"]
    worst = ensemble.worst_case([counts.count(predictions, labels, 7) for predictions in data["worst_pred_4"]])
    accuracy = abs(worst.aacc - float(data["worst_worst_acc_4"]))
    above = max(0.0, worst.miou - float(data["worst_worst_miou_4"]))
    return at_most(
        max(accuracy, above), 1e-6, f"aAcc differs by {accuracy:.1g}, mIoU exceeds the released search by {above:.1g}"
    )


class _ImageByImage(nn.Module):
    """Sees one image at a time, so that no kernel can round an image by its neighbours."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return torch.cat([self.model(image[None]) for image in images])


def plain_loop(device: torch.device) -> Outcome:
    """The fast batch, with several losses and images that come and go, against `segbench.attacks.reference`."""
    model, images, labels, weights = golden.problem(device)
    model, eps = _ImageByImage(model), 6 / 255
    starts = attacks.random_start(images, eps=2 * eps, seeds=range(len(images)))
    wanted = [(loss, row) for loss in ("mce_bal", "mce", "js") for row in range(len(images))]
    found = dict[tuple[str, int], AttackResult]()
    keys = dict[int, tuple[str, int]]()
    batch, waiting = AttackBatch(Evaluator(model, class_weights=weights)), list(wanted)
    with open_session([model], device):
        while waiting or len(batch):
            taken = [waiting.pop() for _ in range(min(5 - len(batch), len(waiting)))]
            jobs = [Job(images[row], labels[row], loss, eps, reduced(ITERATIONS), starts[row]) for loss, row in taken]
            keys |= dict(zip(batch.add(jobs), taken, strict=True))
            batch.step()
            found |= {keys[key]: result for key, result in batch.finished()}
        pixels, largest = 0, 0.0
        for loss, row in wanted:
            expected = reference.red_eps_apgd(
                model, images[row], labels[row], eps=eps, loss=loss, iterations=ITERATIONS, start=starts[row],
                class_weights=weights,
            )  # fmt: skip
            pixels += int((found[loss, row].predictions != expected.predictions).sum())
            largest = max(largest, _largest(found[loss, row].adversarial - expected.adversarial))
    if pixels:
        return Outcome(DIFFERS, f"{pixels} pixels are predicted differently from the plain loop", float(pixels))
    return at_most(largest, 1e-12, f"{len(wanted)} attacks in a batch of 5: {_by(largest)}")


def early_stop(device: torch.device) -> Outcome:
    """Images without a correct pixel leave at once, all others have every pass: flags are read when they arrived."""
    model, images, labels, _ = golden.problem(device)
    with torch.no_grad():
        labels[:2] = (model(images[:2]).argmax(dim=1) + 1) % 7
    with frozen(model):
        found = attacks.red_eps_apgd(model, images, labels, eps=0.5 / 255, loss="mce", iterations=ITERATIONS)
    forwards = found.forwards.tolist()
    expected = [6, 6, *[ITERATIONS + 3] * (len(images) - 2)]  # a start and a step in each of three stages
    return Outcome(OK if forwards == expected else DIFFERS, f"forward passes {forwards}, expected {expected}")


def _largest(values: Tensor) -> float:
    """The largest difference; infinite if one is no number, which a maximum would pass over."""
    found = float(values.abs().max()) if values.numel() else 0.0
    return math.inf if math.isnan(found) else found


def _by(difference: float) -> str:
    return "identical" if difference == 0 else f"largest difference {difference:.1g}"
