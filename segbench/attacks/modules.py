"""What a model is: a module whose tensors hold numbers, and whose output is logits at the size of the images."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from segbench.errors import ModelError


def check_module(model: Any) -> None:
    """Refuses what is no module, or has tensors that hold no numbers or have no gradients; ModelError says the fix."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"A model is a torch.nn.Module, not {kind_of(model)}")
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise ModelError(
                f"{name} of the model has no shape yet, since its lazy modules have never been called. Load its "
                "weights, or call it once on an image: model(torch.zeros(1, 3, 64, 64))."
            )
        if tensor.is_meta:
            raise ModelError(
                f"{name} of the model is on the meta device, which holds no numbers. Build the model without "
                "torch.device('meta') and device_map, or call to_empty(device='cpu') and load its weights."
            )
        if tensor.is_inference():
            raise ModelError(
                f"{name} of the model was made under torch.inference_mode(), so there are no gradients through it. "
                "Build the model outside of it; torch.no_grad() is possible."
            )


def kind_of(model: Any) -> str:
    """What something is that is no module, and what to pass instead."""
    if isinstance(model, type):
        return f"the class {model.__name__}. Pass an instance: {model.__name__}(...)"
    if type(model).__name__ == "ExportedProgram":
        return "an ExportedProgram. Pass its module: program.module()"
    if isinstance(model, Mapping):
        return f"{type(model).__name__}, weights without a model. Load them: model.load_state_dict(weights)"
    if inspect.isroutine(model):
        return f"the function {getattr(model, '__name__', '')}. Wrap it as the forward of a torch.nn.Module."
    return f"{type(model).__name__}."


def check_logits(logits: Any, images: Tensor, num_classes: int | str = "K") -> Tensor:
    """The logits, if they are a tensor (N,K,H,W) at the size of the images (N,3,H,W), else ModelError."""
    if not isinstance(logits, Tensor):
        raise ModelError(
            f"The model returns {type(logits).__name__}, not a tensor of logits. "
            "Wrap it so that forward returns the logits (N,K,H,W)."
        )
    n, _, height, width = images.shape
    if logits.ndim != 4 or logits.shape[0] != n or tuple(logits.shape[2:]) != (height, width):
        raise ModelError(
            f"The model returns {tuple(logits.shape)} for images {tuple(images.shape)}; "
            f"needed are logits ({n}, {num_classes}, {height}, {width}) at image size."
        )
    return logits


WRITES = (
    "The model writes into the images that it is given, as x.sub_(mean), x[:, 0] -= mean and x.data.clamp_(0, 1) do. "
    "Make new ones: x = x - mean, x = x.clamp(0, 1), or begin forward with x = x.clone()."
)


@contextmanager
def naming_writes() -> Iterator[None]:
    """Within, ModelError instead of what autograd says of a model that writes into its images."""
    try:
        yield
    except RuntimeError as error:
        if "leaf Variable that requires grad" not in str(error):
            raise
        raise ModelError(WRITES) from error
