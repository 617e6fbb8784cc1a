"""What continuous batching gains, on models that fall and on models that do not.

    python benchmarks/continuous_batching.py --out benchmarks/results/continuous_batching_cpu.json      # six minutes

The same images under the same attacks, once in groups (a batch is full at the start, and the next one begins when its
last image is finished), once continuously (a finished image makes room for the next one). Only an image whose accuracy
has reached 0 is finished early. Both ways give the same adversarial images, bit for bit on a CPU, which is checked.

The models of the zoo seldom fall to 0 on these scenes. So there are two made-up cases as well: two classes, the
brightness of each pixel above or below 1/2, on noise that is 1/255 to 6/255 away from it, so that a radius of 8/255
turns every pixel; in the second one every other image is 24/255 away, and does not fall.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import common
import numpy as np
import torch
from torch import Tensor, nn

import segbench
from segbench.attacks import AttackResult
from segbench.attacks.batch import AttackBatch, Job
from segbench.attacks.problem import frozen
from segbench.data import SegmentationDataset
from segbench.engine.compute.worker import Worker
from segbench.engine.rundir.plan import Unit
from segbench.models.float32 import exact_float32
from segbench.protocol import SEA_V1

FRAGILE, ROBUST = "clean_convnext_mini_shapes", "pirat_convnext_mini_shapes"
ALL_FALL, HALF_FALL = "made up, all fall", "made up, every other falls"
# model and ε
CASES = [(ROBUST, 8.0), (FRAGILE, 8.0), (FRAGILE, 32.0), (FRAGILE, 64.0), (ALL_FALL, 8.0), (HALF_FALL, 8.0)]
TARGET = 0.2
WAYS = ("groups", "continuous")


class Brightness(nn.Module):
    """Two classes by the brightness of a pixel; a mini ConvNeXt beside it, for the time that a model takes."""

    def __init__(self) -> None:
        super().__init__()
        self.beside, _ = common.random_model("convnext_mini", torch.device("cpu"), (64, 64))

    def forward(self, images: Tensor) -> Tensor:
        above = images.mean(dim=1, keepdim=True) - 0.5
        return 100 * torch.cat([above, -above], dim=1) + 0 * self.beside(images)[:, :2]


def made_up(shapes: SegmentationDataset, *, half: bool) -> SegmentationDataset:
    """Noise around 1/2 in place of the scenes."""

    def read(image_id: str) -> Any:
        rng = np.random.default_rng(int(image_id))
        far = half and int(image_id) % 2
        labels = rng.integers(0, 2, (64, 64)).astype(np.uint8)
        distance = np.full((64, 64), 24) if far else rng.integers(1, 7, (64, 64))
        brightness = np.where(labels == 0, 127.5 + distance, 127.5 - distance).round()
        return np.repeat(brightness[..., None], 3, axis=2).astype(np.uint8), labels

    return replace(
        shapes, read=read, class_names=("above", "below"), count_weights=lambda: (np.array([0.5, 0.5]), "made up")
    )


def cases(device: torch.device, limit: int | None) -> Iterator[tuple[str, float, nn.Module, SegmentationDataset]]:
    """Name, ε, model and data."""
    data = segbench.load_dataset("shapes").first(limit)
    for name, eps in CASES:
        if name in (ALL_FALL, HALF_FALL):
            yield name, eps, Brightness().eval().to(device), made_up(data, half=name == HALF_FALL)
        else:
            yield name, eps, segbench.load_model(name, device=str(device)), data


def attack(worker: Worker, jobs: list[Job], side: int, *, continuous: bool) -> tuple[list[AttackResult], int]:
    """The results in order, and the number of passes of the model."""
    batch, size, passes = AttackBatch(worker.evaluator(side, side)), worker.images_at_once(side, side), 0
    waiting, found = deque(enumerate(jobs)), dict[int, AttackResult]()
    keys = dict[int, int]()
    while waiting or len(batch):
        room = size - len(batch) if continuous or not len(batch) else 0
        if waiting and room:
            taken = [waiting.popleft() for _ in range(min(room, len(waiting)))]
            keys |= dict(zip(batch.add([job for _, job in taken]), (number for number, _ in taken), strict=True))
        batch.step()
        passes += 1
        found |= {keys[key]: result for key, result in batch.finished()}
    return [found[number] for number in range(len(jobs))], passes


def measure(name: str, eps: float, model: nn.Module, data: SegmentationDataset, options: Any) -> dict[str, Any]:
    """Both ways on all images and losses."""
    protocol = replace(SEA_V1, iterations=options.iterations)
    worker = Worker(model, data, protocol, options.device, options.batch_size)
    samples = list(data)
    side = samples[0].image.shape[-1]
    jobs = [worker.job(Unit(eps, loss, 0, (s.image_id,)), s) for loss in protocol.losses for s in samples]
    with exact_float32(), frozen(model):
        attack(worker, [job._replace(stages=job.stages[-1:]) for job in jobs[:1]], side, continuous=True)  # warm
        results, passes, seconds = {}, {}, {way: list[float]() for way in WAYS}
        for number in range(options.rounds):
            for way in WAYS if number % 2 == 0 else WAYS[::-1]:
                common.progress(f"{name} at {eps:g}/255, {way}, round {number + 1} of {options.rounds}")

                def run(way: str = way) -> None:
                    results[way], passes[way] = attack(worker, jobs, side, continuous=way == "continuous")

                seconds[way].append(common.timed(run, options.device))
    for one, other in zip(results["groups"], results["continuous"], strict=True):
        if options.device.type == "cpu" and not torch.equal(one.adversarial, other.adversarial):
            raise SystemExit("The two ways differ.")
    accuracy = torch.stack([result.accuracy for result in results["continuous"]])
    useful = sum(int(result.forwards) for result in results["continuous"])
    size = worker.images_at_once(side, side)
    return {
        "model": name,
        "eps_255": eps,
        "aacc_percent": round(100 * float(accuracy.mean()), 2),
        "images_at_0": int((accuracy == 0).sum()),
        "attacks": len(jobs),
        "image_passes_needed": useful,
        "image_passes": {way: passes[way] * size for way in passes},
        "seconds": {way: common.spread(values, 2) for way, values in seconds.items()},
        "gain": common.spread([one / other for one, other in zip(*seconds.values(), strict=True)]),
    }


def main() -> None:
    parser = common.arguments(__doc__)
    parser.add_argument("--limit", type=int, help="only the first images of shapes")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--batch-size", type=int, help="on a GPU")
    options = parser.parse_args()
    rows = [measure(*case, options) for case in cases(options.device, options.limit)]
    robust = rows[0]["seconds"]["continuous"]["median"]
    for row in rows:
        row["cost_of_robust"] = round(row["seconds"]["continuous"]["median"] / robust, 3)
    report = common.machine(options.device) | {"iterations": options.iterations, "target": TARGET, "rows": rows}
    report["met"] = next(row for row in rows if row["model"] == FRAGILE)["cost_of_robust"] <= TARGET
    common.print_table(
        ["model", ">ε", ">aAcc", ">images at 0", ">passes in groups", ">continuous", ">gain", ">cost / robust at 8"],
        [
            [
                row["model"], f"{row['eps_255']:g}/255", row["aacc_percent"], f"{row['images_at_0']}/{row['attacks']}",
                *(row["image_passes"][way] for way in WAYS), row["gain"]["median"], row["cost_of_robust"],
            ]
            for row in rows
        ],
    )  # fmt: skip
    print(f"Target: the clean model at 8/255 costs at most {TARGET} of the robust one; met: {report['met']}")
    common.write(report, options.out)


if __name__ == "__main__":
    main()
