"""How many images fit on a GPU: found by growing until memory is short, and remembered."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from segbench.attacks.batch import AttackBatch
from segbench.attacks.memory import is_out_of_memory
from segbench.data import cache
from segbench.engine.compute.worker import Worker, device_name
from segbench.engine.rundir.plan import Unit
from segbench.models.contract import structure

LARGEST = 256  # images; more of them make no GPU busier
SHARE = 0.9  # of the free memory that may be used: other programs, fragments
SAME = 0.05  # difference of free memory that is not another state of the device
KIND = "batch-size"


def largest_fitting(fits: Callable[[int], bool], largest: int = LARGEST) -> int:
    """The largest of 1, 2, 3, 4, 6, 8, 12, 16, ... that fits; 1 if none does.

    >>> largest_fitting(lambda size: size <= 13), largest_fitting(lambda size: False)
    (12, 1)
    """
    size = 1
    while 2 * size <= largest and fits(2 * size):
        size *= 2
    between = size + size // 2
    return between if size < between <= largest and fits(between) else size


def choose_batch_size(worker: Worker) -> None:
    """On a GPU, unless the user chose: as many images at once as its memory holds; in a session."""
    if worker.device.type == "cuda" and worker.batch_size is None:
        worker.batch_size = find_batch_size(worker)


def find_batch_size(worker: Worker) -> int:
    """Images of the size of the first one that can be attacked at once on the worker's device.

    Remembered for each (model, size, device, precision, compiled, torch), with the memory that was free: where it is
    more or less now, because other programs use the device or no longer do, it is found again.
    """
    key = cache.key_of(
        structure(worker.model), list(worker.dataset[0].image.shape), device_name(worker.device), worker.precision,
        worker.compiled, torch.__version__,
    )  # fmt: skip
    free = free_memory(worker.device)
    if known := _recall(key, free):
        return known
    size = largest_fitting(lambda size: fits(worker, size))
    cache.remember(KIND, key, {"images": size, "device": device_name(worker.device), "free_bytes": free})
    logging.getLogger("segbench").info("Batches of %d images fit on %s.", size, device_name(worker.device))
    return size


def _recall(key: str, free: int) -> int | None:
    known = cache.recall(KIND, key) or {}
    images, free_then = known.get("images"), known.get("free_bytes")
    if not isinstance(images, int) or not isinstance(free_then, int) or not 1 <= images <= LARGEST:
        return None
    return images if abs(free - free_then) <= SAME * free_then else None


def fits(worker: Worker, size: int) -> bool:
    """Whether two steps of an attack on ``size`` images stay within the memory that is free."""
    on_cuda = worker.device.type == "cuda"
    room = SHARE * free_memory(worker.device)
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(worker.device)
    try:
        _attack(worker, size)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        enough = False
    else:
        enough = not on_cuda or torch.cuda.max_memory_allocated(worker.device) <= room
    if on_cuda:
        torch.cuda.empty_cache()
    return enough


def _attack(worker: Worker, size: int) -> None:
    sample = worker.dataset[0]
    evaluator = worker.evaluator(*sample.image.shape[-2:])
    evaluator.size = size
    batch = AttackBatch(evaluator)
    unit = Unit(1.0, worker.protocol.losses[0], 0, (sample.image_id,))
    batch.add([worker.job(unit, sample)] * size)
    for _ in range(2):
        batch.step()


def free_memory(device: torch.device) -> int:
    """Bytes of a GPU that this process has or could have; 0 for other devices."""
    if device.type != "cuda":
        return 0
    free, _ = torch.cuda.mem_get_info(device)
    return int(free + torch.cuda.memory_reserved(device))
