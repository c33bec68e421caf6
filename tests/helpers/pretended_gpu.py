"""A pretended GPU: tensors that say they are on cuda:0 and are computed on the CPU, forward and backward.

    install()                                  # once, before anything computes a gradient in this process
    with PretendedGPU() as gpu:
        model = load_model(source, torch.bfloat16, "cuda"); ...
    gpu.waits          # Counter: (what, octad file:line, in a layer) -> how often the host waited for the device
    gpu.uploads        # the same for what the host sent to the device
    gpu.launches       # every operation in order, with the shapes of its tensors

It runs the code for `device.type == "cuda"` with real numbers, raises where tensors of two devices meet, as a GPU would,
and counts what makes the host wait: .item(), .tolist(), .cpu(), nonzero, unique, boolean indexing. It says nothing about
speed, memory or the order of atomic additions. Kernels that exist on CUDA alone (attention over documents of many
lengths) are computed by octad's slow twin of attention.
"""

import contextlib
import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import octad
from octad.fast.training_blocks import block
from octad.kernels.attention import causal_attention_reference
from octad.model.transformer import DecoderLayer

SOURCE = Path(__file__).parent.parent / "gpu" / "pretended_cuda.cpp"
CUDA, PACKAGE = torch.device("cuda", 0), str(Path(octad.__file__).parent)
LAYERS = {DecoderLayer.forward.__code__, block.__code__}
aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default: "item",
    aten.nonzero.default: "nonzero",
    aten._unique2.default: "unique",
    aten.unique_consecutive.default: "unique_consecutive",
    aten.unique_dim.default: "unique",
    aten.masked_select.default: "masked_select",
    aten.bincount.default: "bincount",
    aten.repeat_interleave.Tensor: "repeat_interleave",
    aten.equal.default: "equal",
}
INDEX = {
    aten.index.Tensor,
    aten.index_put.default,
    aten.index_put_.default,
    aten._index_put_impl_.default,
}
MOVES = {aten._to_copy.default, aten.copy_.default, torch.ops.prims.device_put.default}


# ---- the library ---------------------------------------------------------------------------------------------


def cannot() -> str:
    """Why there is no pretended GPU here, in one line; nothing where there is one."""
    if torch.cuda.is_available():
        return "a real GPU is here"
    if shutil.which("g++") is None:
        return "no g++ to build the pretended device with"
    try:
        _library()
    except (OSError, subprocess.SubprocessError) as error:
        return f"the pretended device cannot be built for torch {torch.__version__}: {error}"
    return ""


def install() -> None:
    """Register the device with PyTorch, for good."""
    if ctypes.CDLL(str(_library())).pretend_cuda() != 1:
        raise RuntimeError("PyTorch does not take the pretended device")


