"""Language models that several processes compute together: each holds a slice of every linear layer of the body (tensor parallelism).

The process that loads a model on the device "tp" leads. It starts the others, each with a GPU of its own, and tells them of every call of
the model's body and of every backward pass from its output. All of them then compute it, and exchange values by torch.distributed. Every
process has the embeddings, and the leader alone uses the output head.

Layers take and give whole values (the styles "colwise_gather_output" and "rowwise_split_input" of transformers), so that hooks on them see
the same as in one process. That moves about twice the bytes of slices that stay apart between the layers of a block (Megatron-LM, arXiv
1909.08053), and each process computes the whole attention.
"""

import atexit
import inspect
import itertools
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..store.errors import IncompatibleError, UsageError, WorkerError
from .capture import with_gradient
from .devices import TENSOR_PARALLEL, cooperating

_STYLES = {
    "colwise": "colwise_gather_output",
    "colwise_rep": "colwise_gather_output",
    "colwise_gather_output": "colwise_gather_output",
    "packed_colwise": "colwise_gather_output",
    "rowwise": "rowwise_split_input",
    "rowwise_rep": "rowwise_split_input",
    "rowwise_split_input": "rowwise_split_input",
}
_ENDING_SECONDS = 10.0
_MOST_LOADS = 16  # of models in a group
_INTERFACES = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_FOLLOW = f"from {__name__} import follow; follow()"


def process_count(device: str) -> int:
    """Return the number of processes of this machine that compute a model together on a device.

    Raises:
        UsageError: the device is not valid, or the machine has fewer GPUs.
    """
    gpus = torch.cuda.device_count()
    size = max(gpus, 1) if device == TENSOR_PARALLEL else cooperating(device)
    if size > 1 and 0 < gpus < size:
        raise UsageError(f"the device {device} needs {size} GPUs, and this machine has {gpus}")
    return size


def split_plan(model_class: Any, config: Any, trust_remote_code: bool) -> dict[str, str]:
    """Return the style of each split layer of a model's body, and "replicate" for the others of transformers' plan.

    Raises:
        IncompatibleError: transformers has no plan for the model, or it has experts.
    """
    with torch.device("meta"):
        model = model_class.from_config(config, trust_remote_code=trust_remote_code)
    kind = type(model).__name__
    modules = {_NUMBER.sub("*", name): module for name, module in model.named_modules()}
    parameters = {_NUMBER.sub("*", name) for name, _ in model.named_parameters()}
    prefix = next(name for name, module in model.named_modules() if module is model.base_model)
    plan = {}
    for name, style in dict(model.tp_plan or {}).items():
        if name in parameters or style.startswith("moe"):
            raise IncompatibleError(f"the experts of a {kind} are not split ({name}); use the device map, which spreads whole layers")
        if name in modules:
            in_body = name.startswith(f"{prefix}.") if prefix else modules[name] is not model.get_output_embeddings()
            plan[name] = _STYLES.get(style, "replicate") if in_body and isinstance(modules[name], nn.Linear) else "replicate"
    if not set(plan.values()) & set(_STYLES.values()):
        raise IncompatibleError(f"transformers has no plan to split a {kind} (tp_plan); use the device map, which spreads whole layers")
    return plan


def load_split(size: int, slices: Mapping[str, Any], load: Callable[[], nn.Module]) -> nn.Module:
    """Load a model in this process and `size - 1` others; its body's calls, and backward passes from them, are computed by all.

    A process has one group of others. To load a model in a group of another size ends the former group, and its models are lost.

    Args:
        slices: the arguments with which the other processes load their slices (see `models.load_slices`).
        load: loads this process's slices.

    Raises:
        UsageError: this process is one of a distributed program.
        WorkerError: a process ended.
    """
    with _LOADING:
        group = _ProcessGroup.of(size)
        with group.exchange():
            group.tell("load", **slices)
            model = load()
            _await_all()
        group.lead(model)
    return model


def is_split(model: nn.Module) -> bool:
    """Return True if other processes hold slices of the model."""
    return model in _LEADS


def is_lost(model: nn.Module) -> bool:
    """Return True if other processes held slices of the model, and have ended."""
    lead = _LEADS.get(model)
    return lead is not None and (lead.group.is_closed or lead.group.ended() is not None)


def refuse_split(model: nn.Module, what: str) -> None:
    """Raise a UsageError for what needs a model in one process."""
    if is_split(model):
        raise UsageError(f"{what} needs the model in one process; use a `device` other than tp")


