"""What layers keep, in host RAM between their forward and their backward.

Copies run on a stream of their own beside the computation: out while the layer's forward goes on, and in again while the
backward of the layer above runs. The host's memory is pinned in a few large slabs that are used again in every step: torch's
own pinned allocator rounds each block up to a power of two and keeps it. Source of the scheme: activation offloading as in
ZeRO-Offload (arXiv 2101.06840), here for layer inputs and attention outputs.

    forward    parcel = host.parcel(); parcel.send("x", x) ...; parcel.settle()      # settle: the sources may go now
    backward   parcel.fetch()["x"]; parcel.start_previous()                          # the layer below begins its way in
"""

from __future__ import annotations

import math
import mmap
import sys
import warnings
import weakref

import torch
from torch import Tensor

SLAB = 4 * 2**30  # bytes; a slab holds at least one slot


class _Slab:
    """Host memory, pinned where there is a GPU, cut into slots; unpinned when its last slot is gone."""

    def __init__(self, slots: int, size: int, pinned: bool) -> None:
        self.memory = _memory(slots * size)
        self.size, self.pinned = size, False
        if pinned:
            code = int(torch.cuda.cudart().cudaHostRegister(self.memory.data_ptr(), self.memory.numel(), 0))
            self.pinned = code == 0
            if code:
                warnings.warn(
                    f"{self.memory.numel() / 2**30:.1f} GiB of host RAM cannot be pinned (CUDA error {code}); copies of kept "
                    "activations are slower. Raise the limit of locked memory (ulimit -l) or train with a shorter context.",
                    stacklevel=2,
                )

    def __del__(self) -> None:
        if getattr(self, "pinned", False) and not sys.is_finalizing():  # at the end of the process the driver does it
            torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr())


def _memory(size: int) -> Tensor:
    """`size` bytes, every page there already: by huge pages where the system has them, written by all threads at once.

    Pinning pages that are not there yet brings them in one by one, 4 KiB each: a quarter of a second for every GiB.
    """
    if hasattr(mmap.mmap, "madvise") and hasattr(mmap, "MADV_HUGEPAGE"):
        pages = mmap.mmap(-1, size)
        pages.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(pages, dtype=torch.uint8).zero_()
    return torch.zeros(size, dtype=torch.uint8)


class _Slot:
    """One piece of a slab."""

    def __init__(self, slab: _Slab, index: int) -> None:
        self.slab, self.memory = slab, slab.memory[index * slab.size : (index + 1) * slab.size]

    def view(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        return self.memory[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)


class Host:
    """The slots of one model and the stream of its copies; on the CPU copies are made at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.free: list[_Slot] = []
        self.size = 0  # of a slot, bytes
        self.held = 0  # bytes of all slabs
        self.last: weakref.ref[Parcel] | None = None

    def begin(self) -> None:
        """A new forward: its first layer has nothing below it."""
        self.last = None

    def parcel(self) -> Parcel:
        """The parcel of the next layer of this forward."""
        made = Parcel(self, self.last)
        self.last = weakref.ref(made)
        return made

    def take(self, size: int) -> _Slot:
        """A slot of at least `size` bytes."""
        self.reserve(size, 1)
        return self.free.pop()

    def reserve(self, size: int, count: int) -> None:
        """Have `count` free slots of at least `size` bytes, in slabs; a large reservation takes seconds, so it comes first."""
        if size > self.size:
            self.free.clear()  # longer rows came: shorter slots are of no use
            self.size, self.held = -(-size // 4096) * 4096, 0
        while len(self.free) < count:
            slots = max(1, min(max(count - len(self.free), 8), SLAB // self.size))
            slab = _Slab(slots, self.size, self.stream is not None)
            self.free += [_Slot(slab, i) for i in range(slots)]
            self.held += slots * self.size

    def give(self, slots: list[_Slot]) -> None:
        """Take slots back; those of an outgrown size are let go."""
        self.free += [s for s in slots if s.slab.size == self.size]

    def current(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self.device)


class Parcel:
    """What one layer of one forward has in host RAM. Its slots go back when it is dropped."""

    def __init__(self, host: Host, previous: weakref.ref[Parcel] | None) -> None:
        self.host, self.previous = host, previous
        self.slots: list[_Slot] = []
        self.tensors: dict[str, Tensor] = {}  # in host RAM
        self.sources: list[Tensor] = []  # on their way out
        self.arriving: dict[str, Tensor] | None = None
        self.done: torch.cuda.Event | None = None
        weakref.finalize(self, host.give, self.slots)

    def send(self, name: str, x: Tensor) -> None:
        """Begin the copy of x to host RAM; x must stay as it is until `settle`."""
        x = x.detach().contiguous()
        slot = self.host.take(x.numel() * x.element_size())
        self.slots.append(slot)
        target = self.tensors[name] = slot.view(x.shape, x.dtype)
        stream = self.host.stream
        if stream is None:
            target.copy_(x)
            return
        stream.wait_stream(self.host.current())
        with torch.cuda.stream(stream):
            target.copy_(x, non_blocking=True)
            self.done = stream.record_event()
        self.sources.append(x)

    def settle(self) -> None:
        """What follows on the current stream may overwrite the sources."""
        if self.done is not None:
            self.host.current().wait_event(self.done)
        self.sources.clear()

    def start(self) -> None:
        """Begin the copies back to the device, if they are not on their way."""
        if self.arriving is not None:
            return
        stream, device = self.host.stream, self.host.device
        self.arriving = {name: torch.empty_like(t, device=device) for name, t in self.tensors.items()}
        if stream is not None:
            stream.wait_stream(self.host.current())  # the memory of the targets may still be read there
        with torch.cuda.stream(stream):
            for name, target in self.arriving.items():
                target.copy_(self.tensors[name], non_blocking=True)
            self.done = stream.record_event() if stream is not None else None

    def fetch(self) -> dict[str, Tensor]:
        """The tensors by name, on the device."""
        self.start()
        if self.done is not None:
            self.host.current().wait_event(self.done)
        found, self.arriving = self.arriving, None
        assert found is not None
        return found

    def start_previous(self) -> None:
        """Begin the way in of the layer below, if its forward is still waiting for a backward."""
        below = self.previous() if self.previous is not None else None
        if below is not None:
            below.start()
