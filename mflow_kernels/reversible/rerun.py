"""Calling a network or layer a second time so that it repeats its first run.

A reversible backward pass calls each module again. The second run must use the same random
numbers, the same modes and the same autocast, and leave running statistics alone. This module
arranges that. It cannot restore other state, such as a counter, and the gradients would then be
wrong without an error. The first backward pass through a module therefore compares fingerprints of
both runs, and raises if they differ. The first run also compares what a layer's inverse rebuilds
with its input.

Gradients are those of tensors that the first run under gradients was *seen* to depend on. A module
may use tensors that it does not own. A gradient that cannot be given is an error, never missing.
"""

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize

from mflow_kernels.ops.launch import capturing
from mflow_kernels.ops.precision import accumulator
from mflow_kernels.reversible.draws import Drawn, DrewOtherNumbers, Recorded, Refused, Repeated
from mflow_kernels.reversible.fingerprints import ROUNDING, difference, fingerprint
from mflow_kernels.reversible.graph import STORE, Guard, nodes_behind
from mflow_kernels.reversible.instructions import Call
from mflow_kernels.reversible.modules import (
    Known,
    buffers_of,
    detached,
    modules_of,
    parameters_of,
    tensors,
    trained,
    versions,
)

# Modules with layers that use only what they own.
PLAIN = ("torch.nn.modules.", "mflow_kernels.layers.networks")
# An inverse may be iterative, with a tolerance of its own. Low precision rounds by more.
INVERSE = 1e-3
# Held while a module's running statistics are hidden, and while a module that updates such
# statistics runs for the first time: another thread may train the same chain.
_statistics_lock = threading.RLock()


# By module and by what may change in it: the method, types and modes of its modules, and hooks.
_known: "weakref.WeakKeyDictionary[nn.Module, dict[Any, Known]]" = weakref.WeakKeyDictionary()


