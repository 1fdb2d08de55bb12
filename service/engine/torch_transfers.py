"""How arrays reach a device and come back, and how a batch is launched there.

On CUDA three streams work side by side: uploads from pinned memory, compute, downloads into pinned memory. A launch of a
shape that comes again becomes a CUDA graph. On the CPU (`HostTransfers`) everything happens at once, so that what is built
on top (slots, buckets, padding) is one code on both.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
Body = Callable[[Sequence[Tensor]], tuple[Tensor, ...]]
"""A batch: tensors in, tensors out; always the same shapes, nothing that waits for the device."""
Fetch = Callable[[], Array]
"""Waits for a download."""
WARM_UP_CALLS = 4
"""Of a body before it is captured: the fuser still compiles in the second and third."""
MOST_GRAPHS = 512
"""Per device. A graph keeps its outputs, and a launch beyond these runs as it is written, kernel by kernel."""


class Launch(Protocol):
    """One body, called again and again with arrays of the same shapes."""

    def __call__(self, arrays: Sequence[Array]) -> tuple[Tensor, ...]:
        """Uploads `arrays`, runs the body, and returns its outputs, which hold until the next call."""
        ...

    def fetch(self, tensor: Tensor) -> Fetch:
        """Begins to download an output of the last call."""
        ...


class HostTransfers:
    """The CPU as a device: tensors are views of numpy arrays."""

    device = torch.device("cpu")
    graphs = False

    def compute(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def upload(self, array: Array) -> Tensor:
        return torch.from_numpy(_own(array))

    def fetch(self, tensor: Tensor) -> Fetch:
        array = tensor.numpy()
        return lambda: array

    def launch(self, body: Body, blank: Sequence[Array], worth_a_graph: bool) -> Launch:
        return _HostLaunch(body)


class _HostLaunch:
    def __init__(self, body: Body):
        self._body = body

    def __call__(self, arrays: Sequence[Array]) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return self._body([torch.from_numpy(array) for array in arrays])

    def fetch(self, tensor: Tensor) -> Fetch:
        array = tensor.numpy()
        return lambda: array


class CudaTransfers:
    """One CUDA device, shared by all engines on it: its streams, its graph pool, its lock.

    All computing goes through one stream, because graphs of one pool may use the same memory and must not run side by side.
    """

    graphs = True

    def __init__(self, device: torch.device):
        self.device = device
        self.uploads, self.computing, self.downloads = (torch.cuda.Stream(device) for _ in range(3))
        self.capturing = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.lock = threading.Lock()
        self.captured = 0

    def compute(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self.computing)

    def upload(self, array: Array) -> Tensor:
        """From pinned memory, on the stream of uploads; what is computed later waits for it."""
        with torch.cuda.stream(self.uploads):
            tensor = torch.from_numpy(_own(array)).pin_memory().to(self.device, non_blocking=True)
        tensor.record_stream(self.computing)
        self.computing.wait_stream(self.uploads)
        return tensor

    def fetch(self, tensor: Tensor) -> Fetch:
        fetch, _ = self.download(tensor)
        return fetch

    def download(self, tensor: Tensor) -> tuple[Fetch, torch.cuda.Event]:
        """Into pinned memory, on the stream of downloads, after what is computed now."""
        self.downloads.wait_stream(self.computing)
        over = torch.cuda.Event()
        with torch.cuda.stream(self.downloads):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
            over.record(self.downloads)
        tensor.record_stream(self.downloads)

        def fetch() -> Array:
            over.synchronize()
            return host.numpy()

        return fetch, over

    def launch(self, body: Body, blank: Sequence[Array], worth_a_graph: bool) -> Launch:
        return _CudaLaunch(self, body, blank, worth_a_graph)


class _CudaLaunch:
    """The first call runs the body; a second one says that the shape comes again, and it is captured then.

    Args:
        blank: inputs with which the body may be run at any time without changing any row.
    """

    def __init__(self, on: CudaTransfers, body: Body, blank: Sequence[Array], worth_a_graph: bool):
        self._on, self._body, self._blank, self._worth = on, body, blank, worth_a_graph
        self._called = False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._outputs: tuple[Tensor, ...] = ()
        self._fetching: list[torch.cuda.Event] = []

    def __call__(self, arrays: Sequence[Array]) -> tuple[Tensor, ...]:
        on = self._on
        if self._graph is None and self._called and self._worth and on.captured < MOST_GRAPHS:
            self._capture()
        self._called = True
        uploaded = [on.upload(array) for array in arrays]
        with on.compute(), torch.inference_mode():
            if self._graph is None:
                return self._body(uploaded)
            for event in self._fetching:
                on.computing.wait_event(event)
            self._fetching.clear()
            for fixed, fresh in zip(self._inputs, uploaded, strict=True):
                fixed.copy_(fresh)
            self._graph.replay()
        return self._outputs

    def fetch(self, tensor: Tensor) -> Fetch:
        fetch, over = self._on.download(tensor)
        self._fetching.append(over)
        return fetch

    def _capture(self) -> None:
        """Warm-up and capture on a stream of their own, while another model may compute: `blank` touches no row in use."""
        on = self._on
        with on.lock, torch.inference_mode():
            with torch.cuda.stream(on.capturing):
                self._inputs = [torch.from_numpy(array).to(on.device) for array in self._blank]
                for _ in range(WARM_UP_CALLS):
                    self._body(self._inputs)
            on.capturing.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=on.pool, stream=on.capturing, capture_error_mode="thread_local"):
                self._outputs = self._body(self._inputs)
            on.capturing.synchronize()
            self._graph, on.captured = graph, on.captured + 1


def _own(array: Array) -> Array:
    """Contiguous and writable, as torch wants arrays even if it only reads them."""
    array = np.ascontiguousarray(array)
    return array if array.flags.writeable else array.copy()


Transfers = HostTransfers | CudaTransfers


@cache
def _cuda(device: torch.device) -> CudaTransfers:
    return CudaTransfers(device)


def transfers_of(device: torch.device) -> Transfers:
    return _cuda(device) if device.type == "cuda" else HostTransfers()
