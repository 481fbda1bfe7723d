"""Where Triton runs and where the plain-torch path does, a lean way to launch, and small helpers for launches.

Triton runs on CUDA tensors of 16 or 32 bits on GPUs of capability 7.0 and above. Everywhere else (CPU, float64, older
GPUs, no triton installed) the plain path runs. Under Triton's own interpreter, which tests use, CPU tensors take
the kernels too. bfloat16 arithmetic is wrong there, so kernels load, compute in float32 and cast at the store.

`kernel[grid](...)` of Triton costs the host some 15 to 25 microseconds: it binds and specialises every argument in Python and
asks the driver about every pointer. `Launcher` does that once for each kind of arguments, then calls the compiled kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

try:
    import triton
    import triton.language as tl
except ImportError:  # native Windows and macOS have none
    triton = None
    tl: Any = None  # type: ignore[no-redef]

MIN_CAPABILITY = (7, 0)
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Triton decides when it is imported whether it interprets; its own functions tell what it decided.
INTERPRETED = triton is not None and not isinstance(tl.sum, triton.JITFunction)
# Triton versions whose `CompiledKernel.run` takes what `Launcher.launch` gives it.
LEAN_VERSIONS = ((3, 6), (3, 7))


def launch_note(version: str | None = None) -> str:
    """Why launches go Triton's ordinary way, for a report; "" where they are lean. `version`: of Triton, the one here if None."""
    if version is None:
        if triton is None:
            return "Triton is not installed, so no kernel is launched."
        version = triton.__version__
    if torch.version.hip is not None:
        return "Kernels on this kind of GPU are launched Triton's ordinary way, some 15 microseconds slower each."
    if tuple(int(part) for part in version.split(".")[:2]) in LEAN_VERSIONS:
        return ""
    known = " and ".join(".".join(map(str, one)) for one in LEAN_VERSIONS)
    return f"nbkit launches kernels fast under Triton {known}; under {version} each launch takes some 15 microseconds longer."


LEAN = launch_note() == ""


def jit(fn: Callable[..., Any]) -> Any:
    """`triton.jit`, for functions that kernels call; the function itself where triton is missing (it is never called there)."""
    return fn if triton is None else triton.jit(fn)


def kernel(fn: Callable[..., Any]) -> Any:
    """`triton.jit` for what is launched, as `fn[grid](tensors and numbers in order, CONSTANT=..., num_warps=...)`."""
    return Launcher(triton.jit(fn)) if LEAN and not INTERPRETED else jit(fn)


