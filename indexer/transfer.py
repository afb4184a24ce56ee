"""Copies of tensors from an accelerator to the host, which run while it computes."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor


def start_copy(tensor: Tensor) -> Callable[[], Tensor]:
    """Start to copy a tensor to the host; the value waits for the copy and returns it.

    On CUDA, the copy goes to pinned memory by a stream of its own: it waits for the work that makes the tensor, and later work does not
    wait for it.
    """
    if tensor.device.type != "cuda":
        copied = tensor.to("cpu")
        return lambda: copied
    stream = _copy_stream(tensor.device)
    stream.wait_stream(torch.cuda.current_stream(tensor.device))
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    with torch.cuda.stream(stream):
        host.copy_(tensor, non_blocking=True)
        done = stream.record_event()
    tensor.record_stream(stream)

    def wait() -> Tensor:
        done.synchronize()
        return host

    return wait


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of copies from a device."""
    return torch.cuda.Stream(device)
