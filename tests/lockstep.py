"""APGD as a plain loop over one batch, from SEA.md alone: the independent implementation beside the product's.

All images walk in step; those whose accuracy is 0 leave. No tables, no places, no refilling.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from segbench.attacks import losses


class Best(NamedTuple):
    """Per image: the visited point with the fewest correct pixels, its number, its predictions, and the passes."""

    adversarial: Tensor
    correct: Tensor
    predictions: Tensor
    forwards: Tensor
    backwards: Tensor


def _project(x: Tensor, images: Tensor, eps: float) -> Tensor:
    return torch.minimum(torch.maximum(x, images - eps), images + eps).clamp(0, 1)


def red_eps_apgd(
    model: nn.Module, images: Tensor, labels: Tensor, *, eps: float, loss: str, iterations: int, start: Tensor,
    class_weights: Tensor, ignore_index: int = 255,
) -> Best:  # fmt: skip
    """Three stages, each from the lowest-accuracy points of the one before."""
    counts = [int(0.3 * iterations), int(0.3 * iterations)]
    plan = zip((2.0, 1.5, 1.0), [*counts, iterations - sum(counts)], strict=True)
    passes = torch.zeros(2, len(images), dtype=torch.int64)
    best = Best(start, *[torch.zeros(0)] * 4)
    for factor, n in plan:
        if n:
            best = apgd(
                model, images, labels, eps=factor * eps, loss=loss, iterations=n, start=best.adversarial,
                class_weights=class_weights, ignore_index=ignore_index,
            )  # fmt: skip
            passes += torch.stack([best.forwards, best.backwards])
    return best._replace(forwards=passes[0], backwards=passes[1])


def apgd(
    model: nn.Module, images: Tensor, labels: Tensor, *, eps: float, loss: str, iterations: int, start: Tensor,
    class_weights: Tensor, ignore_index: int = 255,
) -> Best:  # fmt: skip
    """SEA.md, section 3."""
    n, rho = len(images), 0.75
    best = Best(
        images.clone(), torch.full((n,), torch.iinfo(torch.int64).max), labels.clone(),
        torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64),
    )  # fmt: skip
    active = torch.arange(n)

    def look(x: Tensor, step: int, *, backward: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        x = x.detach().requires_grad_(backward)
        with torch.set_grad_enabled(backward):
            terms = losses.pixel_terms(model(x), labels[active], ignore_index)
            context = losses.Context(step, iterations, class_weights)
            objective = losses.get_loss(loss)(terms, context).sum()
        gradient = torch.autograd.grad(objective, x)[0] if backward else None
        correct = terms.correct.flatten(1).sum(dim=1)
        best.forwards[active] += 1
        best.backwards[active] += backward
        for row, image in enumerate(active.tolist()):
            if correct[row] <= best.correct[image]:
                best.adversarial[image], best.correct[image] = x[row].detach(), correct[row]
                best.predictions[image] = terms.predictions[row]
        tracked = terms.ce.detach().sum(dim=-1).sum(dim=-1) / labels[0].numel()
        return tracked, correct, gradient

    x = _project(start, images, eps)
    tracked, _, gradient = look(x, 1, backward=True)
    state = {
        "x": x, "before": x.clone(), "gradient": gradient, "tracked": tracked, "best_x": x.clone(),
        "best_gradient": gradient.clone(), "best_tracked": tracked.clone(), "at_checkpoint": tracked.clone(),
        "step_size": torch.full((n, 1, 1, 1), 2 * eps), "halved": torch.ones(n, dtype=torch.bool),
        "rises": torch.zeros(n, dtype=torch.int64),
    }  # fmt: skip
    k, since = max(int(0.22 * iterations), 1), 0
    for step in range(1, iterations + 1):
        s, clean = state, images[active]
        a = 1.0 if step == 1 else 0.75
        z = _project(s["x"] + s["step_size"] * s["gradient"].sign(), clean, eps)
        new = _project(s["x"] + a * (z - s["x"]) + (1 - a) * (s["x"] - s["before"]), clean, eps)
        s["before"], s["x"] = s["x"], new
        tracked, correct, gradient = look(new, step + 1, backward=step < iterations)
        if step == iterations:
            break
        s["gradient"] = gradient
        s["rises"] += (tracked > s["tracked"]) | (step == 1)
        s["tracked"] = tracked
        for row in (tracked > s["best_tracked"]).nonzero().flatten().tolist():
            s["best_x"][row], s["best_gradient"][row] = new[row], gradient[row]
            s["best_tracked"][row] = tracked[row]
        since += 1
        if since == k:
            for row in range(len(active)):
                few = s["rises"][row] <= rho * k
                stuck = not s["halved"][row] and s["best_tracked"][row] <= s["at_checkpoint"][row]
                s["halved"][row] = bool(few or stuck)
                if s["halved"][row]:
                    s["step_size"][row] /= 2
                    s["x"][row], s["gradient"][row] = s["best_x"][row], s["best_gradient"][row]
            s["at_checkpoint"], s["rises"] = s["best_tracked"].clone(), torch.zeros_like(s["rises"])
            k, since = max(k - max(int(0.03 * iterations), 1), max(int(0.06 * iterations), 1)), 0
        keep = (correct > 0).nonzero().flatten()
        if not len(keep):
            break
        active = active[keep]
        state = {name: values[keep] for name, values in s.items()}
    return best
