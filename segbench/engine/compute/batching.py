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


def small_on_cpu(device: torch.device, height: int, width: int) -> bool:
    """Whether images of this size are too small to keep several cores busy one by one.

    Such units run side by side, one core each, which is faster and makes results independent of the number of cores.
    """
    return device.type == "cpu" and height * width <= PIXELS_PER_BATCH


def cpu_batch(height: int, width: int) -> int:
    """Images in a CPU batch: 16 at 64x64, 4 at 128x128, 1 from 182x182 on, where a batch gains nothing.

    >>> cpu_batch(64, 64), cpu_batch(180, 240)
    (16, 1)
    """
    return max(1, min(LARGEST_BATCH, PIXELS_PER_BATCH // (height * width)))


def in_fixed_batches(model: nn.Module, images: Tensor) -> Tensor:
    """Images (N,3,H,W) to logits (N,K,H,W), in batches of `cpu_batch` images, the last one filled up with black."""
    size = cpu_batch(*images.shape[-2:])
    outputs = []
    for part in torch.split(images, size):
        missing = size - len(part)
        filled = torch.cat([part, part.new_zeros(missing, *part.shape[1:])]) if missing else part
        outputs.append(model(filled)[: len(part)])
    return torch.cat(outputs) if len(outputs) > 1 else outputs[0]