class RerunCall:
    """A call of a module that a backward pass will make again, and the module's tensors.

    Attributes:
        ordinal: its place in the order of the calls of a program.
        drawn: what its first run drew; None if that was not recorded.
    """

    drawn: list[Drawn | None] | None = None
    _fingerprints: list[Tensor] | None = None  # of the first run, if the second must be compared
    difference: Tensor | None = None  # of the two runs, if they were compared

    def __init__(self, call: Call, ordinal: int = 0) -> None:
        self.module, self.function, self.ordinal = call.module, call.function, ordinal
        self._call = call
        # One loop without calls in Python, since each step runs it for each network.
        self._modules = modules = modules_of(call.module)
        self._norms: list[_NormBase] = []
        self._parameters: list[tuple[dict[str, Tensor], str, Tensor, bool]] = []
        self._buffers: list[tuple[nn.Module, dict[str, Tensor]]] = []
        hooks, modes = 0, []
        for m in modules:
            modes.append(m.training)
            hooks += len(m._forward_hooks) + len(m._forward_pre_hooks)
            scripted = isinstance(m, torch.jit.ScriptModule)
            parameters: Any = parameters_of(m) if scripted else m._parameters
            buffers: Any = buffers_of(m) if scripted else m._buffers
            for name, p in parameters.items():
                if p is not None:
                    self._parameters.append((parameters, name, p, p.requires_grad))
            if m.training and isinstance(m, _NormBase):
                self._norms.append(m)
            elif buffers:
                self._buffers.append((m, buffers))
        self._modes = tuple(modes)
        types = tuple(map(type, modules))
        self._key = getattr(call.function, "__name__", ""), types, self._modes, hooks
        self.known = _known.get(self.module, {}).get(self._key)

    @property
    def name(self) -> str:
        return f"{self._call.place or f'network {self.ordinal}'} ({type(self.module).__name__})"

    @cached_property
    def sources(self) -> list[Tensor]:
        """The leaves that the call depends on and that require gradients, known after the first
        run."""
        found: dict[int, Tensor] = {}
        for *_, p, flag in self._parameters:
            if flag:
                found[id(p)] = p
        for ref in self.known.others if self.known else ():
            t = ref()
            if t is not None:
                found[id(t)] = t
        return list(found.values())

    @property
    def buffers(self) -> list[Tensor]:
        """Buffers whose change before the backward pass would change the gradients.

        In training, a norm uses the statistics of its batch and not the running ones.
        """
        return [b for *_, b in self._named_buffers()] if self._buffers else []

    def _named_buffers(self) -> Iterator[tuple[nn.Module, str, Tensor]]:
        for m, buffers in self._buffers:
            for name, b in buffers.items():
                if b is not None and not b.is_inference():
                    yield m, name, b

    def first_run(
        self, module_input: Tensor, context: Sequence[Tensor], *, draws: bool = False
    ) -> Any:
        """Call the module as the forward pass does, without gradients.

        Args:
            draws: record what it draws, also if its first run under gradients drew nothing.

        Raises:
            RuntimeError: its result depends on tensors whose gradient the backward pass cannot
                give, it changed its context, or changed its input unexpectedly.
            TypeError: it has lazy parameters that no call has initialized.
        """
        before = versions(context) if context else []
        with _statistics_lock if self._norms else nullcontext():
            result = self._first_run(module_input, context, draws)
        if before and before != versions(context):
            self._raise("changed its context in place, which its second run would change again")
        return result

    def _first_run(self, module_input: Tensor, context: Sequence[Tensor], draws: bool) -> Any:
        # A call initializes lazy parameters, and changes the types of their modules.
        if self.known is None and any(nn.parameter.is_lazy(p) for _, _, p, _ in self._parameters):
            raise TypeError(
                f"ReversibleChain: {self.name} has lazy parameters; call `initialize` with a first "
                "batch before"
            )
        unseen = self.known is None or self.known.draws is None
        if unseen and capturing(module_input.device):
            raise RuntimeError(
                "ReversibleChain: before capturing a CUDA graph, run one forward and backward "
                "pass, which shows what a network does"
            )
        if unseen and not module_input.is_meta:
            return self._run_seen(module_input, context)
        known = self.known
        if known is not None and (known.draws or draws):
            known.draws = True
            with Recorded(module_input.device) as recorded:
                result = self._run_known(module_input, context)
            self.drawn = recorded.drawn
            return result
        return self._run_known(module_input, context)

    def _run_known(self, module_input: Tensor, context: Sequence[Tensor]) -> Any:
        known = self.known
        if known is not None and known.keeps_graph:
            return detached(self._run_guarded(module_input, context)[0])
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
        with self._recorded(saved), Recorded(module_input.device) as recorded:
            result, leaves, given, guard = self._run_guarded(module_input, context)
        self.drawn = recorded.drawn if any(recorded.drawn) else None
        outputs = tensors(result)
        found = self._leaves_behind(outputs, guard._sequence_nr())
        owned = {id(p) for _, _, p, _ in self._parameters} | {id(leaf) for leaf in leaves}
        shapes = {weakref.ref(leaf): leaf.shape for leaf in found if id(leaf) not in owned}
        known = Known([*shapes])
        known.plain = all(type(m).__module__.startswith(PLAIN) for m in self._modules)
        known.changes_input = given._version > 0
        self._fingerprints = [fingerprint(t) for t in (*saved, *outputs)]
        result = detached(result)
        alive = weakref.ref(guard)
        del outputs, given, guard, leaves, saved, found
        known.keeps_graph = alive() is not None
        known.inner = {shape for leaf, shape in shapes.items() if leaf() is None}
        self.known = _known.setdefault(self.module, {}).setdefault(self._key, known)
        self.known.others, self.known.keeps_graph = known.others, known.keeps_graph
        self.known.inner = known.inner
        return result

    @torch.no_grad()
    def check_inverse(self, x: Tensor, z: Tensor, context: Sequence[Any]) -> None:
        """Raise RuntimeError unless the inverse rebuilds the input x from the state z, if this is
        the first run in these modes."""
        inverse: Any = self._call.inverse
        if self._fingerprints is None:
            return
        with self.as_in_forward():
            rebuilt = inverse(z, *context)[0]
        if rebuilt.shape != x.shape:
            distance, got = float("inf"), f"a state of shape {tuple(rebuilt.shape)}"
        else:
            dtype = accumulator(x.dtype)
            off, *sizes = (t.to(dtype).norm() for t in (rebuilt - x, x, z))
            distance = (off / torch.maximum(*sizes)).item()  # NaN if the run has diverged
            got = f"a state at a relative distance of {distance:.2g}"
        if distance > max(INVERSE, 8 * torch.finfo(x.dtype).eps):
            self._raise(
                f"is not undone by its inverse, which rebuilds {got} from the input; the inverse "
                "is wrong, or a hook changes what the layer returns"
            )

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
            elif type(node).__name__ == "CheckpointFunctionBackward":
                self._raise(
                    "uses torch.utils.checkpoint with use_reentrant=True, which has no gradients "
                    "for torch.autograd.grad; use_reentrant=False has them"
                )
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
        # No leaf, as in other models; some hooks refuse leaves.
        given = module_input.view_as(module_input)
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
                if buffers_of(module).get(name) is not buffer or buffer._version != version:
                    self.raise_not_repeated(f"changed its buffer {name} again")
        again = [fingerprint(t) for t in (*saved, *tensors(result))]
        self.difference = difference(self._fingerprints, again)
        return result

    def as_in_forward(self) -> AbstractContextManager[None]:
        """Restore the modes and random numbers of the first run, and hide running statistics."""
        for store, name, p, _ in self._parameters:
            if store.get(name) is not p:
                raise RuntimeError(
                    "ReversibleChain: after the forward pass a parameter was replaced by another "
                    "tensor (as by torch.func.functional_call, or FSDP2 of one layer); "
                    "reversible=False allows that"
                )
        if parametrize._cache_enabled and any(
            isinstance(m, parametrize.ParametrizationList) for m in self._modules
        ):
            self._raise(
                "has parametrized weights, and the backward pass runs inside of "
                "torch.nn.utils.parametrize.cached(), which has those of the forward pass "
                "without gradients; leave it before the backward pass"
            )
        switched = []
        for m, mode in zip(self._modules, self._modes, strict=True):
            if m.training is not mode:
                switched.append((m, mode))
        if switched or self._norms or self.drawn:
            return self._restored(switched)
        return self.trained_as_in_forward()

    @contextmanager
    def _restored(self, switched: list[tuple[nn.Module, bool]]) -> Iterator[None]:
        with _statistics_lock if self._norms else nullcontext():
            yield from self._restored_alone(switched)

    def _restored_alone(self, switched: list[tuple[nn.Module, bool]]) -> Iterator[None]:
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
        repeated = Repeated(self.drawn) if self.drawn else nullcontext()
        try:
            with repeated, self.trained_as_in_forward():
                yield
        except DrewOtherNumbers:
            self.raise_not_repeated("drew other random numbers")
        finally:
            for m, original in buffers:
                m._buffers.update(original)
            for module, mode in switched:
                module.training = not mode

    def trained_as_in_forward(self) -> AbstractContextManager[None]:
        """Require gradients of those parameters that required them in the forward pass."""
        changed = []
        for *_, p, flag in self._parameters:
            if p.requires_grad is not flag:
                changed.append((p, flag))
        return trained(changed) if changed else nullcontext()

    @contextmanager
    def _recorded(self, saved: list[Tensor]) -> Iterator[None]:
        """Append what a run's gradients depend on: the tensors that it saves for backward, random
        masks included. Its results alone are not enough, because they are zero while the last layer
        is zero."""
        if isinstance(self.module, torch.jit.ScriptModule):  # its runs save other tensors
            yield
            return
        known = {id(b) for m in self._modules for b in buffers_of(m).values()}
        known |= {id(p) for _, _, p, _ in self._parameters}

        def pack(tensor: Tensor) -> Tensor:
            detached = tensor.detach()  # `tensor` itself would form a reference cycle
            if id(tensor) not in known and tensor.numel() and not tensor.is_complex():
                saved.append(detached)  # an operator may fill it after this
            return detached

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            yield

    @contextmanager
    def differentiated(self, device: torch.device) -> Iterator[None]:
        """Raise RuntimeError if the derivative of the second run draws, as a checkpoint does that
        runs a part of it a third time: those numbers are not kept."""
        try:
            with Refused(device):
                yield
        except DrewOtherNumbers:
            self._raise(
                "draws random numbers while it is differentiated, as with dropout in a "
                "torch.utils.checkpoint; the chain stores no activations, so the checkpoint can go"
            )

    def check_sources(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> None:
        """Raise RuntimeError if outputs depend on a leaf that is none of the inputs."""
        known = self.known
        if known is None or known.plain:
            return
        given = set(map(id, inputs))
        for node in nodes_behind(outputs):
            leaf = getattr(node, "variable", None)
            if leaf is None or leaf.shape in known.inner:
                continue
            if id(leaf) not in given:
                self._raise(
                    f"depends on a tensor of shape {tuple(leaf.shape)} that requires gradients and "
                    "that it did not use in its first run; it would get no gradient"
                )

    def _raise(self, what: str) -> NoReturn:
        raise RuntimeError(f"ReversibleChain: {self.name} {what}; {STORE}")

    def raise_not_repeated(self, what: str) -> NoReturn:
        raise RuntimeError(
            f"ReversibleChain: run again in the backward pass, {self.name} {what}: it has state "
            "that cannot be restored, such as a counter, a buffer that it changes, weights "
            "changed by .data, or random numbers from outside of torch. Its gradients would be "
            f"wrong; {STORE}"
        )

    def remember(self, draws: bool) -> None:
        """Record that its two runs agreed in these modes, and whether they drew random numbers."""
        _known.setdefault(self.module, {}).setdefault(self._key, Known([])).draws = draws


def check_repeats(calls: Sequence[RerunCall]) -> None:
    """Check the calls whose two runs were compared, and remember that they agreed.

    Raises:
        RuntimeError: a module computed something else.
    """
    differences = {}
    for call in calls:
        if call.difference is not None:
            differences[call] = call.difference
    if not differences:
        return
    found = torch.stack(list(differences.values())).tolist()
    for call, value in zip(differences, found, strict=True):
        if value > ROUNDING:
            call.raise_not_repeated(f"computed something else (relative difference {value:.2g})")
        call.remember(draws=call.drawn is not None)