def whole(model: nn.Module, name: str, tensor: Tensor) -> Tensor:
    """Return a parameter or buffer of a model as a whole; its slices are gathered.

    Raises:
        WorkerError: a process ended.
    """
    lead = _LEADS.get(model)
    if lead is None or not hasattr(tensor, "full_tensor"):
        return tensor
    with lead.group.exchange():
        lead.group.tell("gather", model=lead.number, name=name)
        return tensor.full_tensor()


def own_slice(tensor: Tensor) -> Tensor:
    """Return this process's slice of a parameter."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@contextmanager
def shared_pass(model: nn.Module, layers: Sequence[str]) -> Iterator[None]:
    """Say, while open, from which layers on gradients are computed, in the passes of a model that may be split.

    Raises:
        WorkerError: a process ended.
    """
    lead = _LEADS.get(model)
    if lead is None:
        yield
        return
    with lead.group.passes():
        lead.starts = tuple(layers)
        try:
            yield
        finally:
            lead.starts = ()


@dataclass
class _Lead:
    """The leader's record of a split model.

    Attributes:
        starts: the layers whose outputs gradients begin at, where nothing before them has one.
    """

    group: "_ProcessGroup"
    number: int
    starts: tuple[str, ...] = ()


_LOADING = threading.RLock()
_LEADS: "weakref.WeakKeyDictionary[nn.Module, _Lead]" = weakref.WeakKeyDictionary()


class _ProcessGroup:
    """The processes that compute models together, as their leader sees them.

    An error of the leader while values are exchanged ends the group, since the others would wait for values that no longer come.
    """

    current: "_ProcessGroup | None" = None

    def __init__(self, size: int) -> None:
        self.size = size
        self.is_closed = False
        self._lock = threading.RLock()  # held while values are exchanged: one pass, or one parameter, at a time
        self._is_exchanging = False
        self._loads = 0
        self._folder = tempfile.TemporaryDirectory(prefix="wherefrom-")
        self._numbers = itertools.count()
        self._calls = itertools.count()
        self._forgotten: deque[tuple[str, int]] = deque()
        self._processes: list[subprocess.Popen[bytes]] = []
        atexit.register(self.close)
        try:
            self._processes += [self._start(rank) for rank in range(1, size)]
            self._await_start()
            device = _own_gpu(0)
            with _loopback():
                _join(0, size, self._meeting, device)
        except BaseException:
            self.close()
            raise

    @classmethod
    def of(cls, size: int) -> "_ProcessGroup":
        """Return the group of this process; start it if there is none of that size."""
        group = cls.current
        if group is not None and group.size == size and group.ended() is None and not group.is_worn:
            group._loads += 1
            return group
        if group is not None:
            group.close()
        if dist.is_available() and dist.is_initialized():
            raise UsageError("this process is one of a distributed program already (torch.distributed); load the model elsewhere")
        cls.current = cls(size)
        return cls.current

    @property
    def is_worn(self) -> bool:
        """True after many loads, of which no model is left: each leaves some threads and files behind."""
        return self._loads >= _MOST_LOADS and not any(lead.group is self for lead in _LEADS.values())

    @property
    def _meeting(self) -> str:
        return str(Path(self._folder.name) / "meeting")

    def _start(self, rank: int) -> "subprocess.Popen[bytes]":
        task = {"rank": rank, "size": self.size, "meeting": self._meeting, "threads": torch.get_num_threads()}
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "LOCAL_RANK": str(rank)}
        with open(self._log(rank), "wb") as log:
            arguments = [sys.executable, "-P", "-c", _FOLLOW, json.dumps(task)]  # nothing is imported from the working directory
            # In a session of its own, an interrupt from the terminal comes to the leader alone.
            return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True)

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name) / f"{rank}.log"

    def _await_start(self) -> None:
        """Wait until the other processes are about to join."""
        while not all(_ready(self._meeting, rank).exists() for rank in range(1, self.size)):
            if self.ended() is not None:
                raise self._failure()
            time.sleep(0.05)

    def tell(self, action: str, **arguments: Any) -> None:
        """Have the other processes do something.

        Raises:
            WorkerError: one of them ended.
        """
        forgotten = [self._forgotten.popleft() for _ in range(len(self._forgotten))]
        line = json.dumps({"action": action, "forgotten": forgotten, **arguments}).encode() + b"\n"
        if self.is_closed:
            raise WorkerError("the processes that compute the model together have ended; load it again")
        for process in self._processes:
            try:
                assert process.stdin is not None
                process.stdin.write(line)
                process.stdin.flush()
            except OSError as error:
                raise self._failure() from error

    def ended(self) -> int | None:
        """Return the rank of a process that ended; None if all run."""
        return next((rank for rank, process in enumerate(self._processes, 1) if process.poll() is not None), None)

    @contextmanager
    def passes(self) -> Iterator[None]:
        """Hold the lock for a forward and a backward pass; end the group if an error comes while values are exchanged.

        Raises:
            WorkerError: another process ended, in place of the error that this led to.
        """
        with self._lock:
            try:
                yield
            except BaseException as error:
                if not self._is_exchanging or self.is_closed:
                    raise
                deadline = time.monotonic() + _ENDING_SECONDS
                while "onnection" in str(error) and self.ended() is None and time.monotonic() < deadline:
                    time.sleep(0.1)
                if self.ended() is None or not isinstance(error, Exception):
                    self.close()
                    raise
                raise self._failure() from error

    @contextmanager
    def exchange(self) -> Iterator[None]:
        """Exchange values with the other processes while open; see `passes`."""
        with self.passes():
            self._is_exchanging = True
            yield
            self._is_exchanging = False

    def start_backward(self) -> None:
        """Exchange values from now to the end of the backward pass that runs."""
        self._is_exchanging = True
        torch.autograd.Variable._execution_engine.queue_callback(self._end_backward)

    def _end_backward(self) -> None:
        self._is_exchanging = False

    def _failure(self) -> WorkerError:
        """Return the error of a process that ended, and end the others."""
        rank = self.ended() or 1
        with suppress(subprocess.TimeoutExpired):
            self._processes[rank - 1].wait(_ENDING_SECONDS)
        lines = self._log(rank).read_text(errors="replace").strip().splitlines() or [f"exit code {self._processes[rank - 1].poll()}"]
        self.close()
        return WorkerError(f"process {rank} of the {self.size} that compute the model together ended ({lines[-1]:.300}); try again")

    def lead(self, model: nn.Module) -> None:
        """Make this process the leader of the model's passes."""
        lead = _Lead(self, next(self._numbers))
        _LEADS[model] = lead
        weakref.finalize(model, self._forgotten.append, ("model", lead.number))
        body: Any = model.base_model
        body.forward = _Forward(body.forward, lead)

    def call(self, forward: Callable[..., Any], lead: _Lead, tensors: Mapping[str, Tensor], others: Mapping[str, Any]) -> Any:
        """Call a model's body in all processes; return what it returns here."""
        call = _Call(next(self._calls), self._forgotten)
        with self.exchange():
            self.tell(
                "forward",
                model=lead.number,
                call=call.number,
                others=others,
                tensors=[[name, *_form(tensor)] for name, tensor in tensors.items()],
                starts=lead.starts if torch.is_grad_enabled() else None,
            )
            for tensor in tensors.values():
                _send(tensor)
            output = forward(**tensors, **others)
        key = next(iter(output))
        if output[key].requires_grad:
            output[key] = _Backward.apply(output[key], self, call)
        return output

    def close(self) -> None:
        """End the other processes and leave the group."""
        self.is_closed = True
        atexit.unregister(self.close)
        if _ProcessGroup.current is self:
            _ProcessGroup.current = None
        for process in self._processes:
            process.kill()
            process.wait()
            with suppress(OSError):
                assert process.stdin is not None
                process.stdin.close()
        if dist.is_initialized():
            with suppress(RuntimeError):
                dist.destroy_process_group()
        self._folder.cleanup()


