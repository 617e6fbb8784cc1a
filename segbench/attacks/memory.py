"""Whether an error says that memory ran out."""

from __future__ import annotations

import torch

# What libraries say when they could not get memory of their own: cuBLAS and cuDNN do not raise torch.OutOfMemoryError.
_NO_MEMORY = (
    "out of memory",
    "can't allocate memory",  # torch's CPU allocator
    "not enough memory",
    "cublas_status_alloc_failed",
    "hipblas_status_alloc_failed",
    "cublas_status_not_initialized",  # no room for its handle
    "cudnn_status_alloc_failed",
    "cudnn_status_internal_error_device_allocation_failed",
    "cudnn_status_internal_error_host_allocation_failed",
    "cusolver_status_alloc_failed",
    "cufft_alloc_failed",
    "unable to find an engine to execute this computation",  # cuDNN, where no engine's workspace fits
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device, or the machine, has no memory left."""
    text = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(words in text for words in _NO_MEMORY)
    )
