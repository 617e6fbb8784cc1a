"""Golden vectors that travel with the package: what the authors' released SEA code computed on a CPU in float64.

``golden.npz`` is a part of ``tests/golden``, which says what each array is; `tests/test_selftest.py` holds it to that.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

FILE = Path(__file__).with_name("golden.npz")
IMAGES = 4
ATTACKS = ("red_mask-ce-bal_4", "red_mask-ce-avg_4", "red_js-avg_4", "const_mask-ce-bal_12")
LOSSES = {"mask-ce-bal": "mce_bal", "mask-ce-avg": "mce", "js-avg": "js"}  # by the names of the released code


@cache
def arrays() -> dict[str, Any]:
    """The arrays by name; nobody can change them."""
    with np.load(FILE) as archive:
        found = dict(archive)
    for values in found.values():
        values.flags.writeable = False
    return found


class Problem(NamedTuple):
    """The network of the golden attacks with its images (4,3,24,32), labels and class weights."""

    model: nn.Module
    images: Tensor
    labels: Tensor
    class_weights: Tensor


def problem(device: torch.device | str, dtype: torch.dtype = torch.float64) -> Problem:
    """The golden problem on a device."""
    found = arrays()
    network = nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(12, 24, 3, padding=1), nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 7, 1),
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
    )  # fmt: skip
    prefix = "param_"
    network.load_state_dict(
        {name.removeprefix(prefix): torch.tensor(found[name]) for name in found if name.startswith(prefix)}
    )
    x, weights = (torch.tensor(found[name], dtype=dtype, device=device) for name in ("x", "class_weights"))
    return Problem(network.to(device, dtype).eval(), x, torch.tensor(found["y"], device=device).long(), weights)
