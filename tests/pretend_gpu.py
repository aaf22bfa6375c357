"""A pretended GPU: CPU tensors that claim to be on a GPU, so that GPU-only host code can run on a CPU.

It imitates what host code can get wrong:

* devices: an operation on tensors of both devices is an error, and so is a kernel launch with a tensor of the host;
* asynchronous copies to the host: the values arrive only once an event after the copy has been waited for;
* CUDA graphs: during a capture nothing runs, operations return NaN, and waits for the device or copies from the host
  are errors; a replay runs what was recorded, on the same memory;
* waits: each is noted in `WAITS`, and is an error inside `forbid_waits()`.

Triton's kernels run in its interpreter; the memory of peers is files that all ranks map. It cannot show memory order,
compilation or speed. Call `pretend()` before Triton is imported, in a process of its own.
"""

import contextlib
import itertools
import mmap
import os
import threading
import time
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

WAITS = []  # names of calls in which the host has waited for the device

_GET_DEVICE, _GET_IS_CUDA = torch.Tensor.device.__get__, torch.Tensor.is_cuda.__get__
_SET_DATA = torch.Tensor.data.__set__
_READS = {
    getattr(torch.Tensor, name)
    for name in ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__index__", "__contains__", "nonzero",
                 "unique", "equal", "allclose", "masked_select")
} | {torch.nonzero, torch.unique, torch.equal, torch.allclose, torch.masked_select}  # fmt: skip
_INDEXED = {torch.Tensor.__getitem__, torch.Tensor.__setitem__}
_MOVES = {torch.Tensor.to, torch.Tensor.cpu, torch.Tensor.cuda}
_MIX = {torch.Tensor.copy_, _SET_DATA, torch._has_compatible_shallow_copy_type} | _INDEXED | _MOVES

_state = SimpleNamespace(forbidden=False, pending=[])


class _Capture(threading.local):
    """The capture of each thread: those of other threads do not disturb it, as in the mode `thread_local`."""

    recorder = None


_capture = _Capture()


@contextlib.contextmanager
def forbid_waits():
    """Make every wait of the host for the device an error, as `torch.cuda.set_sync_debug_mode` does."""
    _state.forbidden = True
    try:
        yield
    finally:
        _state.forbidden = False


def put_on_gpu(module):
    """Mark a module's parameters and buffers as on the GPU."""
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        tensor.on_gpu = True
    return module


def _on_gpu(tensor):
    return getattr(tensor, "on_gpu", False)


def _names_gpu(value):
    return isinstance(value, torch.device | str) and str(value).startswith("cuda")


def _names_host(value):
    return (isinstance(value, torch.device) and value.type == "cpu") or value == "cpu"


def _wait(name):
    if _capture.recorder is not None:
        raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
    if _state.forbidden:
        raise RuntimeError(f"called a synchronizing operation: {name}")
    WAITS.append(name)
    _land(len(_state.pending))


def _land(number):
    """Complete the oldest copies to the host."""
    for target, source in _state.pending[:number]:
        target.copy_(source)
    for index in range(number):
        _state.pending[index] = (torch.empty(0), torch.empty(0))