class Launcher:
    """A Triton kernel that finds its compiled form by few Python operations and calls its launch directly.

    Positional arguments are the kernel's tensors and numbers, all of them; its `tl.constexpr` parameters follow them in its
    signature and are given by keyword, as are the compiler's options. Triton compiles a form of its own for numbers that are
    1 or divisible by 16 and for pointers aligned to 16 bytes; the key here tells the same cases apart. Whatever is new, on
    another device than the current one, or watched by a profiler's hook goes Triton's ordinary way.
    """

    def __init__(self, jitted: Any) -> None:
        self.jit = jitted
        self.made: dict[tuple[Any, ...], Found] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], /, *args: Any, **constants: Any) -> None:
        """Raises: TypeError where a parameter is missing or given in the other way."""
        current_device, current_stream, hooks = _driver()
        device = current_device()
        key: list[Any] = [device]
        passed: list[Any] = []
        for value in args:
            kind = type(value)
            if kind is int:
                if -0x80000000 <= value <= 0x7FFFFFFF:
                    key.append(1 if value == 1 else 2 if value & 15 else 16)
                else:
                    key.append(_wide_class(value))
            elif kind is float or kind is bool:
                key.append(kind)
            elif value is None:
                key.append(None)
            elif value.get_device() != device:
                _tell()
                self.jit[grid](*args, **constants)
                return
            else:
                dtype, value = value.dtype, value.data_ptr()
                key.append((dtype,) if value & 15 else dtype)
            passed.append(value)
        found = self.made.get(whole := (*key, *constants, *constants.values()))
        if found is None or _hooked(hooks):
            _tell()
            self._make(whole, grid, args, constants)
            return
        if _SEEN:
            _tell(found, grid, args, device)
        x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
        found.launch(x, y, z, current_stream(device), *found.before, *found.arguments(passed))

    def _make(self, key: tuple[Any, ...], grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        """Launch the ordinary way, which compiles, and keep what was compiled."""
        names = self.jit.arg_names
        fixed = names[len(args) :]
        by_keyword = {name for name in names if name in constants}
        wrong = [p.name for p in self.jit.params if {p.name in by_keyword, p.name in fixed} != {p.is_constexpr}]
        if wrong:
            raise TypeError(f"{self.jit.__name__}: give {', '.join(wrong)} by keyword if constexpr, else by position.")
        compiled = self.jit[grid](*args, **constants)
        if hasattr(compiled, "packed_metadata"):  # not while Triton compiles in the background
            self.made[key] = Found.of(compiled, tuple(constants[name] for name in fixed))


class Found(NamedTuple):
    """A compiled kernel: call `launch` with the grid, the stream, `before` and what `arguments` gives."""

    launch: Callable[..., Any]
    before: tuple[Any, ...]
    fixed: tuple[Any, ...]  # the constants, which come last
    packed: bool = False  # whether the launch takes all arguments as one tuple

    @classmethod
    def of(cls, compiled: Any, fixed: tuple[Any, ...]) -> Found:
        """Past Triton's own function in Python where that would do nothing but pass on: the kernel wants no memory of its own."""
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        if getattr(run, "launch", None) is None or run.global_scratch_size or run.profile_scratch_size:
            return cls(run, (function, metadata, None, None, None), fixed)
        how = (function, run.launch_cooperative_grid, run.launch_pdl)
        if hasattr(run, "kernel_signature"):  # from Triton 3.7 on
            about = (metadata, None, None, None, None, None, run.arg_annotations, run.kernel_signature)
            return cls(run.launch, (*how, *about), fixed, True)
        return cls(run.launch, (*how, None, None, metadata, None, None, None), fixed)

    def arguments(self, passed: list[Any]) -> tuple[Any, ...]:
        """The end of a launch: `passed` are the tensors' addresses and the numbers."""
        return ((*passed, *self.fixed),) if self.packed else (*passed, *self.fixed)


_SEEN: dict[int, list[Any]] = {}  # by thread: the launches that a `Prepared` is looking at


def _tell(*launch: Any) -> None:
    """Note a lean launch, or, without arguments, one that went Triton's ordinary way."""
    seen = _SEEN.get(get_ident())
    if seen is not None:
        seen.append(launch)


class Stand:
    """Where launches go, found out once for many: `now` is (device, stream), None where each has to go Triton's ordinary way."""

    now: tuple[int, int] | None = None

    def look(self) -> None:
        """Call before a row of launches among which no other device, stream or profiler is set."""
        current_device, current_stream, hooks = _driver()
        device = current_device()
        now = None if _hooked(hooks) else (device, current_stream(device))
        if now != self.now:  # while nothing changes it stays the same object
            self.now = now


class Prepared:
    """`fn` for tensors that keep shapes, strides and dtypes from call to call: its launches, found once, without the rest.

    Checks and the choice of a grid cost as much as a launch itself. The caller answers for the tensors being alike;
    `strides_of` are the places of those whose strides it cannot know, which are compared each time. What `fn` returns is lost.
    `own`: it makes tensors that nothing but its launches write; the next calls use them again. Without it, a call that gives a
    launch a tensor of its own making goes through `fn` every time, and so does one that computes with torch or launches nothing.
    `stand`: of the caller, who has it look; None: each call looks by itself.
    """

    def __init__(
        self, fn: Callable[..., Any], strides_of: tuple[int, ...] = (), own: bool = False, stand: Stand | None = None
    ) -> None:
        self.fn, self.strides_of, self.own = fn, strides_of, own
        self.stand, self.looks = stand or Stand(), stand is None
        self.found: list[_Ready] | None = None
        self.device = -1
        self.strides: list[tuple[int, ...]] = []
        self.left = 3  # calls to look at: the first compiles

    def __call__(self, *tensors: torch.Tensor) -> None:
        if self.found is None:
            self._look(tensors)
            return
        if self.looks:
            self.stand.look()
        now, bits = self.stand.now, 0
        for _, _, held, slots, _ in self.found:
            for place, index, offset in slots:
                held[place] = at = tensors[index].data_ptr() + offset
                bits |= at
        odd = bits & 15 or now is None or now[0] != self.device
        if odd or (self.strides and [tensors[i].stride() for i in self.strides_of] != self.strides):
            self.fn(*tensors)
            return
        for launch, arguments, _, _, _ in self.found:
            arguments[3] = now[1]
            launch(*arguments)

    def _look(self, tensors: tuple[torch.Tensor, ...]) -> None:
        """Call `fn`, and see what it launches."""
        if not self.left:
            self.fn(*tensors)
            return
        self.left -= 1
        seen = _SEEN[get_ident()] = []
        try:
            with _Work() as work:
                self.fn(*tensors)
        finally:
            del _SEEN[get_ident()]
        if work.there:
            self.left = 0
            return
        if not seen or not all(seen):  # nothing was launched, or something was compiled
            return
        ready = [self._ready(tensors, *launch[:3]) for launch in seen]
        if all(one is not None for one in ready):
            self.strides = [tensors[i].stride() for i in self.strides_of]
            self.device, self.found = seen[0][3], [one for one in ready if one is not None]

    def _ready(
        self, tensors: tuple[torch.Tensor, ...], found: Found, grid: tuple[int, ...], args: tuple[Any, ...]
    ) -> _Ready | None:
        """One launch with the places of its addresses; None where one is no tensor of the caller's."""
        slots, kept = [], []
        arguments = [*(*grid, 1, 1)[:3], 0, *found.before, *found.arguments(list(args))]
        held = arguments
        if found.packed:
            held = arguments[-1] = list(arguments[-1])
        first = len(held) - len(args) - len(found.fixed)
        for place, value in enumerate(args, first):
            if not isinstance(value, torch.Tensor):
                continue
            held[place] = value.data_ptr()
            source = next((i for i, t in enumerate(tensors) if t is value), None)
            if source is None:  # a part of one of them: of the nearest that begins before it
                before = [i for i, t in enumerate(tensors) if _same_memory(t, value) and t.data_ptr() <= value.data_ptr()]
                source = max(before, key=lambda i: tensors[i].data_ptr(), default=None)
            if source is not None:
                slots.append((place, source, value.data_ptr() - tensors[source].data_ptr()))
            elif self.own:
                kept.append(value)
            else:
                return None
        return _Ready(found.launch, arguments, held, slots, kept)


class Layered:
    """A `Prepared` for tensors of all layers: addresses that can be reckoned are, and no tensor is asked for them.

    Of the tensors that `prepared` takes, `columns` has the one of all layers, those layer by layer, which lie at equal distances,
    or None: given at each call, in this order. As `prepared`, it is told of a stand, which is to have looked.
    """

    def __init__(self, prepared: Prepared, *columns: torch.Tensor | Sequence[torch.Tensor] | None) -> None:
        self.prepared, self.stand, self.columns = prepared, prepared.stand, columns
        self.free = [k for k, column in enumerate(columns) if column is None]
        self.turns = [(self.free.index(k), which) for which, k in enumerate(prepared.strides_of)]
        self.now: tuple[int, int] | None = None  # the stand's, as all below was made
        self.launches: list[tuple[Callable[..., Any], list[Any]]] = []  # none: each call goes by `prepared`
        # Addresses in the lists that launches are called with: (list, place, the first layer's, how far on the next is).
        self.reckoned: list[tuple[list[Any], int, int, int]] = []
        self.given: list[tuple[list[Any], int, int, int]] = []  # (list, place, which of those given, offset)

    def __call__(self, layer: int, *given: torch.Tensor) -> None:
        now, bits = self.stand.now, 0
        if now is not self.now:
            self._set_up(now)
        for held, place, first, step in self.reckoned:
            held[place] = first + layer * step
        for held, place, which, offset in self.given:
            held[place] = at = given[which].data_ptr() + offset
            bits |= at
        if not self.launches or bits & 15 or (self.turns and self._turned(given)):
            self.prepared(*self.all_of(layer, given))
            return
        for launch, arguments in self.launches:
            launch(*arguments)

    def all_of(self, layer: int, given: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        """What `prepared` takes."""
        rest = iter(given)
        return [next(rest) if c is None else c if isinstance(c, torch.Tensor) else c[layer] for c in self.columns]

    def _turned(self, given: tuple[torch.Tensor, ...]) -> bool:
        """Whether strides are others than those that the launches were made for."""
        return any(given[k].stride() != self.prepared.strides[which] for k, which in self.turns)

    def _set_up(self, now: tuple[int, int] | None) -> None:
        """Take over the launches of `prepared`, unless they are not known yet, or not for addresses as these."""
        self.now, self.launches, self.reckoned, self.given, bits = None, [], [], [], 0
        found = self.prepared.found
        if now is None or found is None or self.prepared.device != now[0]:
            return
        for launch, arguments, held, slots, _ in found:
            for place, k, offset in slots:
                column = self.columns[k]
                if column is None:
                    self.given.append((held, place, self.free.index(k), offset))
                    continue
                at = [t.data_ptr() + offset for t in ([column] if isinstance(column, torch.Tensor) else column)]
                step = at[1] - at[0] if len(at) > 1 else 0
                assert all(address == at[0] + i * step for i, address in enumerate(at)), "layers lie at unequal distances"
                self.reckoned.append((held, place, at[0], step))
                bits |= at[0] | step
            arguments[3] = now[1]
            self.launches.append((launch, arguments))
        self.now, self.launches = now, [] if bits & 15 else self.launches


class _Work(TorchDispatchMode):
    """Notes whether torch computes anything within: more than memory that is taken and views that are made."""

    there = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        view = not schema.is_mutable and any(one.alias_info is not None for one in schema.returns)
        self.there |= not view and not schema.name.startswith(("aten::empty", "aten::new_empty"))
        return func(*args, **(kwargs or {}))


class _Ready(NamedTuple):
    """A launch and all it is called with, the stream in place 3; `held` is the list that has its addresses, at `slots`.

    A slot is (place, tensor, offset in bytes). `kept` are tensors that `fn` made.
    """

    launch: Callable[..., Any]
    arguments: list[Any]
    held: list[Any]
    slots: list[tuple[int, int, int]]
    kept: list[torch.Tensor]


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _wide_class(value: int) -> int:
    """Signed or unsigned 64 bits, a multiple of 16 or not."""
    return (3 if value & 15 else 17) + (32 if value > 0x7FFFFFFFFFFFFFFF else 0)


@cache
def _driver() -> tuple[Callable[[], int], Callable[[int], int], Any]:
    """(current device, raw current stream of a device, Triton's launch hooks)."""
    active = triton.runtime.driver.active
    return active.get_current_device, active.get_current_stream, triton.knobs.runtime


def _hooked(hooks: Any) -> bool:
    """Whether a profiler wants to see launches."""
    enter, leave = hooks.launch_enter_hook, hooks.launch_exit_hook
    return bool((enter is not None and getattr(enter, "calls", True)) or (leave is not None and getattr(leave, "calls", True)))


def runs_on(device: torch.device) -> bool:
    """True if kernels can run on tensors of this device."""
    if triton is None:
        return False
    if device.type == "cuda":
        return _capability(device.index if device.index is not None else torch.cuda.current_device()) >= MIN_CAPABILITY
    return INTERPRETED and device.type == "cpu"


def use_triton(*tensors: torch.Tensor) -> bool:
    """True if a kernel can take all these tensors."""
    for t in tensors:
        if t.dtype not in _DTYPES:
            return False
    return runs_on(tensors[0].device)


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def capability_of(x: torch.Tensor) -> tuple[int, int]:
    """The compute capability of the GPU that x, a CUDA tensor, is on."""
    return _capability(x.get_device())


@cache
def processors(device: torch.device) -> int:
    """The multiprocessors of a GPU; elsewhere a small number, with which every plan can be made."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


_HERE = nullcontext()


@cache
def _several_gpus() -> bool:
    return torch.cuda.device_count() > 1


def on_device(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one for a launch; Triton launches on the current one."""
    if x.is_cuda and _several_gpus() and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _HERE


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """(…, D) as (N, D) with neighbouring columns next to each other; a view where that is possible."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def check_rows(name: str, x: torch.Tensor) -> None:
    """Raises: ValueError unless x is (N, D) with stride 1 along D, as kernels address it."""
    if x.dim() != 2 or (x.stride(1) != 1 and x.shape[1] > 1):
        raise ValueError(f"{name} must be (N, D) with stride 1 along D, not {tuple(x.shape)} with strides {x.stride()}.")
