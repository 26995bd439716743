"""Calling a network or layer a second time so that it repeats its first run.

A reversible backward pass calls each module again. The second run must draw the same random
numbers, use the same modes and the same autocast, and leave running statistics alone. This module
arranges that. It cannot restore other state, such as a module's own `torch.Generator` or a counter,
and the gradients would then be wrong without an error. The first backward pass through a module
therefore compares fingerprints of both runs, and raises if they differ.

Gradients are those of tensors that the first run under gradients was *seen* to depend on. A module
may use tensors that it does not own. A gradient that cannot be given is an error, never missing.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mflow_kernels.ops.launch import capturing
from mflow_kernels.reversible.fingerprints import ROUNDING, difference, fingerprint
from mflow_kernels.reversible.graph import STORE, Guard, nodes_behind
from mflow_kernels.reversible.instructions import Call
from mflow_kernels.reversible.modes import RandomState, random_state_of

# Modules with layers that use only what they own.
PLAIN = ("torch.nn.modules.", "mflow_kernels.layers.networks")


@dataclass
class Known:
    """What the first run of a module showed, in the modes in which it ran.

    Attributes:
        others: the leaves that it depends on and does not own.
        plain: whether it has modules of torch alone, which use no tensors but their own.
        changes_input: whether it changes its input in place. It then gets a copy.
        keeps_graph: whether its tensors outlived the run, as when hooks collect activations. Each
            run then records a graph that refuses to be differentiated.
        draws: whether it draws random numbers from the default generators; None until the two runs
            have been compared.
    """

    others: list["weakref.ref[Tensor]"]
    plain: bool = False
    changes_input: bool = False
    keeps_graph: bool = False
    draws: bool | None = None


# By module and by what may change in it: the method, types and modes of its modules, and hooks.
_known: "weakref.WeakKeyDictionary[nn.Module, dict[Any, Known]]" = weakref.WeakKeyDictionary()


class RerunCall:
    """A call of a module that a backward pass will make again, and the module's tensors.

    Attributes:
        ordinal: its place in the order of the calls of a program.
        random: the random state from which its first run started; None if it drew no numbers.
    """

    random: "RandomState | None" = None
    _fingerprints: list[Tensor] | None = None  # of the first run, if the second must be compared
    difference: Tensor | None = None  # of the two runs, if they were compared

    def __init__(self, call: Call, ordinal: int = 0) -> None:
        self.module, self.function, self.ordinal = call.module, call.function, ordinal
        self._modules = modules = _modules_of(call.module)
        self._modes = tuple(m.training for m in modules)
        self._norms = [m for m in modules if isinstance(m, _NormBase) and m.training]
        self._parameters: list[tuple[dict[str, Tensor], str, Tensor, bool]] = []
        hooks = 0
        for m in modules:
            hooks += len(m._forward_hooks) + len(m._forward_pre_hooks)
            store = _parameters_of(m)
            for name, p in store.items():
                if p is not None:
                    self._parameters.append((store, name, p, p.requires_grad))
        types = tuple(map(type, modules))
        self._key = getattr(call.function, "__name__", ""), types, self._modes, hooks
        self.known = _known.get(self.module, {}).get(self._key)

    @property
    def name(self) -> str:
        return f"network {self.ordinal} ({type(self.module).__name__})"

    @cached_property
    def sources(self) -> list[Tensor]:
        """The leaves that the call depends on and that require gradients, known after the first
        run."""
        owned = [p for *_, p, trained in self._parameters if trained]
        others = [ref() for ref in self.known.others] if self.known else []
        found = {id(t): t for t in (*owned, *others) if t is not None}
        return list(found.values())

    @property
    def buffers(self) -> list[Tensor]:
        """Buffers whose change before the backward pass would change the gradients.

        In training, a norm uses the statistics of its batch and not the running ones.
        """
        return [b for *_, b in self._named_buffers()]

    def _named_buffers(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        for m in self._modules:
            for name, b in () if m in self._norms else _buffers_of(m).items():
                if b is not None and not b.is_inference():
                    yield m, name, b

    def first_run(self, module_input: Tensor, context: Sequence[Tensor]) -> Any:
        """Call the module as the forward pass does, without gradients.

        Raises:
            RuntimeError: its result depends on tensors whose gradient the backward pass cannot
                give, or it changed its input unexpectedly.
            TypeError: it has lazy parameters that no call has initialized.
        """
        # A call initializes lazy parameters, and changes the types of their modules.
        if self.known is None and any(nn.parameter.is_lazy(p) for _, _, p, _ in self._parameters):
            raise TypeError(
                f"ReversibleChain: {self.name} has lazy parameters; call `initialize` with a first "
                "batch before"
            )
        if capturing(module_input.device):
            self._check_capturable()
        if (self.known is None or self.known.draws is None) and not module_input.is_meta:
            return self._run_seen(module_input, context)
        known = self.known
        if known is not None and known.keeps_graph:
            return _detached(self._run_guarded(module_input, context)[0])
        given = module_input.clone() if known is not None and known.changes_input else module_input
        version = given._version
        result = self.function(given, *context)
        if given is module_input and given._version != version:
            self._raise(
                "changed its input in place, and did not in its first run; the stored states would "
                "be wrong"
            )
        return result

    def _run_guarded(
        self, module_input: Tensor, context: Sequence[Tensor]
    ) -> tuple[Any, list[Tensor], Tensor, Any]:
        """Call the module with gradients enabled, on a copy of its input. Its graph raises an error
        if it is differentiated, since it is no part of the chain's.

        Returns:
            The result; the leaves that it was called with; the copy; and the first node of its
            graph, which lives as long as the graph.
        """
        leaves = [module_input.detach().requires_grad_(), *context]
        with torch.enable_grad():
            given = Guard.apply(leaves[0], self.name)
            guard = given.grad_fn  # another one if the module changes its input
            result = self.function(given, *leaves[1:])
        return result, leaves, given, guard

    def _run_seen(self, module_input: Tensor, context: Sequence[Tensor]) -> Any:
        saved: list[Tensor] = [module_input]
        self._statistics = [
            (m, {k: None if b is None else b.clone() for k, b in m._buffers.items()})
            for m in self._norms
        ]
        with self._recorded(saved):
            result, leaves, given, guard = self._run_guarded(module_input, context)
        tensors = tensors_of(result)
        found = self._leaves_behind(tensors, guard._sequence_nr())
        owned = {id(p) for _, _, p, _ in self._parameters} | {id(leaf) for leaf in leaves}
        known = Known([weakref.ref(leaf) for leaf in found if id(leaf) not in owned])
        known.plain = all(type(m).__module__.startswith(PLAIN) for m in self._modules)
        known.changes_input = given._version > 0
        self._fingerprints = [fingerprint(t) for t in (*saved, *tensors)]
        result = _detached(result)
        alive = weakref.ref(guard)
        del tensors, given, guard, leaves, saved
        known.keeps_graph = alive() is not None
        self.known = _known.setdefault(self.module, {}).setdefault(self._key, known)
        self.known.others, self.known.keeps_graph = known.others, known.keeps_graph
        return result

    def _leaves_behind(self, outputs: Sequence[Tensor], start: int) -> list[Tensor]:
        """The leaves that the outputs depend on.

        Raises:
            RuntimeError: they depend on a graph that is older than this run, whose first node has
                number `start`.
        """
        if isinstance(self.module, torch.jit.ScriptModule):
            return []  # it owns all that it uses, and its nodes are numbered in another way
        leaves: dict[int, Tensor] = {}
        for node in nodes_behind(outputs, start):
            leaf = getattr(node, "variable", None)
            if leaf is not None:
                leaves[id(leaf)] = leaf
            elif node._sequence_nr() < start:
                self._raise(
                    "uses a tensor that was computed outside of it from tensors that require "
                    "gradients, as by a network that makes its weights; they would get no gradient"
                )
        return list(leaves.values())

    def run_again(self, module_input: Tensor, context: Sequence[Tensor]) -> Any:
        """Call the module as in its first run, but with gradients, which must be enabled.

        Raises:
            RuntimeError: a parameter was replaced by another tensor, or the module changed a
                buffer.
        """
        given = module_input
        if self.known is not None and self.known.changes_input:
            given = module_input.clone()
        with self.as_in_forward():
            if self._fingerprints is None:
                return self.function(given, *context)
            before = [(m, name, b, b._version) for m, name, b in self._named_buffers()]
            saved = [module_input.detach().clone()]
            with self._recorded(saved):
                result = self.function(given, *context)
            for module, name, buffer, version in before:
                if _buffers_of(module).get(name) is not buffer or buffer._version != version:
                    self.raise_not_repeated(f"changed its buffer {name} again")
        again = [fingerprint(t) for t in (*saved, *tensors_of(result))]
        self.difference = difference(self._fingerprints, again)
        return result

    @contextmanager
    def as_in_forward(self) -> Iterator[None]:
        """Restore the modes and random numbers of the first run, and hide running statistics."""
        for store, name, p, _ in self._parameters:
            if store.get(name) is not p:
                raise RuntimeError(
                    "ReversibleChain: after the forward pass a parameter was replaced by another "
                    "tensor (as torch.func.functional_call does); reversible=False allows that"
                )
        pairs = zip(self._modules, self._modes, strict=True)
        switched = [(m, mode) for m, mode in pairs if m.training is not mode]
        buffers = [(m, dict(m._buffers)) for m in self._norms]
        for module, mode in switched:
            module.training = mode
        for m in self._norms:
            # Without buffers for the running statistics, it does not update them a second time.
            m._buffers.update(dict.fromkeys(m._buffers))
        if self._fingerprints is not None:
            # The runs save the same tensors only if both have statistics.
            for m, before in self._statistics:
                m._buffers.update(before)
        try:
            with random_state_of(self.random), self.trained_as_in_forward():
                yield
        finally:
            for m, original in buffers:
                m._buffers.update(original)
            for module, mode in switched:
                module.training = not mode

    @contextmanager
    def trained_as_in_forward(self) -> Iterator[None]:
        """Require gradients of those parameters that required them in the forward pass."""
        changed = [(p, flag) for *_, p, flag in self._parameters if p.requires_grad is not flag]
        for p, flag in changed:
            p.requires_grad_(flag)
        try:
            yield
        finally:
            for p, flag in changed:
                p.requires_grad_(not flag)

    @contextmanager
    def _recorded(self, saved: list[Tensor]) -> Iterator[None]:
        """Append what a run's gradients depend on: the tensors that it saves for backward, random
        masks included. Its results alone are not enough, because they are zero while the last layer
        is zero."""
        if isinstance(self.module, torch.jit.ScriptModule):  # its runs save other tensors
            yield
            return
        known = {id(b) for m in self._modules for b in _buffers_of(m).values()}
        known |= {id(p) for _, _, p, _ in self._parameters}

        def pack(tensor: Tensor) -> Tensor:
            detached = tensor.detach()  # `tensor` itself would form a reference cycle
            if id(tensor) not in known and tensor.numel() and not tensor.is_complex():
                saved.append(detached)  # an operator may fill it after this
            return detached

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    def check_sources(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        """Raise RuntimeError if outputs depend on a leaf that is none of the inputs."""
        if self.known is None or self.known.plain:
            return
        given = set(map(id, inputs))
        for node in nodes_behind(outputs):
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in given:
                self._raise(
                    f"depends on a tensor of shape {tuple(leaf.shape)} that requires gradients and "
                    "that it did not use in its first run; it would get no gradient"
                )

    def _raise(self, what: str) -> NoReturn:
        raise RuntimeError(f"ReversibleChain: {self.name} {what}; {STORE}")

    def raise_not_repeated(self, what: str) -> NoReturn:
        raise RuntimeError(
            f"ReversibleChain: run again in the backward pass, {self.name} {what}: it has state "
            "that cannot be restored, such as its own torch.Generator, a counter, or a buffer that "
            f"it changes. Its gradients would be wrong; {STORE}"
        )

    def remember(self, draws: bool) -> None:
        """Record that its two runs agreed in these modes, and whether they drew random numbers."""
        _known.setdefault(self.module, {}).setdefault(self._key, Known([])).draws = draws

    def _check_capturable(self) -> None:
        """Raise RuntimeError unless the module can run twice in a CUDA graph, which cannot restore
        the random state."""
        if self.known is None or self.known.draws is None:
            raise RuntimeError(
                "ReversibleChain: before capturing a CUDA graph, run one forward and backward "
                "pass, which shows whether a network draws random numbers"
            )
        if self.known.draws:
            raise RuntimeError(
                f"ReversibleChain: {self.name} draws random numbers, which a CUDA graph cannot "
                "draw a second time in the backward pass; reversible=False allows that"
            )


def _modules_of(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, torch.jit.ScriptModule):
        return list(module.modules())
    modules = [module]
    for m in modules:  # `module.modules()` takes three times as long
        modules += [child for child in m._modules.values() if child is not None]
    return list(dict.fromkeys(modules))


def _parameters_of(module: nn.Module) -> dict[str, Tensor]:
    if isinstance(module, torch.jit.ScriptModule):
        return dict(module.named_parameters(recurse=False))
    return module._parameters  # type: ignore[return-value]


def _buffers_of(module: nn.Module) -> dict[str, Tensor]:
    if isinstance(module, torch.jit.ScriptModule):
        return dict(module.named_buffers(recurse=False))
    return module._buffers  # type: ignore[return-value]


def tensors_of(result: Any) -> list[Tensor]:
    parts = result if isinstance(result, (tuple, list)) else (result,)
    return [t for t in parts if isinstance(t, Tensor)]


def _detached(result: Any) -> Any:
    if isinstance(result, (tuple, list)):
        return type(result)(map(_detached, result))
    return result.detach() if isinstance(result, Tensor) else result


def check_repeats(calls: Sequence[RerunCall]) -> None:
    """Check the calls whose two runs were compared, and remember that they agreed.

    Raises:
        RuntimeError: a module computed something else.
    """
    differences = {c: c.difference for c in calls if c.difference is not None}
    if not differences:
        return
    found = torch.stack(list(differences.values())).tolist()
    for call, value in zip(differences, found, strict=True):
        if value > ROUNDING:
            call.raise_not_repeated(f"computed something else (relative difference {value:.2g})")
        call.remember(draws=call.random is not None)
