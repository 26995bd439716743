"""Count, in Triton's interpreter, what each launch loads and stores.

Import this before anything that imports mflow_kernels or triton: it turns the interpreter on. Lanes
that a mask switches off move nothing and are not counted. Addresses are attributed to the tensors
that the launch was given; one that belongs to none of them is an error.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder


@dataclass
class Memory:
    """A storage that a launch was given, and the elements that it touched."""

    names: list[str]
    begin: int
    nbytes: int
    itemsize: int
    pixels: bool  # whether a tensor with pixels lives here (one of four axes, see `_cases`)
    loads: list[np.ndarray] = field(default_factory=list)
    stores: list[np.ndarray] = field(default_factory=list)

    def moved(self, accesses: list[np.ndarray]) -> tuple[int, int]:
        """Bytes moved, and bytes of the elements that were touched at all."""
        if not accesses:
            return 0, 0
        times = np.bincount(np.concatenate(accesses), minlength=1)
        return int(times.sum()) * self.itemsize, int(np.count_nonzero(times)) * self.itemsize


@dataclass
class Launch:
    kernel: str
    arguments: dict[str, Any]
    memories: list[Memory]

    def note(self, addresses: np.ndarray, store: bool) -> None:
        if not addresses.size:
            return
        low, high = int(addresses.min()), int(addresses.max())
        for memory in self.memories:
            if memory.begin <= low and high < memory.begin + memory.nbytes:
                index = (addresses - memory.begin) // memory.itemsize
                (memory.stores if store else memory.loads).append(index.astype(np.int64))
                return
        raise RuntimeError(f"{self.kernel} accesses memory that it was not given, at {low:#x}")


def _memories(arguments: dict[str, Any]) -> list[Memory]:
    found: dict[int, Memory] = {}
    for name, t in arguments.items():
        if not isinstance(t, Tensor) or not t.numel():
            continue
        storage = t.untyped_storage()
        begin = storage.data_ptr()
        memory = found.setdefault(
            begin, Memory([], begin, storage.nbytes(), t.element_size(), False)
        )
        memory.names.append(name)
        memory.pixels |= t.dim() == 4
    return list(found.values())


class _NoScope:
    def restore(self) -> None: ...


@contextmanager
def _patched_once() -> Iterator[None]:
    """The interpreter patches triton.language anew whenever one jit function calls another, which
    takes longer than interpreting; once for each module and launch is enough."""
    patch, seen = interpreter._patch_lang, set()

    def lazily(fn: Callable[..., Any]) -> Any:
        module = id(fn.__globals__)
        if module in seen:
            return _NoScope()
        seen.add(module)
        return patch(fn)

    interpreter._patch_lang = lazily
    try:
        yield
    finally:
        interpreter._patch_lang = patch


@contextmanager
def counting() -> Iterator[list[Launch]]:
    """Every launch made inside, with what it moved."""
    launches: list[Launch] = []
    run, load, store = (
        GridExecutor.__call__,
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
    )

    def call(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        names = inspect.getfullargspec(self.fn).args
        arguments = dict(zip(names, args, strict=False)) | kwargs
        launches.append(Launch(self.fn.__name__, arguments, _memories(arguments)))
        with _disable_current_modes(), _patched_once():
            run(self, *args, **kwargs)

    def masked_load(self: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].note(ptrs.data[mask.data.astype(bool)], store=False)
        return load(self, ptrs, mask, *rest)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].note(ptrs.data[mask.data.astype(bool)], store=True)
        return store(self, ptrs, value, mask, *rest)

    GridExecutor.__call__ = call
    InterpreterBuilder.create_masked_load = masked_load
    InterpreterBuilder.create_masked_store = masked_store
    try:
        yield launches
    finally:
        GridExecutor.__call__ = run
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store


def count(function: Callable[[], object]) -> list[Launch]:
    with counting() as launches:
        function()
    return launches
