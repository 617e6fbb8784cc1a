"""``hf:<repo or ./folder>[@revision]``: semantic segmentation of transformers.

- Models with logits per pixel (SegFormer, UPerNet, DPT, BEiT, MobileViT, ...), and models with mask queries
  (MaskFormer, Mask2Former).
- Normalisation is that of the image processor. What the processor resizes or crops is not done: the model sees the
  image at its own size (padded where it needs it), and the logits are resized to it, bilinearly with
  align_corners=False as the library's ``post_process_semantic_segmentation`` does.
- Nothing of the repository is executed: ``trust_remote_code`` is never set, and weights are safetensors or a
  ``pytorch_model.bin`` of plain tensors.

Options: ``multiple`` (sizes that the model gets are multiples of it), ``normalize`` (``imagenet``, ``half`` or ``none``
instead of the processor's).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segbench.errors import ModelError
from segbench.models.architectures.upernet import resize
from segbench.models.normalization import NONE, Normalization
from segbench.models.sources.hub import PROCESSOR, folder_of, is_known_to_lack, weights_in
from segbench.models.sources.image_model import (
    ImageModel,
    check_options,
    log,
    normalization_option,
    require,
    whole_number,
)
from segbench.models.sources.names import LibrarySource
from segbench.models.weights import check_is_weights, read_weights

MASK_QUERIES = ("mask2former", "maskformer")
SQUARE = ("dpt",)  # the library's code takes the square root of the number of patches
# Patches of this size or more belong to plain vision transformers, which drop what does not fill a patch; others take
# images of any size.
PLAIN_PATCH = 8


class PixelLogits(nn.Module):
    """Logits per pixel at whatever resolution the library's model has them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N,3,H,W) to logits (N,K,h,w)."""
        logits: Tensor = self.network(pixel_values=x).logits
        return logits


class MaskQueries(nn.Module):
    """Logits of a model that predicts masks and a class for each.

    The score of a class at a pixel is ``s_c = sum over queries q of softmax(class_q)_c * sigmoid(mask_q)``, without the
    null class, the masks resized to image size first (Cheng et al., "Masked-attention Mask Transformer", CVPR 2022,
    and their released code; the library resizes Mask2Former's masks to 384x384 first, and MaskFormer's scores instead
    of its masks, which differs at the borders of masks). Given are ``log(s_c)``: logits whose softmax is the normalised
    score and whose order is that of the scores. Masks are scaled by the largest at each pixel before they are summed,
    so that the gradient does not vanish where all of them are nearly 0.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """Normalised images (N,3,H,W) to logits (N,K,H,W)."""
        output = self.network(pixel_values=x)
        classes = output.class_queries_logits.softmax(dim=-1)[..., :-1]
        masks = F.logsigmoid(resize(output.masks_queries_logits, x.shape[-2:]))
        largest = masks.detach().amax(dim=1, keepdim=True)
        scores = torch.einsum("nqk,nqhw->nkhw", classes, (masks - largest).exp())
        return scores.clamp_min(torch.finfo(scores.dtype).tiny).log() + largest


def build(source: LibrarySource, *, num_classes: int | None, offline: bool) -> ImageModel:
    """A model of the Hub, or of a folder that ``save_pretrained`` wrote; ModelError says what does not fit."""
    name, revision, options = source.name, source.revision, source.options
    check_options(options, ("multiple", "normalize"), library="hf")
    transformers = require("transformers")
    folder = folder_of(name, revision, offline=offline)
    config = _config(transformers, folder, name)
    network = _network(transformers, folder, config, name)
    processor = _processor(transformers, folder, name)
    if processor is None and "normalize" not in options:
        if not is_known_to_lack(folder, PROCESSOR):
            raise ModelError(
                f"Of {name} only the weights are on this machine, not how its images are normalised. While online: "
                f"hf download {name}. Or add ?normalize=imagenet (or half, or none)."
            )
        log.warning(
            "%s has no preprocessor_config.json: its images are not normalised. If it was trained with normalised "
            "ones, add ?normalize=imagenet (or half).", name,
        )  # fmt: skip
    return ImageModel(
        MaskQueries(network) if config.model_type in MASK_QUERIES else PixelLogits(network),
        normalization_option(options, _normalization(processor)),
        num_classes=int(config.num_labels),
        multiple=whole_number(options, "multiple", _multiple(config, processor)) or 1,
        square=config.model_type in SQUARE,
        bgr=bool(getattr(processor, "do_flip_channel_order", False)),
        reduced_labels=bool(getattr(processor, "do_reduce_labels", getattr(processor, "reduce_labels", False))),
    ).float()


def _config(transformers: Any, folder: Path, name: str) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # what a stranger's file breaks is not known
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"{name} needs code from its repository, which segbench never runs. Write a function that builds the "
                "model, and name it as ./file.py:function."
            ) from error
        raise ModelError(
            f"transformers {transformers.__version__} cannot read the configuration of {name}: {_first_line(error)} "
            "If the model is newer than that: pip install -U transformers"
        ) from error
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{name} is quantised, so its gradients say little. Use its float weights.")
    if getattr(config, "use_pretrained_backbone", False):
        config.use_pretrained_backbone = False  # the checkpoint has the backbone's weights
    return config


def _network(transformers: Any, folder: Path, config: Any, name: str) -> nn.Module:
    """The library's model in float32, all of its weights from the checkpoint."""
    per_pixel = transformers.AutoModelForSemanticSegmentation
    if config.model_type in MASK_QUERIES:
        factory = transformers.AutoModelForUniversalSegmentation
    elif type(config) in per_pixel._model_mapping:
        factory = per_pixel
    else:
        known = sorted({*MASK_QUERIES, *(key.model_type for key in per_pixel._model_mapping)})
        raise ModelError(
            f"{name} is a model of type {config.model_type!r}, not one for semantic segmentation that segbench can "
            f"attack: {', '.join(known)}. For another one write a function, ./file.py:function."
        )
    for file in weights_in(folder):
        check_is_weights(file)
        if file.suffix == ".bin":
            read_weights(file)  # refuses what is more than tensors
    try:
        with _silent(transformers.utils.logging):
            network, report = factory.from_pretrained(
                folder, config=config, trust_remote_code=False, local_files_only=True, weights_only=True,
                output_loading_info=True, dtype=torch.float32,
            )  # fmt: skip
    except ImportError as error:  # scipy, of models with mask queries
        raise ModelError(f"{name}: {_first_line(error)} pip install 'segbench[hub-models]'") from error
    except Exception as error:  # what a stranger's file breaks is not known
        raise ModelError(
            f"transformers {transformers.__version__} cannot load {name}: {type(error).__name__}: {_first_line(error)}"
        ) from error
    missing = sorted(key for key in report["missing_keys"] if not key.startswith("auxiliary_head"))
    if missing:
        listed = "\n  ".join(missing[:10])
        raise ModelError(
            f"The checkpoint {name} lacks {len(missing)} weights, which would be random:\n  {listed}\n"
            "Likely cause: it was not trained for segmentation. Choose a checkpoint that was."
        )
    module: nn.Module = network
    return module


