"""A pretended CUDA device, for tests without one: its tensors say that they are on cuda:0 and compute on the CPU.

What a real one refuses is refused: operations on tensors of two devices and, while a graph is recorded, whatever waits
for the GPU or reads from the CPU. A replayed graph repeats the recorded operations on the same memory.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda", 0)
TORCH = "2.13."  # whose insides are used here
GUARDS = "_ZN3c104impl26device_guard_impl_registryE"  # where torch finds out how to enter a device, by its type
CUDA, META = 1, 14  # places in it

aten = torch.ops.aten
MOVES = {aten._to_copy, aten.copy_}  # from one device to another; with pageable memory, they wait
WAITS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.is_nonzero, *MOVES}
TAKES_INDICES = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}  # from either device


class CudaTensor(torch.Tensor):
    """Says that it is on cuda:0; its numbers lie in `held`, on the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls: type["CudaTensor"], real: Tensor) -> "CudaTensor":
        with torch.inference_mode(False):  # else torch would not let views of weights be wrapped
            made = torch.Tensor._make_wrapper_subclass(
                cls, real.size(), real.stride(), real.storage_offset(), dtype=real.dtype, device=DEVICE
            )
        made.held = real
        return made

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:
        return f"CudaTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class Graph:
    """A recorded CUDA graph."""

    recording: "Graph | None" = None

    def __init__(self) -> None:
        self.steps: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        for func, args, kwargs, made in self.steps:
            again = func(*args, **kwargs)
            for old, new in zip(tree_flatten(made)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    def pool(self) -> tuple[int, int]:
        return 0, 1


class EmulatedCuda(TorchDispatchMode):
    """Makes what is asked for on cuda:0 there; for the thread that enters it."""

    def __enter__(self) -> "EmulatedCuda":
        self._lifted = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor moves what it has made by an operation of its own
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        torch._C._set_only_lift_cpu_tensors(self._lifted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is aten._fused_sdp_choice.default:
        return 0  # attention by plain operations
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):  # in inference mode
        with EmulatedCuda():
            return func.decompose(*args, **kwargs)
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    asked = torch.device(kwargs["device"]) if kwargs.get("device") else None
    on_cuda = asked.type == DEVICE.type if asked else any(isinstance(tensor, CudaTensor) for tensor in tensors)
    _check_devices(func, args, tensors)
    if Graph.recording and (on_cuda or any(isinstance(tensor, CudaTensor) for tensor in tensors)):
        _check_recording(func, args, tensors, on_cuda=on_cuda)
    if asked:
        kwargs = kwargs | {"device": torch.device("cpu")}
    real_args, real_kwargs = tree_map(_real, (args, kwargs))
    made = func(*real_args, **real_kwargs)
    if Graph.recording:
        Graph.recording.steps.append((func, real_args, real_kwargs, made))
    if not on_cuda:
        return made
    own = {id(tensor.held): tensor for tensor in tensors if isinstance(tensor, CudaTensor)}
    return tree_map(lambda leaf: _wrapped(leaf, own) if isinstance(leaf, Tensor) else leaf, made)


def _wrapped(made: Tensor, own: dict[int, CudaTensor]) -> CudaTensor:
    return own[id(made)] if id(made) in own else CudaTensor(made)


def _real(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, CudaTensor) else leaf


def _check_devices(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raise RuntimeError where CUDA would: a single number may come from the CPU, and indices may."""
    if func.overloadpacket in MOVES or not any(isinstance(tensor, CudaTensor) for tensor in tensors):
        return
    if func.overloadpacket in TAKES_INDICES and isinstance(args[0], CudaTensor):
        tensors = [args[0], *(leaf for leaf in args[2:3] if isinstance(leaf, Tensor))]
    strangers = [tensor for tensor in tensors if not isinstance(tensor, CudaTensor)]
    single = torch.Tag.pointwise in func.tags or func.overloadpacket in TAKES_INDICES
    if any(tensor.ndim or not single for tensor in strangers):
        raise RuntimeError(f"{func} expected all tensors to be on the same device: {[t.shape for t in strangers]}")


def _check_recording(func: Any, args: Any, tensors: list[Tensor], *, on_cuda: bool) -> None:
    """Raise RuntimeError for what ends a recording."""
    packet = func.overloadpacket
    crossing = not on_cuda or any(not isinstance(tensor, CudaTensor) and tensor.ndim for tensor in tensors)
    by_mask = packet in TAKES_INDICES and any(part is not None and part.dtype == torch.bool for part in args[1])
    if by_mask or (crossing and packet in MOVES | TAKES_INDICES) or packet in WAITS - MOVES:
        raise RuntimeError(f"{func}: operation not permitted when stream is capturing")


def move(module: nn.Module) -> None:
    """Put the weights and buffers of a module onto the pretended device; those of bitsandbytes with their scales."""
    moved: dict[int, nn.Parameter] = {}  # weights that are tied stay so
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = moved.setdefault(id(weight), _moved(weight))
        part._buffers = {name: None if buffer is None else CudaTensor(buffer) for name, buffer in part._buffers.items()}


def _moved(weight: Any) -> nn.Parameter:
    moved = nn.Parameter(CudaTensor(weight.data.as_subclass(torch.Tensor)), requires_grad=weight.requires_grad)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        state.absmax, state.code, state.offset = map(CudaTensor, (state.absmax, state.code, state.offset))
        state.state2.absmax, state.state2.code = map(CudaTensor, (state.state2.absmax, state.state2.code))
        moved.quant_state = state  # type: ignore[attr-defined]
    return moved


@contextmanager
def _recording(graph: Graph, **_: Any) -> Iterator[None]:
    Graph.recording = graph
    try:
        yield
    finally:
        Graph.recording = None
    for _, args, kwargs, made in graph.steps:  # recording computes nothing
        given = {_memory(leaf) for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)}
        if isinstance(made, Tensor) and made.is_floating_point() and _memory(made) not in given:
            made.fill_(torch.nan)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class _Stream:
    def wait_stream(self, other: "_Stream") -> None:
        """All is done at once."""


@pytest.fixture
def learning_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """As `cuda`, by the name of a device for which autograd starts no thread, since for CUDA's it wants the driver."""
    monkeypatch.setattr(sys.modules[__name__], "DEVICE", torch.device("lazy", 0))
    with EmulatedCuda():
        yield DEVICE


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The pretended device, with the graphs of `torch.cuda`."""
    if sys.platform != "linux" or torch.version.cuda or not torch.__version__.startswith(TORCH):
        pytest.skip(f"the pretended CUDA device is made for torch {TORCH} without CUDA on Linux")
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * (META + 1)).in_dll(library, GUARDS)
    before = guards[CUDA]
    guards[CUDA] = guards[META]  # that of a device that needs no entering
    monkeypatch.setattr(torch.cuda, "_initialized", True)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", _recording)
    monkeypatch.setattr(torch.cuda, "Stream", _Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", _Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with EmulatedCuda():
        yield DEVICE
    guards[CUDA] = before