def _library() -> Path:
    """The library, built at the first call for this PyTorch."""
    key = hashlib.sha256(SOURCE.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    built = Path(tempfile.gettempdir()) / f"octad-pretended-gpu-{os.getuid()}" / f"{key}.so"
    if built.is_file():
        return built
    built.parent.mkdir(mode=0o700, exist_ok=True)
    root = Path(torch.__file__).parent
    include, lib = root / "include", root / "lib"
    command = ["g++", "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{include}"]
    command += [f"-I{include}/torch/csrc/api/include", str(SOURCE), "-o", f"{built}.{os.getpid()}"]
    command += [f"-L{lib}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{lib}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise OSError(next((line for line in done.stderr.splitlines() if "error" in line), done.stderr[:200]))
    os.replace(f"{built}.{os.getpid()}", built)
    return built


# ---- its tensors ---------------------------------------------------------------------------------------------


class OnGPU(torch.Tensor):
    """`inner` is the tensor on the CPU."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool = False) -> "OnGPU":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CUDA,
            requires_grad=requires_grad,
        )

    def __init__(self, inner: torch.Tensor, requires_grad: bool = False) -> None:
        self.inner = inner

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnGPU({self.inner})"

    def tolist(self) -> Any:
        if PretendedGPU.current is not None:
            PretendedGPU.current.wait("tolist")
        return self.inner.detach().tolist()

    def numpy(self, *arguments: Any, **options: Any) -> Any:
        raise TypeError("cannot convert a cuda:0 tensor to numpy; use .cpu() first")

    __array__ = numpy

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnGPU":
        made = OnGPU(self.inner.detach().clone(), self.requires_grad)
        memo[id(self)] = made
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class PretendedGPU:
    """The device while it is there, in every thread that begins meanwhile."""

    current: "PretendedGPU | None" = None

    def __init__(self) -> None:
        self.waits: Counter[tuple[str, str, bool]] = Counter()
        self.uploads: Counter[tuple[str, str, bool]] = Counter()
        self.launches: list[tuple[str, tuple[tuple[int, ...], ...]]] = []
        self.recording: PretendedGraph | None = None

    def __enter__(self) -> "PretendedGPU":
        PretendedGPU.current = self
        self._stack = contextlib.ExitStack()
        for owner, name, value in _patches():
            self._stack.enter_context(_replaced(owner, name, value))
        lifting = torch._C._only_lift_cpu_tensors()  # so that torch.tensor(..., device=) is seen
        torch._C._set_only_lift_cpu_tensors(True)
        self._stack.callback(torch._C._set_only_lift_cpu_tensors, lifting)
        self._stack.enter_context(_Mode())
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        PretendedGPU.current = None

    def wait(self, what: str) -> None:
        """Count a wait of the host."""
        if self.recording is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what} at {_here()[0]}")
        self.waits[(what, *_here())] += 1

    def upload(self, what: str) -> None:
        """Count a copy from the host."""
        if self.recording is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what} at {_here()[0]}")
        self.uploads[(what, *_here())] += 1

    def in_layers(self) -> list[tuple[str, str]]:
        """What made the host wait, or sent something, within a decoder layer, and where."""
        return sorted({(what, where) for what, where, inside in self.waits | self.uploads if inside})

    def forget(self) -> None:
        """Begin to count anew."""
        self.waits.clear()
        self.uploads.clear()
        self.launches.clear()


class PretendedGraph:
    """A CUDA graph: the operations in order, with the memory that they read and write, to be carried out again."""

    def __init__(self) -> None:
        self.steps: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def add(self, func: Any, inner: Any, options: Any, out: Any) -> None:
        self.steps.append(
            (func, inner, options, [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)])
        )

    def replay(self) -> None:
        for func, inner, options, outs in self.steps:
            again = [t for t in tree_leaves(func(*inner, **options)) if isinstance(t, torch.Tensor)]
            for old, new in zip(outs, again, strict=True):
                if old.data_ptr() != new.data_ptr():  # else a view, or written in place
                    old.copy_(new)


@contextlib.contextmanager
def _recording(graph: PretendedGraph) -> Iterator[None]:
    assert PretendedGPU.current is not None
    PretendedGPU.current.recording = graph
    try:
        yield
    finally:
        PretendedGPU.current.recording = None


class _Stream:
    def __init__(self, device: Any = None) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _patches() -> list[tuple[Any, str, Any]]:
    properties = type(
        "Properties", (), {"total_memory": 80 << 30, "name": "pretended", "major": 9, "minor": 0}
    )
    cuda: dict[str, Any] = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "mem_get_info": lambda device=None: (64 << 30, 80 << 30),
        "set_device": lambda device: None,
        "synchronize": lambda device=None: None,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: None,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device=None: None,
        "get_device_properties": lambda device=None: properties(),
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "pretended",
        "CUDAGraph": PretendedGraph,
        "graph": _recording,
        "Stream": _Stream,
        "stream": contextlib.nullcontext,
        "current_stream": _Stream,
    }
    found: list[tuple[Any, str, Any]] = [(torch.cuda, name, value) for name, value in cuda.items()]
    begin = threading.Thread.run

    def run(thread: threading.Thread) -> None:
        with _Mode():
            begin(thread)

    found.append((threading.Thread, "run", run))
    # pretended tensors know no inference mode
    found.append((torch.inference_mode, "__enter__", _enter))
    found.append((torch.inference_mode, "__exit__", _leave))
    return found


def _enter(self: Any) -> None:
    self._before = torch.is_grad_enabled()
    torch.set_grad_enabled(not self.mode)


def _leave(self: Any, *error: object) -> None:
    torch.set_grad_enabled(self._before)


@contextlib.contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _here() -> tuple[str, bool]:
    """The line of octad that is at work ("?" where autograd is alone), and whether it is in a decoder layer."""
    frame, place, inside = sys._getframe(1), "?", False
    while frame is not None:
        file = frame.f_code.co_filename
        if place == "?" and file.startswith(PACKAGE):
            place = f"{file[len(PACKAGE) + 1 :]}:{frame.f_lineno}"
        inside |= frame.f_code in LAYERS
        frame = frame.f_back  # type: ignore[assignment]
    return place, inside


# ---- its work ------------------------------------------------------------------------------------------------


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    gpu = PretendedGPU.current
    leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = [t for t in leaves if isinstance(t, OnGPU)]
    host = [t for t in leaves if not isinstance(t, OnGPU) and t.device.type == "cpu"]
    to_gpu = _goes_to_gpu(func, args, kwargs, bool(there))
    if gpu is not None and (there or to_gpu):
        _count(gpu, func, args, kwargs, there, host, to_gpu)
    inner, options = tree_map_only(OnGPU, lambda t: t.inner, (args, kwargs))
    if torch.device(options.get("device") or "cpu").type == "cuda":
        options["device"] = torch.device("cpu")
    if "pin_memory" in options:
        options["pin_memory"] = False
    if func is torch.ops.prims.device_put.default:
        inner = (inner[0], torch.device("cpu"), *inner[2:])
    work = OWN.get(str(func), func)
    out = work(*inner, **options)
    if gpu is not None and gpu.recording is not None and (there or to_gpu):
        gpu.recording.add(work, inner, options, out)
    if _writes(func):  # what was written in place is what is returned
        before = {id(t.inner): t for t in there}
        made = OnGPU if to_gpu else torch.Tensor.detach
        return tree_map_only(torch.Tensor, lambda t: before[id(t)] if id(t) in before else made(t), out)
    if not to_gpu or func is aten._local_scalar_dense.default:
        return out
    return tree_map_only(torch.Tensor, OnGPU, out)


def _writes(func: Any) -> bool:
    schema = func._schema
    written = any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments)
    return schema.name.endswith("_") or written


def _goes_to_gpu(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], there: bool) -> bool:
    if func is aten.copy_.default:
        return isinstance(args[0], OnGPU)
    device = args[1] if func is torch.ops.prims.device_put.default else kwargs.get("device")
    return there if device is None else torch.device(device).type == "cuda"


def _count(
    gpu: PretendedGPU,
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    there: list[OnGPU],
    host: list[torch.Tensor],
    to_gpu: bool,
) -> None:
    """Raises RuntimeError where tensors of two devices meet."""
    gpu.launches.append((str(func), tuple(tuple(t.shape) for t in there)))
    large = [t for t in host if t.dim() > 0]
    if func in MOVES:
        if there and (not to_gpu or (func is aten.copy_.default and not isinstance(args[0], OnGPU))):
            gpu.wait(".cpu()")
        elif to_gpu and host:
            gpu.upload("copy")
    elif func in INDEX:
        if there and not isinstance(args[0], OnGPU):
            raise RuntimeError(f"{func}: a host tensor indexed by the GPU's at {_here()[0]}")
        if large:
            gpu.wait("index by a host tensor")
    elif there and large:
        raise RuntimeError(f"{func}: tensors on cuda:0 and cpu meet at {_here()[0]}")
    if there and func in WAITS:
        gpu.wait(WAITS[func])
    if func in INDEX and any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]):
        gpu.wait("boolean index")


# ---- kernels that are on CUDA alone --------------------------------------------------------------------------


def _attended(q: Any, k: Any, v: Any, starts_q: Any, starts_k: Any, window: Any) -> torch.Tensor:
    """Attention of documents side by side, through the slow twin; only causal, as octad asks for it."""
    assert window[1] == 0
    left = None if window[0] < 0 else window[0] + 1
    spans = zip(
        starts_q.tolist(), starts_q.tolist()[1:], starts_k.tolist(), starts_k.tolist()[1:], strict=False
    )
    parts = [
        causal_attention_reference(q[None, a:b], k[None, c:d], v[None, c:d], window=left)[0]
        for a, b, c, d in spans
    ]
    return torch.cat(parts)


def _varlen(
    q: Any, k: Any, v: Any, starts_q: Any, starts_k: Any, max_q: int, max_k: int, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _, _, window, _, used, tables, *_ = (*rest, *[None] * 7)
    if tables is not None:  # pages
        k, v = (x[tables.long()].flatten(0, 2) for x in (k, v))
        starts_k = torch.arange(len(starts_q)) * (len(k) // len(tables))
    if used is not None:  # the first of each sequence's room
        rooms = zip(starts_k.tolist(), used.tolist(), strict=False)
        kept = torch.cat([torch.arange(start, start + count) for start, count in rooms])
        k, v, starts_k = k[kept], v[kept], torch.tensor([0, *used.cumsum(0).tolist()])
    out = _attended(q, k, v, starts_q, starts_k, window)
    return out, q.new_zeros(q.shape[1], len(q), dtype=torch.float32), torch.zeros(2, dtype=torch.uint64)


def _varlen_backward(
    grad: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    lse: Any,
    starts_q: Any,
    starts_k: Any,
    *rest: Any,
    **more: Any,
) -> tuple[torch.Tensor, ...]:
    window = rest[5] if len(rest) > 5 else more["window_size"]
    found: list[torch.Tensor] = []

    def work() -> None:
        given = [t.detach().requires_grad_() for t in (q, k, v)]
        found.extend(torch.autograd.grad(_attended(*given, starts_q, starts_k, window), given, grad))

    thread = threading.Thread(target=work)  # of its own: autograd is off in this one, within its own backward
    thread.start()
    thread.join()
    return tuple(found)


OWN: dict[str, Callable[..., Any]] = {
    "torch_attn._varlen_attn.default": _varlen,
    "torch_attn._varlen_attn_backward.default": _varlen_backward,
}
