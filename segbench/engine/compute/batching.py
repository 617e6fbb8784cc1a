"""How many images the model sees at once on a CPU: a fixed number (`batch_size` is for GPUs).

On a CPU the kernels' rounding depends on the shape of the batch, and a sign attack turns a different last bit into a
different image. So there the model always sees batches of one size, chosen from the image's size alone; short ones
are filled up with black images. This makes results independent of batch size, order and neighbours.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PIXELS_PER_BATCH = 65536
LARGEST_BATCH = 16
SMALLEST_BATCH = 2  # for images within PIXELS_PER_BATCH


def small_on_cpu(device: torch.device, height: int, width: int) -> bool:
    """Whether images of this size are too small to keep several cores busy one by one.

    Such units run side by side, one core each, which is faster and makes results independent of the number of cores.
    """
    return device.type == "cpu" and height * width <= PIXELS_PER_BATCH


def cpu_batch(height: int, width: int) -> int:
    """Images in a CPU batch: as many as have 65536 pixels together, at least 2 and at most 16; 1 if one has more.

    Chosen by benchmarks/cpu_batch.py, in CPU seconds per image. Two images at 240x180 over one at a time: 1.08 times as
    fast on LRASPP, 1.20 on a mini ConvNeXt, 0.96 on ConvNeXt-T; at 256x256, 1.04 and 1.17, and ConvNeXt-T was not
    measured. Four are slower than two there on LRASPP. At 473x473 two are 0.87, 1.17 and 0.90 times as fast as one, on
    the three in that order. The size is fixed, not measured on the machine that runs, because results depend on it.

    >>> cpu_batch(64, 64), cpu_batch(128, 128), cpu_batch(180, 240), cpu_batch(256, 256), cpu_batch(473, 473)
    (16, 4, 2, 2, 1)
    """
    pixels = height * width
    if pixels > PIXELS_PER_BATCH:
        return 1
    return max(SMALLEST_BATCH, min(LARGEST_BATCH, PIXELS_PER_BATCH // pixels))


def in_fixed_batches(model: nn.Module, images: Tensor) -> Tensor:
    """Images (N,3,H,W) to logits (N,K,H,W), in batches of `cpu_batch` images, the last one filled up with black."""
    size = cpu_batch(*images.shape[-2:])
    outputs = []
    for part in torch.split(images, size):
        missing = size - len(part)
        filled = torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part
        outputs.append(model(filled)[: len(part)])
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]