class _Forward:
    """The forward method of a body that all processes compute."""

    def __init__(self, forward: Any, lead: _Lead) -> None:
        self.__signature__ = inspect.signature(forward)
        self._names = tuple(self.__signature__.parameters)
        self._forward = weakref.WeakMethod(forward)
        self._lead = lead

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values = dict(zip(self._names, args, strict=False)) | kwargs
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        others = {name: value for name, value in values.items() if name not in tensors}
        for name, value in others.items():
            if not (value is None or isinstance(value, (bool, int, float, str))):
                raise UsageError(f"a model that several processes compute takes no {type(value).__name__} ({name}); use another device")
        forward = self._forward()
        assert forward is not None  # the caller holds the body
        return self._lead.group.call(forward, self._lead, tensors, others)

    def __deepcopy__(self, memo: Any) -> Any:
        raise UsageError("a model that several processes compute cannot be copied; load it again, or use a `device` other than tp")


class _Call:
    """A call of a body; its end is the end of the leader's graph of it."""

    def __init__(self, number: int, forgotten: "deque[tuple[str, int]]") -> None:
        self.number = number
        self._forgotten = forgotten

    def __del__(self) -> None:
        self._forgotten.append(("call", self.number))


class _Backward(torch.autograd.Function):
    """The output of a body; its gradient goes to all processes."""

    @staticmethod
    def forward(context: Any, output: Tensor, group: _ProcessGroup, call: _Call) -> Tensor:
        context.group, context.call = group, call
        return output.view_as(output)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        (gradient,) = gradients
        context.group.start_backward()
        context.group.tell("backward", call=context.call.number, form=_form(gradient))
        _send(gradient)
        return gradient, None, None


