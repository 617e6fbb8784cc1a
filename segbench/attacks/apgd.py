"""APGD for segmentation, at one radius and with progressive radius reduction, on a batch that is always full.

Source: Croce, Singh, Hein, ECCV 2024, section 4 and appendix; Croce & Hein, ICML 2020 for APGD. SEA.md, sections 3
and 4, is the exact specification, and the symbols below are its symbols.

Everything is per image: a batch is only a way to compute. Each image of an `AttackBatch` is at a place of its own in
its own list of stages, with its own radius, step size and loss; an image that is finished leaves, and another may take
its row. All decisions are made on the device, so the host need not wait for it. The functions are pure: no I/O, no
randomness, the model's parameters end as they began.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from segbench.attacks.problem import AttackResult, Evaluation, Evaluator, Part, check_arguments, frozen, project, usable

MOMENTUM = 0.75
RHO = 0.75
STAGES = ((2.0, 0.3), (1.5, 0.3), (1.0, 0.4))  # radius over ε, share of the iterations
CUDA_LAG = 2  # steps after which the host reads which images are finished: it never waits for the step it has just sent


class Stage(NamedTuple):
    """A part of an attack: ``radius`` is a multiple of ε, and so is ``fixed_step``, the step size of plain PGD."""

    radius: float
    iterations: int
    fixed_step: float | None = None


class Job(NamedTuple):
    """One image to attack.

    Attributes:
        image: (3,H,W) in [0,1].
        label: (H,W) int64 in 0..K-1 or ``ignore_index``.
        loss: a name in `segbench.attacks.losses.LOSSES`.
        eps: l_inf radius on the scale of the image.
        stages: done one after the other, each from the lowest-accuracy point of the one before.
        start: first point, projected on the first ball; None for the image itself.
        by_loss: the result is the point of the highest cross-entropy instead of the lowest accuracy, and an image
            without a correct pixel goes on, as the code published with SegPGD and CosPGD does.
    """

    image: Tensor
    label: Tensor
    loss: str
    eps: float
    stages: tuple[Stage, ...]
    start: Tensor | None = None
    by_loss: bool = False


class _Place(NamedTuple):
    """A place in a list of stages: one evaluation, the start of a stage or a step. Rows of a table, as float64.

    Attributes:
        radius: over ε.
        first: the start of a stage.
        rise: counts as a rise of the tracked loss, whatever it does: the first step of a stage.
        last: the last step of a stage, or the end of the list.
        a: weight of the step that leads to here.
        checkpoint: of the step control; 0 or 1.
        interval: steps since the checkpoint before.
        after: place of the next stage.
        step: gradient step that follows, from 1.
        iterations: of the stage.
        step_size: over ε, at the start.
        live: 0 at the end of the list.
    """

    radius: Tensor
    first: Tensor
    rise: Tensor
    last: Tensor
    a: Tensor
    checkpoint: Tensor
    interval: Tensor
    after: Tensor
    step: Tensor
    iterations: Tensor
    step_size: Tensor
    live: Tensor


def places(stages: Sequence[Stage], offset: int = 0) -> list[tuple[float, ...]]:
    """The list of places of an attack, for a table in which it begins at ``offset``; the last one is its end.

    >>> len(places([Stage(2.0, 3), Stage(1.0, 4)]))  # a start and the steps of each stage, and the end
    10
    """
    found: list[tuple[float, ...]] = []
    for radius, n, fixed_step in stages:
        after = offset + len(found) + n + 1
        interval, checkpoint = max(int(0.22 * n), 1), 0
        intervals: dict[int, int] = {}
        while fixed_step is None and (checkpoint := checkpoint + interval) < n:
            intervals[checkpoint] = interval
            interval = max(interval - max(int(0.03 * n), 1), max(int(0.06 * n), 1))
        for step in range(n + 1):
            found.append(
                (
                    radius,
                    step == 0,
                    step == 1,
                    step == n,
                    1.0 if step <= 1 or fixed_step is not None else MOMENTUM,
                    step in intervals,
                    intervals.get(step, 1),
                    after,
                    step + 1,
                    n,
                    2 * radius if fixed_step is None else fixed_step,
                    True,
                )
            )
    radius = stages[-1].radius
    found.append((radius, False, False, True, 1.0, False, 1, offset + len(found), 1, 1, 0.0, False))
    return [tuple(map(float, place)) for place in found]


class AttackBatch:
    """Images under attack, each at its own place; one `step` evaluates all of them once (SEA.md, section 3).

    Args:
        evaluate: computes losses and gradients; its model's parameters are `frozen` meanwhile.
        lag: steps after which the host learns that an image is finished; None for what the device likes.
    """

    def __init__(self, evaluate: Evaluator, *, lag: int | None = None) -> None:
        self.evaluate = evaluate
        self._lag = lag
        self._keys: list[int] = []  # of each row; a key is never used twice
        self._losses: list[str] = []  # of each row
        self._free: list[int] = []  # rows whose image has left
        self._rows: dict[str, Tensor] = {}
        self._parts: list[Part] = []
        self._table = torch.zeros(len(_Place._fields), 0, dtype=torch.float64)
        self._begins: dict[tuple[Stage, ...], int] = {}  # where a list of stages begins in the table
        self._flags: deque[tuple[list[int], Tensor, torch.cuda.Event | None]] = deque()
        self._next_key = 0

    def __len__(self) -> int:
        """Images under attack."""
        return len(self._keys) - len(self._free)

    def add(self, jobs: Sequence[Job]) -> list[int]:
        """Takes in images of one size and gives each a key."""
        rows = _stack([self._row(job) for job in jobs])
        keys = list(range(self._next_key, self._next_key + len(jobs)))
        self._next_key += len(jobs)
        reused = self._free[: len(jobs)]
        self._free = self._free[len(jobs) :]
        if reused:
            index = torch.tensor(reused, device=rows["x"].device)
            for name, values in rows.items():
                self._rows[name][index] = values[: len(reused)]
        for row, key, job in zip(reused, keys, jobs, strict=False):
            self._keys[row], self._losses[row] = key, job.loss
        if len(jobs) > len(reused):
            more = {name: values[len(reused) :] for name, values in rows.items()}
            self._rows = {n: torch.cat([self._rows[n], v]) for n, v in more.items()} if self._rows else more
            self._keys += keys[len(reused) :]
            self._losses += [job.loss for job in jobs[len(reused) :]]
        self._parts = []
        return keys

    def _row(self, job: Job) -> dict[str, Tensor]:
        device, dtype = job.image.device, job.image.dtype
        stages = tuple(stage for stage in job.stages if stage.iterations)
        if stages not in self._begins:
            self._begins[stages] = self._table.shape[1]
            table = torch.tensor(places(stages, self._begins[stages]), dtype=torch.float64).T
            self._table = torch.cat([self._table.to(device), table.to(device)], dim=1)
        x = project(job.image if job.start is None else job.start, job.image, stages[0].radius * job.eps)

        def number(value: float, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(value, dtype=dtype).to(device, non_blocking=True)

        zeros = torch.zeros_like(x)
        return {
            "place": number(self._begins[stages]),
            "eps": number(job.eps, torch.float64),
            "by_loss": number(job.by_loss, torch.bool),
            "image": job.image,
            "label": job.label,
            "x": x,
            "previous": x,
            "tracked": number(0, dtype),
            "step_size": number(0, dtype),
            "was_halved": number(1, torch.bool),
            "rises": number(0),
            "best_x": x,
            "best_gradient": zeros,
            "best_tracked": number(0, dtype),
            "tracked_at_checkpoint": number(0, dtype),
            "adversarial": job.image,
            "correct": number(0),
            "predictions": torch.zeros_like(job.label),
            "highest": number(0, torch.float64),
            "forwards": number(0),
            "backwards": number(0),
            "zero_gradients": number(0),
            "nonfinite_gradients": number(0),
        }

    def step(self) -> None:
        """One evaluation of each image, and its next point. If it raises, nothing has changed: it can be repeated."""
        self._close_gaps()
        rows = self._rows
        at = _Place(*self._table[:, rows["place"]])
        on_host = not rows["x"].is_cuda
        if not self._parts:
            self._parts = self._split_losses(rows["x"].device)
        now = self.evaluate(
            rows["x"],
            rows["label"],
            self._parts,
            at.step.view(-1, 1, 1),
            at.iterations.view(-1, 1, 1),
            backward=not on_host or not bool(at.last.all()),  # where the host would have to ask the device: always
        )
        recorded = rows | _record(rows, at, now)
        self._rows = recorded | _advance(recorded, at, self._table, now, on_host=on_host)
        self._flag()

    def _split_losses(self, device: torch.device) -> list[Part]:
        names = sorted(set(self._losses))
        if len(names) == 1:
            return [(names[0], None)]
        masks = [torch.tensor([loss == name for loss in self._losses], device=device) for name in names]
        return [(name, mask.view(-1, 1, 1)) for name, mask in zip(names, masks, strict=True)]

    def _close_gaps(self) -> None:
        if not self._free:
            return
        gaps = set(self._free)
        kept = [row for row in range(len(self._keys)) if row not in gaps]
        index = torch.tensor(kept, dtype=torch.int64, device=self._rows["x"].device)
        self._rows = {name: values[index] for name, values in self._rows.items()}
        self._keys, self._losses = [self._keys[row] for row in kept], [self._losses[row] for row in kept]
        self._free, self._parts = [], []

    def _flag(self) -> None:
        """Sends word of the images that are finished to the host, which reads it `lag` steps later."""
        over = self._table[-1][self._rows["place"]] == 0
        event = None
        if over.is_cuda:
            over = torch.empty(over.shape, dtype=torch.bool, pin_memory=True).copy_(over, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        self._flags.append((list(self._keys), over, event))

    def finished(self) -> list[tuple[int, AttackResult]]:
        """Key and result (without the dimension N) of images that are finished; they leave the batch."""
        if not self._flags:
            return []
        lag = (CUDA_LAG if self._rows["x"].is_cuda else 0) if self._lag is None else self._lag
        row_of = {key: row for row, key in enumerate(self._keys) if row not in set(self._free)}
        found = []
        while len(self._flags) > lag:
            keys, over, event = self._flags.popleft()
            if event is not None:
                event.synchronize()
            for key, is_over in zip(keys, over.tolist(), strict=True):
                if is_over and key in row_of:
                    row = row_of.pop(key)
                    found.append((key, self._result(row)))
                    self._free.append(row)
        self._free.sort()
        if not len(self):
            self._rows, self._keys, self._losses, self._free, self._parts = {}, [], [], [], []
            self._flags.clear()
        return found

    def _result(self, row: int) -> AttackResult:
        values = {name: tensor[row].clone() for name, tensor in self._rows.items() if name in _KEPT}
        valid = (self._rows["label"][row] != self.evaluate.ignore_index).sum().clamp(min=1)
        accuracy = values["correct"].double() / valid
        return AttackResult(
            values["adversarial"], accuracy, values["predictions"], values["highest"],
            *(values[name] for name in _COUNTERS),
        )  # fmt: skip


_COUNTERS = ("forwards", "backwards", "zero_gradients", "nonfinite_gradients")
_KEPT = {"adversarial", "correct", "predictions", "highest", *_COUNTERS}


def _stack(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _per_image(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1)


def _record(rows: dict[str, Tensor], at: _Place, now: Evaluation) -> dict[str, Tensor]:
    """Counts the passes, and keeps the point of each image that is no worse than its best so far."""
    first, live = at.first.bool(), at.live.bool()
    lower, higher = now.correct <= rows["correct"], now.tracked.double() > rows["highest"]
    better = live & (first | torch.where(rows["by_loss"], higher, lower))
    highest = torch.where(first, now.tracked.double(), torch.maximum(rows["highest"], now.tracked.double()))
    new = {
        "forwards": rows["forwards"] + live,
        "adversarial": torch.where(_per_image(better), rows["x"], rows["adversarial"]),
        "correct": torch.where(better, now.correct, rows["correct"]),
        "predictions": torch.where(better.view(-1, 1, 1), now.predictions, rows["predictions"]),
        "highest": torch.where(live, highest, rows["highest"]),
    }
    if now.gradient is not None:
        needed = ~at.last.bool()
        largest = now.gradient.flatten(1).abs().amax(dim=1)
        new["backwards"] = rows["backwards"] + needed
        new["zero_gradients"] = rows["zero_gradients"] + (needed & (largest == 0) & (now.correct > 0))
        new["nonfinite_gradients"] = rows["nonfinite_gradients"] + (needed & ~torch.isfinite(largest))
    return new


def _advance(
    rows: dict[str, Tensor], at: _Place, table: Tensor, now: Evaluation, *, on_host: bool
) -> dict[str, Tensor]:
    """Step control and the next point of each image; ``rows`` have recorded this evaluation."""
    x, images, tracked = rows["x"], rows["image"], now.tracked
    gradient = torch.zeros_like(x) if now.gradient is None else usable(now.gradient)
    first, checkpoint = at.first.bool(), at.checkpoint.bool()

    rises = torch.where(first, 0, rows["rises"] + ((tracked > rows["tracked"]) | at.rise.bool()))
    improved = first | (tracked > rows["best_tracked"])
    best_x = torch.where(_per_image(improved), x, rows["best_x"])
    best_gradient = torch.where(_per_image(improved), gradient, rows["best_gradient"])
    best_tracked = torch.where(improved, tracked, rows["best_tracked"])
    eps = rows["eps"]
    step_size = torch.where(first, (at.step_size * eps).to(x.dtype), rows["step_size"])
    was_halved = first | rows["was_halved"]

    point, direction = x, gradient
    if not on_host or bool(checkpoint.any()):
        stalled = ~was_halved & (best_tracked <= rows["tracked_at_checkpoint"])
        halve = checkpoint & ((rises <= RHO * at.interval) | stalled)
        step_size = torch.where(halve, step_size / 2, step_size)
        point = torch.where(_per_image(halve), best_x, x)
        direction = torch.where(_per_image(halve), best_gradient, gradient)
        was_halved = torch.where(checkpoint, halve, was_halved)
        rises = torch.where(checkpoint, 0, rises)
    renewed = first | checkpoint

    ends = at.last.bool() | (~first & (now.correct == 0) & ~rows["by_loss"])
    place = torch.where(ends, at.after.long(), rows["place"] + 1)
    then = _Place(*table[:, place])
    radius, a = _per_image((then.radius * eps).to(x.dtype)), _per_image(then.a.to(x.dtype))
    z = project(point + _per_image(step_size) * direction.sign(), images, radius)
    x = project(point + a * (z - point) + (1 - a) * (point - rows["previous"]), images, radius)
    starts = then.first.bool()
    if not on_host or bool(starts.any()):
        x = torch.where(_per_image(starts), project(rows["adversarial"], images, radius), x)
        point = torch.where(_per_image(starts), x, point)
    return {
        "place": place,
        "x": x,
        "previous": point,
        "tracked": tracked,
        "step_size": step_size,
        "was_halved": was_halved,
        "rises": rises,
        "best_x": best_x,
        "best_gradient": best_gradient,
        "best_tracked": best_tracked,
        "tracked_at_checkpoint": torch.where(renewed, best_tracked, rows["tracked_at_checkpoint"]),
    }


def apgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    loss: str,
    iterations: int,
    start: Tensor | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int = 255,
) -> AttackResult:
    """APGD at one radius: n+1 forward and n backward passes per image at most.

    Args:
        model: images (N,3,H,W) to logits (N,K,H,W); used in the mode that it is in.
        images: in [0,1], any device and float dtype.
        labels: (N,H,W) int64 in 0..K-1 or ``ignore_index``.
        eps: l_inf radius on the scale of the images, e.g. 8/255.
        loss: a name in `segbench.attacks.losses.LOSSES`.
        iterations: number of steps n >= 1.
        start: first point, projected on the ball; None for the images themselves.
        class_weights: (K,), needed by ``mce_bal``.
        ignore_index: label of pixels that do not count.

    Raises:
        UsageError: an argument is out of range.
    """
    check_arguments(images, labels, eps=eps, loss=loss, iterations=iterations, start=start)
    return attack(model, images, labels, eps, loss, (Stage(1.0, iterations),), start, class_weights, ignore_index)


def red_eps_apgd(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    loss: str,
    iterations: int,
    start: Tensor | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int = 255,
) -> AttackResult:
    """APGD at 2ε, 1.5ε and ε in turn, each stage from the lowest-accuracy point of the one before (SEA.md, section 4).

    Arguments and errors as in `apgd`; n iterations are split as int(0.3n), int(0.3n) and the rest, and only points of
    the last stage count. At most n + 3 forward passes per image.
    """
    check_arguments(images, labels, eps=eps, loss=loss, iterations=iterations, start=start)
    return attack(model, images, labels, eps, loss, reduced(iterations), start, class_weights, ignore_index)


def reduced(iterations: int) -> tuple[Stage, ...]:
    """The stages of progressive radius reduction.

    >>> [(stage.radius, stage.iterations) for stage in reduced(300)]
    [(2.0, 90), (1.5, 90), (1.0, 120)]
    """
    early = [Stage(factor, int(share * iterations)) for factor, share in STAGES[:-1]]
    return (*early, Stage(STAGES[-1][0], iterations - sum(stage.iterations for stage in early)))


def attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    eps: float,
    loss: str,
    stages: tuple[Stage, ...],
    start: Tensor | None,
    class_weights: Tensor | None,
    ignore_index: int,
) -> AttackResult:
    """All images together through the stages."""
    if class_weights is not None:
        class_weights = class_weights.to(images.device)
    batch = AttackBatch(Evaluator(model, class_weights=class_weights, ignore_index=ignore_index))
    found: dict[int, AttackResult] = {}
    if len(images):
        starts = [None] * len(images) if start is None else list(start)
        with frozen(model):
            batch.add([Job(x, y, loss, eps, stages, s) for x, y, s in zip(images, labels, starts, strict=True)])
            while len(batch):
                batch.step()
                found |= dict(batch.finished())
    if not found:
        return _nothing(images, labels)
    return AttackResult(*(torch.stack(values) for values in zip(*(found[k] for k in sorted(found)), strict=True)))


def _nothing(images: Tensor, labels: Tensor) -> AttackResult:
    """The result of an attack on no image."""
    numbers, counters = images.new_zeros(0, dtype=torch.float64), labels.new_zeros(0)
    return AttackResult(images, numbers, labels, numbers, *([counters] * 4))
