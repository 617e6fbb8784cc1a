"""How many images fit on a GPU: found by growing until memory is short, and remembered."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch

from segbench.attacks.batch import AttackBatch
from segbench.data import cache
from segbench.engine.compute.worker import Worker, device_name
from segbench.engine.rundir.plan import Unit
from segbench.models.contract import structure
from segbench.models.devices import is_out_of_memory

LARGEST = 256  # images; more of them make no GPU busier
SHARE = 0.9  # of the device's memory that may be used: other programs, fragments
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

    Remembered for each (model, size, device, memory, precision, compiled, torch).
    """
    key = cache.key_of(
        structure(worker.model), list(worker.dataset[0].image.shape), device_name(worker.device),
        _memory(worker.device), worker.precision, worker.compiled, torch.__version__,
    )  # fmt: skip
    known = (cache.recall(KIND, key) or {}).get("images")
    if isinstance(known, int) and 1 <= known <= LARGEST:
        return known
    size = largest_fitting(lambda size: fits(worker, size))
    cache.remember(KIND, key, {"images": size, "device": device_name(worker.device)})
    logging.getLogger("segbench").info("Batches of %d images fit on %s.", size, device_name(worker.device))
    return size


def fits(worker: Worker, size: int) -> bool:
    """Whether two steps of an attack on ``size`` images stay within the memory."""
    on_cuda = worker.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(worker.device)
    try:
        _attack(worker, size)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        room = False
    else:
        room = not on_cuda or torch.cuda.max_memory_allocated(worker.device) <= SHARE * _memory(worker.device)
    if on_cuda:
        torch.cuda.empty_cache()
    return room


def _attack(worker: Worker, size: int) -> None:
    sample = worker.dataset[0]
    evaluator = worker.evaluator(*sample.image.shape[-2:])
    evaluator.size = size
    batch = AttackBatch(evaluator)
    unit = Unit(1.0, worker.protocol.losses[0], 0, (sample.image_id,))
    batch.add([worker.job(unit, sample)] * size)
    for _ in range(2):
        batch.step()


def _memory(device: torch.device) -> int:
    """Bytes that the device has in all; 0 where that is not known."""
    return int(torch.cuda.get_device_properties(device).total_memory) if device.type == "cuda" else 0
