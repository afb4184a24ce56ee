"""Two accelerators that are not there: tensors that say they are on one, hold their numbers on the CPU, and refuse to meet across devices.

What PyTorch does on two GPUs is done here operation by operation: one whose tensors lie on different devices is an error (numbers without
dimensions excepted, as on a GPU), `to` moves, results lie where their inputs do. The devices are of PyTorch's "lazy" kind, which needs no
driver and which autograd runs in the calling thread.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_map_only
from wherefrom.indexer.tasks import CausalLM

KIND = "lazy"
FIRST, SECOND = torch.device(KIND, 0), torch.device(KIND, 1)


class OnDevice(torch.Tensor):
    """Numbers on the CPU that are said to be on a device."""

    @staticmethod
    def __new__(cls, held, device):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=device
        )

    def __init__(self, held, device):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})

    def __repr__(self):
        return f"{self.held!r} on {self.device}"


def run(function, args, kwargs):
    met = []

    def take(tensor):
        met.append((tensor.device, tensor.dim()))
        return tensor.held if isinstance(tensor, OnDevice) else tensor

    held_args, held_kwargs = tree_map_only(torch.Tensor, take, (args, dict(kwargs)))
    places = {device for device, dimensions in met if dimensions} or {device for device, _ in met}
    moves = function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
    if len(places) > 1 and not moves:
        raise RuntimeError(f"{function} of tensors on {' and '.join(sorted(map(str, places)))}")
    place = args[0].device if moves else next(iter(places), torch.device("cpu"))
    if kwargs.get("device") is not None:
        place, held_kwargs["device"] = torch.device(kwargs["device"]), torch.device("cpu")
    actual = function(*held_args, **held_kwargs)
    if place.type != KIND:
        return actual
    return return_and_correct_aliasing(function, args, kwargs, tree_map_only(torch.Tensor, lambda t: OnDevice(t, place), actual))


class Devices(TorchDispatchMode):
    """While it is entered, tensors can be made on the devices and moved there."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return run(function, args, kwargs or {})


class Spread(CausalLM):
    """A task whose model Accelerate lays over the two devices: embeddings and the first block on one, all that follows on the other.

    Where head and embeddings are one weight, the last norm comes first among the parameters, so that batches are made where the embeddings
    are not; else the last block's last layer lies on the first device, so that a tracked layer's input comes from elsewhere.
    """

    def load(self, source):
        """See `Task`."""
        from accelerate import dispatch_model
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module

        model = super().load(source)
        inner, base = model.base_model_prefix, model.base_model
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        places = {"lm_head": FIRST if tied else SECOND}
        for name, child in base.named_children():
            if isinstance(child, torch.nn.ModuleList):
                places |= {f"{inner}.{name}.0": FIRST, f"{inner}.{name}.1": SECOND}
                last = [module for module in child[1].modules() if isinstance(module, torch.nn.Linear)][-1]
            else:
                places[f"{inner}.{name}"] = SECOND if "norm" in name else FIRST
        for name in [name for name in base._modules if tied and "norm" not in name]:
            base._modules[name] = base._modules.pop(name)
        dispatch_model(model, places, main_device=FIRST, force_hooks=True)
        if not tied:
            add_hook_to_module(last.to(FIRST), AlignDevicesHook(FIRST, io_same_device=True))
        return model