class _Follower:
    """A process that computes its slices of models as its leader says."""

    def __init__(self) -> None:
        self._models: dict[int, nn.Module] = {}
        self._outputs: dict[int, Tensor] = {}
        self._loaded = 0

    def load(self, source: Mapping[str, Any], auto_class: str, size: int, plan: Mapping[str, str]) -> None:
        """Load a model's slices; models are numbered in the order in which they are loaded."""
        from . import models

        model: Any = models.load_slices(models.ModelSource(**source), auto_class, size, plan)
        head = model.get_output_embeddings()
        if head is not None and head.weight is not model.get_input_embeddings().weight:
            head.to("meta")  # only the leader uses it
        _await_all()
        self._models[self._loaded] = model
        self._loaded += 1

    def forward(
        self,
        model: int,
        call: int,
        others: Mapping[str, Any],
        tensors: Sequence[tuple[str, str, Sequence[int]]],
        starts: Sequence[str] | None,
    ) -> None:
        """Call a model's body."""
        body: Any = self._models[model].base_model
        values = {name: _receive(dtype, shape) for name, dtype, shape in tensors}
        modules = dict(self._models[model].named_modules())
        hooks = [modules[name].register_forward_hook(lambda module, args, output: with_gradient(output)) for name in starts or ()]
        try:
            with torch.set_grad_enabled(starts is not None):
                output = body(**values, **others)[0]
        finally:
            for hook in hooks:
                hook.remove()
        if output.requires_grad:
            self._outputs[call] = output

    def backward(self, call: int, form: tuple[str, Sequence[int]]) -> None:
        """Run the backward pass of a call."""
        torch.autograd.backward(self._outputs[call], _receive(*form))

    def gather(self, model: int, name: str) -> None:
        """Send a slice of a parameter."""
        self._models[model].state_dict(keep_vars=True)[name].full_tensor()

    def forget(self, forgotten: Sequence[tuple[str, int]]) -> None:
        """Free the outputs of calls, and models, that the leader has freed."""
        for kind, number in forgotten:
            (self._models if kind == "model" else self._outputs).pop(number, None)


def follow() -> None:
    """Follow a leader until its end; the arguments are those of `_ProcessGroup._start`."""
    from . import models

    task = json.loads(sys.argv[1])
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read_lines, args=(lines,), daemon=True).start()
    try:
        models.configure_memory()
        torch.set_num_threads(task["threads"])
        device = _own_gpu(task["rank"])
        _ready(task["meeting"], task["rank"]).touch()
        with _loopback():
            _join(task["rank"], task["size"], task["meeting"], device)
        follower = _Follower()
        while True:
            message = json.loads(lines.get())
            follower.forget(message.pop("forgotten"))
            getattr(follower, message.pop("action"))(**message)
    except Exception as error:
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)
        os._exit(1)


def _read_lines(lines: "queue.SimpleQueue[bytes]") -> None:
    """Read the leader's lines; end the process with the leader, even if it waits for a value that no longer comes."""
    for line in sys.stdin.buffer:
        lines.put(line)
    os._exit(0)


def _own_gpu(rank: int) -> torch.device | None:
    """Choose and return the GPU of a process; None where there is none."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.set_device(rank)
    return torch.device("cuda", rank)


def _join(rank: int, size: int, meeting: str, gpu: torch.device | None) -> None:
    """Enter the group of processes that meet at a file."""
    backend = "gloo" if gpu is None else "nccl"
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=size, device_id=gpu)


@contextmanager
def _loopback() -> Iterator[None]:
    """Have processes meet on the loopback interface while open, unless the environment names another."""
    added = [name for name in _INTERFACES if name not in os.environ and sys.platform.startswith("linux")]
    os.environ.update(dict.fromkeys(added, "lo"))
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


def _ready(meeting: str, rank: int) -> Path:
    """Return the file that a process makes just before it joins."""
    return Path(f"{meeting}-{rank}")


def _await_all() -> None:
    """Return when all processes have come here."""
    dist.all_reduce(torch.zeros(1, device=_device()))


def _form(tensor: Tensor) -> tuple[str, list[int]]:
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _send(tensor: Tensor) -> None:
    """Send a tensor's bytes to the other processes: not all backends know all dtypes."""
    values = tensor.detach().to(_device()).contiguous().reshape(-1)
    dist.broadcast(values.view(torch.uint8), 0)


def _receive(dtype: str, shape: Sequence[int]) -> Tensor:
    values = torch.empty(tuple(shape), dtype=getattr(torch, dtype), device=_device())
    dist.broadcast(values.view(-1).view(torch.uint8), 0)
    return values
