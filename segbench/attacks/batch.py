"""APGD on a batch that is always full: images under attack, each at its own row of its own schedule.

Source: Croce, Singh, Hein, ECCV 2024, section 4 and appendix; Croce & Hein, ICML 2020 for APGD.
`segbench.attacks.reference` is the same for one image, as one plain loop: read that first.

Everything is per image: a batch is only a way to compute. Each image has its own radius, step size and loss; an image
that is finished leaves, and another may take its row. On a GPU all decisions are made there, so the host
need not wait for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from segbench.attacks.control import decide, move
from segbench.attacks.evaluator import Evaluator, MaskedLoss, Part
from segbench.attacks.problem import COUNTERS, AttackResult, ball
from segbench.attacks.stages import ScheduleRow, Stage, schedule
from segbench.attacks.standardise import Standardised

CUDA_LAG = 2  # steps after which the host reads which images are finished: it never waits for the step it has just sent


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
        largest_margin: m of the standardised logits that the loss sees (`segbench.attacks.standardise`); None for the
            logits themselves.
    """

    image: Tensor
    label: Tensor
    loss: str
    eps: float
    stages: tuple[Stage, ...]
    start: Tensor | None = None
    by_loss: bool = False
    largest_margin: float | None = None


class AttackBatch:
    """Images under attack, each at its own row of the schedule; one `step` evaluates all of them once.

    Args:
        evaluator: computes losses and gradients; its model's parameters are `frozen` meanwhile.
        lag: steps after which the host learns that an image is finished; None for what the device likes.
    """

    def __init__(self, evaluator: Evaluator, *, lag: int | None = None) -> None:
        self.evaluator = evaluator
        self._lag = lag
        self._keys: list[int] = []  # of each row; a key is never used twice
        self._jobs: list[Job] = []  # of each row, without its tensors
        self._free: list[int] = []  # rows whose image has left
        self._rows: dict[str, Tensor] = {}
        self._parts: list[Part] = []
        self._parts_size: int | None = None  # of the evaluator when they were made
        self._table = torch.zeros(len(ScheduleRow._fields), 0, dtype=torch.float64)
        self._begins: dict[tuple[Stage, ...], int] = {}  # where a schedule begins in the table
        self._flags: deque[tuple[list[int], Tensor, torch.cuda.Event | None]] = deque()
        self._next_key = 0

    def __len__(self) -> int:
        """Images under attack."""
        return len(self._keys) - len(self._free)

    def add(self, jobs: Sequence[Job]) -> list[int]:
        """Takes in images of one size and gives each a key. If it raises, nothing has changed."""
        if not jobs:
            return []
        rows = _stack([self._row(job) for job in jobs])
        keys = list(range(self._next_key, self._next_key + len(jobs)))
        reused = self._free[: len(jobs)]
        grown = self._rows
        if len(jobs) > len(reused):  # all that takes memory comes first
            more = {name: values[len(reused) :] for name, values in rows.items()}
            grown = {name: torch.cat([grown[name], values]) for name, values in more.items()} if grown else more
        if reused:
            index = torch.tensor(reused, device=rows["x"].device)
            for name, values in rows.items():
                grown[name][index] = values[: len(reused)]
        for row, key, job in zip(reused, keys, jobs, strict=False):
            self._keys[row], self._jobs[row] = key, _without_tensors(job)
        self._rows = grown
        self._free = self._free[len(jobs) :]
        self._next_key += len(jobs)
        self._keys += keys[len(reused) :]
        self._jobs += [_without_tensors(job) for job in jobs[len(reused) :]]
        self._parts = []
        return keys

    def _row(self, job: Job) -> dict[str, Tensor]:
        device = job.image.device
        stages = tuple(stage for stage in job.stages if stage.iterations)
        if stages not in self._begins:
            begin = self._table.shape[1]
            table = torch.tensor(schedule(stages, begin), dtype=torch.float64).T
            self._table = torch.cat([self._table.to(device), table.to(device)], dim=1)
            self._begins[stages] = begin  # last: memory may run out above
        lowest, highest = ball(job.image, stages[0].radius * job.eps)
        x = torch.clamp(job.image if job.start is None else job.start, lowest, highest)

        def number(value: float, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(value, dtype=dtype).to(device, non_blocking=True)

        zeros = torch.zeros_like(x)
        return {
            "at": number(self._begins[stages]),
            "eps": number(job.eps, torch.float64),
            "by_loss": number(job.by_loss, torch.bool),
            "image": job.image,
            "lowest": lowest,
            "highest": highest,
            "label": job.label,
            "x": x,
            "previous": x,
            "tracked": number(0, torch.float64),
            "step_size": number(0, torch.float64),
            "was_halved": number(1, torch.bool),
            "rises": number(0),
            "best_x": x,
            "direction": zeros,
            "best_direction": zeros,
            "best_tracked": number(0, torch.float64),
            "tracked_at_checkpoint": number(0, torch.float64),
            "adversarial": job.image,
            "correct": number(0),
            "predictions": torch.zeros_like(job.label),
            "best_loss": number(0, torch.float64),
            **{name: number(0) for name in COUNTERS},
        }

    def step(self) -> None:
        """One evaluation of each image, and its next point. If it raises, nothing has changed: it can be repeated."""
        self._close_gaps()
        rows = self._rows
        at = ScheduleRow(*self._table[:, rows["at"]])
        on_host = not rows["x"].is_cuda
        if not self._parts or self._parts_size != self.evaluator.size:
            self._parts, self._parts_size = [], self.evaluator.size  # the old ones first, with what they hold
            self._parts = self.evaluator.parts(
                rows["label"], self._masked_losses(rows["x"].device), self._standardised(rows["x"].device)
            )
        now = self.evaluator(
            rows["x"],
            self._parts,
            at.step.view(-1, 1, 1),
            at.iterations.view(-1, 1, 1),
            backward=not on_host or not bool(at.last.all()),  # where the host would have to ask the device: always
        )
        numbers, change = decide(rows, at, self._table, now)
        self._rows = rows | numbers | move(rows, change, now)
        self._flag()

    def _masked_losses(self, device: torch.device) -> list[MaskedLoss]:
        names = sorted({job.loss for job in self._jobs})
        if len(names) == 1:
            return [(names[0], None)]
        masks = [torch.tensor([job.loss == name for job in self._jobs], device=device) for name in names]
        return [(name, mask.view(-1, 1, 1)) for name, mask in zip(names, masks, strict=True)]

    def _standardised(self, device: torch.device) -> Standardised | None:
        rows = tuple(row for row, job in enumerate(self._jobs) if job.largest_margin is not None)
        if not rows:
            return None
        margins = torch.tensor([job.largest_margin or 1.0 for job in self._jobs], dtype=torch.float64, device=device)
        return Standardised(margins.view(-1, 1, 1, 1), rows)

    def _close_gaps(self) -> None:
        if not self._free:
            return
        gaps = set(self._free)
        kept = [row for row in range(len(self._keys)) if row not in gaps]
        index = torch.tensor(kept, dtype=torch.int64, device=self._rows["x"].device)
        self._rows = {name: values[index] for name, values in self._rows.items()}
        self._keys, self._jobs = [self._keys[row] for row in kept], [self._jobs[row] for row in kept]
        self._free, self._parts = [], []

    def _flag(self) -> None:
        """Sends word of the images that are finished to the host, which reads it `lag` steps later."""
        over, event = to_host(self._table[-1][self._rows["at"]] == 0)
        self._flags.append((list(self._keys), over, event))

    def run(self, before: Callable[[int], None] = lambda _: None) -> dict[int, AttackResult]:
        """Steps until all images have left; ``before`` is called with their number before each step."""
        found: dict[int, AttackResult] = {}
        while len(self):
            before(len(self))
            self.step()
            found |= dict(self.finished())
        return found

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
            self._rows, self._keys, self._jobs, self._free, self._parts = {}, [], [], [], []
            self._flags.clear()
        return found

    def _result(self, row: int) -> AttackResult:
        values = {name: tensor[row].clone() for name, tensor in self._rows.items() if name in _KEPT}
        valid = (self._rows["label"][row] != self.evaluator.ignore_index).sum().clamp(min=1)
        accuracy = values["correct"].double() / valid
        return AttackResult(
            values["adversarial"], accuracy, values["predictions"], values["best_loss"],
            *(values[name] for name in COUNTERS),
        )  # fmt: skip


def to_host(flags: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Flags on the host, and from CUDA an event: they have arrived when it has been reached.

    The copy is sent by the current stream of the flags' device, which need not be the current device, so the event is
    recorded there.
    """
    if not flags.is_cuda:
        return flags, None
    host = torch.empty(flags.shape, dtype=torch.bool, pin_memory=True).copy_(flags, non_blocking=True)
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(flags.device))
    return host, event


_KEPT = {"adversarial", "correct", "predictions", "best_loss", *COUNTERS}


def _without_tensors(job: Job) -> Job:
    nothing = torch.empty(0)
    return job._replace(image=nothing, label=nothing, start=None)


def _stack(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