class _Gpu(TorchFunctionMode):
    """Tracks which tensors are on the GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func == _GET_DEVICE:
            return torch.device("cuda", torch.cuda.current_device()) if _on_gpu(args[0]) else func(*args)
        if func in (torch.device, torch._C._nn._parse_to):
            return func(*args, **kwargs)
        if func == _GET_IS_CUDA:
            return _on_gpu(args[0])
        name = getattr(func, "__name__", str(func))
        everything = [*args, *kwargs.values()]
        to_gpu = any(_names_gpu(value) for value in everything) or func is torch.Tensor.cuda
        to_host = not to_gpu and (any(_names_host(value) for value in everything) or func is torch.Tensor.cpu)
        args = tuple(torch.device("cpu") if _names_gpu(value) else value for value in args)
        kwargs = {key: torch.device("cpu") if _names_gpu(value) else value for key, value in kwargs.items()}
        pinned = kwargs.pop("pin_memory", False)
        tensors = [value for value in tree_iter((args, kwargs)) if isinstance(value, torch.Tensor)]
        some = any(map(_on_gpu, tensors))
        if func is torch.Tensor.pin_memory:
            assert not some
            pinned_copy = args[0].clone()
            pinned_copy.is_pinned_here = True
            return pinned_copy
        if func == _SET_DATA:
            func(*args)
            args[0].on_gpu = _on_gpu(args[1])
            return None
        if func in _MOVES and (to_gpu or to_host) and to_gpu != _on_gpu(args[0]):
            return self._move(name, func, args, kwargs, to_gpu)
        if func not in _MIX and some:
            strays = [value for value in tensors if not _on_gpu(value) and value.dim() and value.numel()]
            if strays:
                raise RuntimeError(f"Expected all tensors to be on the same device: {name} got {len(strays)} others")
        if func is torch.Tensor.copy_ and _on_gpu(args[0]) != _on_gpu(args[1]):
            self._copy(args)
            return args[0]
        if func in _READS and some:
            _wait(name)
        if func in _INDEXED and _on_gpu(args[0]):
            parts = args[1] if isinstance(args[1], tuple) else (args[1],)
            for part in parts:
                of_host = isinstance(part, list)
                if isinstance(part, torch.Tensor):
                    of_host = part.dtype is torch.bool or (part.dim() > 0 and not _on_gpu(part))
                if of_host:
                    _wait(f"{name} by a list, a mask or numbers of the host")
        if func in (torch.tensor, torch.as_tensor) and to_gpu and not some:
            _wait(name)  # a copy from memory that is not pinned
        if func is torch.histc:  # of integers, which a CPU does not take
            args = (args[0].float(), *args[1:])
        result = func(*args, **kwargs)
        if to_gpu or (some and not to_host):
            for tensor in tree_iter(result):
                if isinstance(tensor, torch.Tensor):
                    tensor.on_gpu = True
        if pinned:
            result.is_pinned_here = True
        return result

    def _move(self, name, func, args, kwargs, to_gpu):
        non_blocking = kwargs.get("non_blocking", False)
        source = args[0]
        if to_gpu:
            if _capture.recorder is not None:
                raise RuntimeError(f"operation not permitted when stream is capturing: {name} from the host")
            if not (non_blocking and getattr(source, "is_pinned_here", False)):
                _wait(f"{name} from memory that is not pinned")
            moved = func(source.clone(), *args[1:], **kwargs)
            moved.on_gpu = True
            return moved
        if not non_blocking:
            _wait(name)
            moved = func(source.clone(), *args[1:], **kwargs)
        else:
            if _capture.recorder is not None:
                raise RuntimeError(f"operation not permitted when stream is capturing: {name} to the host")
            value = func(source.clone(), *args[1:], **kwargs)
            moved = _poison(torch.empty_like(value))
            _state.pending.append((moved, value))
        moved.on_gpu = False
        return moved

    def _copy(self, args):
        target, source = args[:2]
        if _capture.recorder is not None or not _on_gpu(target):
            _wait("copy_")
        target.copy_(source)


def _poison(tensor):
    """Fill the result of an operation that has not run with NaN, or with a number that nobody expects."""
    if tensor.dtype.is_floating_point:
        return tensor.fill_(float("nan"))
    return tensor.fill_(True if tensor.dtype is torch.bool else torch.iinfo(tensor.dtype).max // 3)


class _Recorder(TorchDispatchMode):
    """Records what would run on the device without running it."""

    def __init__(self):
        super().__init__()
        self.work = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        if func.is_view or func in (torch.ops.aten.detach.default, torch.ops.aten.lift_fresh.default):
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self.work.append(lambda: func(*args, **kwargs))
            arguments, returns = func._schema.arguments, func._schema.returns
            given = dict(zip((one.name for one in arguments), args, strict=False)) | kwargs
            written = [given[one.name] for one in arguments if one.alias_info is not None and one.alias_info.is_write]
            return written[0] if len(returns) == 1 else tuple(written) if returns else None
        # What it returns is known from its arguments' shapes alone, or it could not be part of a graph.
        meta = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), (args, kwargs))
        if "device" in kwargs:
            meta[1]["device"] = torch.device("meta")
        shapes = func(*meta[0], **meta[1])
        outputs = tree_map_only(
            torch.Tensor,
            lambda found: _poison(torch.empty_strided(found.shape, found.stride(), dtype=found.dtype)),
            shapes,
        )

        def run():
            if "empty" in func.__name__:  # memory that nothing has written yet
                _poison(outputs)
                return
            for kept, found in zip(tree_iter(outputs), tree_iter(func(*args, **kwargs)), strict=True):
                if isinstance(kept, torch.Tensor):
                    kept.copy_(found)

        self.work.append(run)
        return outputs


class _Graph:
    """Replaces `torch.cuda.CUDAGraph`."""

    captured = 0  # graphs so far
    replays = 0

    def capture_begin(self, pool=None, capture_error_mode="global"):
        assert _capture.recorder is None and capture_error_mode in ("thread_local", "relaxed")
        _capture.recorder = self._recorder = _Recorder()
        self._recorder.__enter__()

    def capture_end(self):
        self._recorder.__exit__(None, None, None)
        _capture.recorder = None
        _Graph.captured += 1

    def replay(self):
        assert _capture.recorder is None
        _Graph.replays += 1
        with torch._C.DisableTorchFunction(), torch.no_grad():
            for run in self._recorder.work:
                run()


class _Event:
    def __init__(self, **options):
        self.copies = 0

    def record(self, stream=None):
        self.copies = len(_state.pending)

    def query(self):
        _land(self.copies)
        return True

    def wait(self, stream=None):
        pass

    def synchronize(self):
        _wait("Event.synchronize")


class _Stream:
    """All streams are one: work runs when it is issued, so a missing `wait_stream` is not found."""

    def __init__(self, device=None, priority=0):
        pass

    def wait_stream(self, other):
        pass

    def record_event(self):
        event = _Event()
        event.record()
        return event

    def synchronize(self):
        _wait("Stream.synchronize")


def graphs():
    """Return how many graphs this process has captured, and how many replays it has run."""
    return _Graph.captured, _Graph.replays


def _fake_cuda(rank, num_gpus):
    properties = SimpleNamespace(multi_processor_count=1, total_memory=2**34, uuid=f"GPU-{rank}")
    changes = {
        "CUDAGraph": _Graph, "Stream": _Stream, "Event": _Event, "current_stream": lambda device=None: _Stream(),
        "stream": lambda stream: contextlib.nullcontext(), "graph_pool_handle": lambda: (0, 0),
        "set_device": lambda device: None, "current_device": lambda: rank, "device_count": lambda: num_gpus,
        "is_current_stream_capturing": lambda: _capture.recorder is not None,
        "synchronize": lambda device=None: _wait("synchronize"), "empty_cache": lambda: None,
        "get_device_properties": lambda device=None: properties, "get_device_name": lambda device=None: "pretended",
        "get_device_capability": lambda device=None: (9, 0), "can_device_access_peer": lambda one, other: True,
        "mem_get_info": lambda device=None: (2**33, 2**34), "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
    }  # fmt: skip
    for name, value in changes.items():
        setattr(torch.cuda, name, value)


class Files:
    """Replaces `MappedMemory` by files that all ranks map."""

    numbers = itertools.count()

    def __init__(self, process_group, folder=None):
        self._group, self._folder = process_group, folder or os.environ["PRETENDED_MEMORY"]

    def map(self, nbytes, device):
        number, rank, ranks = next(self.numbers), self._group.rank(), self._group.size()
        paths = [os.path.join(self._folder, f"buffer{number}_{peer}") for peer in range(ranks)]
        with open(paths[rank], "wb") as file:
            file.truncate(nbytes)
        self.meet(60)
        self._buffers = []
        for path in paths:
            with open(path, "r+b") as file:
                self._buffers.append(torch.frombuffer(mmap.mmap(file.fileno(), nbytes), dtype=torch.uint8))
                self._buffers[-1].on_gpu = True
        return self._buffers[rank], [buffer.data_ptr() for buffer in self._buffers]

    def synchronize(self, device):
        pass

    def rejoin(self, process_group):
        self._group = process_group

    def meet(self, deadline_s):
        dist.barrier(self._group)


def interpret_wire():
    """Replace GPU-only instructions by plain loads and stores; return `nvlink`."""
    import triton.language as tl

    from lockstep.dispatch import kernels_combine, kernels_dispatch, kernels_order, kernels_wire, nvlink

    for kernels in (kernels_wire, kernels_order):
        kernels.now_ns = time.monotonic_ns
        kernels.load_acquire = lambda addresses: tl.load(addresses.to(tl.pointer_type(tl.int64)))
    kernels_wire._fence = lambda token: token
    kernels_wire._barrier_any = lambda flag: flag
    kernels_wire._store_flag = lambda address, word: tl.store(address.to(tl.pointer_type(tl.int64)), word)
    _without_dependent_launch(kernels_combine, kernels_dispatch)
    return nvlink


def _without_dependent_launch(*modules):
    for module in modules:
        module.gdc_wait = module.gdc_launch_dependents = lambda: None


def compute_as_gpus():
    """Make the interpreter multiply bfloat16 matrices correctly, and round to bfloat16 instead of truncating."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply, truncate = InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_trunc

    def create_dot(self, a, b, *rest):
        parts = [
            TensorHandle((part.data.astype("uint32") << 16).view("float32"), tl.float32)
            if part.dtype.scalar == tl.bfloat16 else part
            for part in (a, b)
        ]  # fmt: skip
        return multiply(self, *parts, *rest)

    def create_fp_trunc(self, source, target):
        if target.scalar != tl.bfloat16 or source.dtype.scalar != tl.float32:
            return truncate(self, source, target)
        rounded = torch.from_numpy(source.data.copy()).bfloat16().view(torch.uint16)
        return TensorHandle(rounded.numpy(), target.scalar)

    InterpreterBuilder.create_dot, InterpreterBuilder.create_fp_trunc = create_dot, create_fp_trunc


