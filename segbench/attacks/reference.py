"""SEA's attack on one image as one plain loop: the paper to read beside the code.

Sources: Croce, Singh, Hein, "Towards Reliable Evaluation and Fast Training of Robust Semantic Segmentation Models",
ECCV 2024, section 4 (radius reduction, which point is returned) and appendix; Croce & Hein, "Reliable Evaluation of
Adversarial Robustness with an Ensemble of Diverse Parameter-free Attacks", ICML 2020, Algorithm 1 (APGD). Numbers in
brackets are the items of SEA.md, section 3. `segbench.attacks.apgd` computes the same, bit for bit, in
batches; of its code only the losses are used here.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from segbench.attacks.losses import Time, get_loss
from segbench.attacks.modules import check_logits, naming_writes
from segbench.attacks.problem import COUNTERS, AttackResult, check_arguments, frozen
from segbench.attacks.terms import logit_gradient, pixel_terms, prepare_targets

ALPHA = 0.75  # momentum
RHO = 0.75  # share of the steps between two checkpoints that must raise the tracked loss


def red_eps_apgd(
    model: nn.Module, image: Tensor, label: Tensor, *, eps: float, loss: str, iterations: int,
    start: Tensor | None = None, class_weights: Tensor | None = None, ignore_index: int = 255,
) -> AttackResult:  # fmt: skip
    """APGD at 2ε, 1.5ε and ε in turn (ECCV 2024, section 4): 30%, 30% and the rest of the iterations.

    Arguments, result and errors as in `apgd`; the passes of all stages are counted.
    """
    _check(image, label, eps, loss, iterations, start)
    early = int(0.3 * iterations)
    counters, x = torch.zeros(len(COUNTERS), dtype=torch.int64), image if start is None else start
    for factor, n in ((2.0, early), (1.5, early), (1.0, iterations - 2 * early)):
        if n:
            result = _apgd(model, image, label, factor * eps, loss, n, x, class_weights, ignore_index)
            x = result.adversarial  # the lowest-accuracy point, which the next stage projects on its smaller ball
            counters += torch.stack([getattr(result, name) for name in COUNTERS])
    return result._replace(**dict(zip(COUNTERS, counters, strict=True)))


def apgd(
    model: nn.Module, image: Tensor, label: Tensor, *, eps: float, loss: str, iterations: int,
    start: Tensor | None = None, class_weights: Tensor | None = None, ignore_index: int = 255,
) -> AttackResult:  # fmt: skip
    """APGD at one radius: n+1 forward and n backward passes at most.

    Args:
        model: images (N,3,H,W) to logits (N,K,H,W); used in the mode that it is in.
        image: (3,H,W) in [0,1].
        label: (H,W) int64 in 0..K-1 or ``ignore_index``.
        eps: l_inf radius on the scale of the image, e.g. 8/255.
        loss: a name in `segbench.attacks.losses.LOSSES` that maximises the error (none that aims at a target).
        iterations: number of steps n >= 1.
        start: (3,H,W), projected on the ball; None for the image itself.
        class_weights: (K,), needed by ``mce_bal``.
        ignore_index: label of pixels that do not count.

    Returns:
        As `segbench.attacks.apgd`, without the dimension N.

    Raises:
        UsageError: an argument is out of range.
    """
    _check(image, label, eps, loss, iterations, start)
    x = image if start is None else start
    return _apgd(model, image, label, eps, loss, iterations, x, class_weights, ignore_index)


def _check(image: Tensor, label: Tensor, eps: float, loss: str, iterations: int, start: Tensor | None) -> None:
    starts = None if start is None else start[None]
    check_arguments(image[None], label[None], eps=eps, loss=loss, iterations=iterations, start=starts)


def _apgd(
    model: nn.Module, image: Tensor, label: Tensor, eps: float, loss: str, n: int, start: Tensor,
    class_weights: Tensor | None, ignore_index: int,
) -> AttackResult:  # fmt: skip
    targets = prepare_targets(label[None], ignore_index=ignore_index, class_weights=class_weights)
    valid = targets.valid.sum().clamp(min=1)
    forwards = backwards = zero_gradients = nonfinite_gradients = 0

    def P(x: Tensor) -> Tensor:  # noqa: N802 - the paper's name of the projection
        """On the l_inf ball around the image, then on [0,1]."""
        return torch.minimum(torch.maximum(x, image - eps), image + eps).clamp(0, 1)

    def evaluate(x: Tensor, t: int) -> tuple[Tensor, Tensor, int, Tensor]:
        """Gradient of the attacked loss, tracked loss (plain cross-entropy), correct pixels, predictions."""
        nonlocal forwards, backwards, zero_gradients, nonfinite_gradients
        forwards += 1
        with frozen(model), torch.set_grad_enabled(t <= n), naming_writes():
            x = x[None].detach().clone().requires_grad_(t <= n)
            logits = check_logits(model(x), x)
            terms = pixel_terms(logits.detach(), targets)
            slope = get_loss(loss).slope(terms, Time(t, n))
            direction = logit_gradient(terms, slope).to(logits.dtype)
            g = torch.autograd.grad(logits, x, direction)[0][0] if t <= n else torch.zeros_like(x[0])
        correct = int(terms.correct.sum())
        if t <= n:
            backwards += 1
            zero_gradients += bool((g == 0).all()) and correct > 0
            nonfinite_gradients += not bool(torch.isfinite(g).all())
        tracked = terms.ce[0].sum(dim=-1).sum(dim=-1) / label.numel()
        return torch.where(torch.isfinite(g), g, 0), tracked, correct, terms.predictions[0]

    x = x_previous = P(start)  # (1)
    g, tracked, correct, predictions = evaluate(x, 1)
    adversarial, lowest, predicted = x, correct, predictions
    best_x, best_g, best_tracked, tracked_at_checkpoint = x, g, tracked, tracked
    eta, was_halved, rises = 2 * eps, True, 0
    k, since = max(int(0.22 * n), 1), 0  # steps between two checkpoints, and since the last one

    for t in range(1, n + 1):
        # (2) A step along the sign of the gradient, then momentum.
        a = 1.0 if t == 1 else ALPHA
        z = P(x + eta * g.sign())
        x_previous, x = x, P(x + a * (z - x) + (1 - a) * (x - x_previous))
        tracked_before = tracked
        g, tracked, correct, predictions = evaluate(x, t + 1)

        # (4) The result is the visited point with the lowest accuracy, the latest of equals.
        if correct <= lowest:
            adversarial, lowest, predicted = x, correct, predictions

        # (3) Step control, by the tracked loss.
        rises += t == 1 or bool(tracked > tracked_before)
        if tracked > best_tracked:
            best_x, best_g, best_tracked = x, g, tracked
        since += 1
        if since == k and t < n:
            stalled = not was_halved and bool(best_tracked <= tracked_at_checkpoint)
            was_halved = rises <= RHO * k or stalled
            if was_halved:
                eta, x, g = eta / 2, best_x, best_g
            tracked_at_checkpoint, rises = best_tracked, 0
            k, since = max(k - max(int(0.03 * n), 1), max(int(0.06 * n), 1)), 0

        # (5) An image without a correct pixel is finished.
        if correct == 0:
            break

    return AttackResult(
        adversarial, torch.tensor(lowest).double() / valid.cpu(), predicted, best_tracked.double(),
        *map(torch.tensor, (forwards, backwards, zero_gradients, nonfinite_gradients)),
    )  # fmt: skip