@contextmanager
def _silent(logging: Any) -> Iterator[None]:
    """The library draws no bar and prints no report while it reads a local file; what matters we say ourselves."""
    enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if enabled:
            logging.enable_progress_bar()


def _processor(transformers: Any, folder: Path, name: str) -> Any:
    """The image processor, or None where the folder has none."""
    if not any((folder / file).is_file() for file in ("preprocessor_config.json", "processor_config.json")):
        return None
    try:
        return transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # what a stranger's file breaks is not known
        raise ModelError(
            f"transformers {transformers.__version__} cannot read the image processor of {name}: {_first_line(error)}"
        ) from error


def _normalization(processor: Any) -> Normalization:
    """Mean and standard deviation for images in [0,1].

    The processor computes ``(255 x * rescale_factor - mean) / std`` on images x in [0,1]; the factor is 1 if it does
    not rescale.
    """
    if processor is None or not getattr(processor, "do_normalize", False):
        mean, std = (list(values) for values in NONE)
    else:
        mean, std = _three(processor.image_mean), _three(processor.image_std)
    factor = float(processor.rescale_factor) if getattr(processor, "do_rescale", False) else 1.0
    scale = 255 * factor
    return [value / scale for value in mean], [value / scale for value in std]


def _three(values: Any) -> list[float]:
    return [float(value) for value in values] if isinstance(values, list | tuple) else [float(values)] * 3


def _multiple(config: Any, processor: Any) -> int:
    """What height and width of the model's images must be multiples of."""
    divisor = getattr(processor, "size_divisor", None) or getattr(processor, "size_divisibility", None)
    if isinstance(divisor, int) and divisor > 0:
        return divisor
    patch = getattr(getattr(config, "backbone_config", None), "patch_size", getattr(config, "patch_size", None))
    patch = patch[0] if isinstance(patch, list | tuple) and patch else patch
    return patch if isinstance(patch, int) and patch >= PLAIN_PATCH else 1


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "no reason given")