def small_launch(nvlink):
    """Return launch sizes for the interpreter, which runs blocks one after another: a single ordering block."""
    return nvlink.LaunchSizes(
        order_blocks=1, push_blocks=1, combine_blocks=1, dispatch_tokens=4, combine_tokens=4, columns=128, tiny_tile=16,
        tiles=4, word_tokens=2, slice=64, pairs=64,
    )  # fmt: skip


def pretend(rank=0, num_gpus=1):
    """Give this process, this thread and those started later, a GPU until the returned context is left."""
    from triton.runtime.interpreter import GridExecutor

    from lockstep.coordination import groups
    from lockstep.engine import attention_kernels, decoder_kernels
    from lockstep.models import parallel
    from lockstep.moe import experts_kernels

    nvlink = interpret_wire()
    compute_as_gpus()
    _without_dependent_launch(attention_kernels, decoder_kernels, experts_kernels)
    nvlink.MappedMemory = Files
    nvlink.launch_sizes = lambda *_: small_launch(nvlink)
    parallel.open_groups = lambda config, device, *rest: groups.open_groups(config, torch.device("cpu"), *rest)
    launch, run = GridExecutor.__call__, threading.Thread.run

    def call(self, *args, **options):
        for index, value in enumerate(args):
            if isinstance(value, torch.Tensor) and not _on_gpu(value):
                name = f"argument {index} of {self.fn.__name__}"
                raise ValueError(f"Pointer argument cannot be accessed from Triton (cpu tensor?): {name}")

        def work():
            with torch._C.DisableTorchFunction():
                launch(self, *args, **options)

        work() if _capture.recorder is None else _capture.recorder.work.append(work)

    def run_pretending(thread):
        with _Gpu():
            run(thread)

    make = torch.nn.Parameter.__new__

    def make_parameter(cls, data=None, requires_grad=True):
        parameter = make(cls, data, requires_grad)
        parameter.on_gpu = _on_gpu(data)
        return parameter

    torch.nn.Parameter.__new__ = make_parameter
    GridExecutor.__call__, threading.Thread.run = call, run_pretending
    _fake_cuda(rank, num_gpus)
    return _Gpu().__enter__()
