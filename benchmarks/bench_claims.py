"""Measure what the README and the pages claim, the most important first.

This is what `pytest benchmarks/ --benchmark-only` runs, in about five minutes on two cores.
`claims` pairs each sentence with the groups of variants that decide it.
"""

from collections.abc import Iterator
from functools import cache, partial

import torch

from benchmarks import (
    bench_autoregressive,
    bench_interop,
    bench_layers,
    bench_ops,
    bench_sequences,
    bench_splines,
)
from benchmarks.bench_splines import NAMES, Vectors
from benchmarks.harness import models
from benchmarks.harness.claims import Claim
from benchmarks.harness.models import Spec
from benchmarks.harness.session import Bench, Group, Measured, Missing, measured_row
from benchmarks.harness.single_layers import LAYERS

test_claim = measured_row
ROUNDS = 5
STORED, REVERSIBLE = "mflow_kernels, stored", "mflow_kernels, reversible"
STORING = ("plain", "plain, channels_last", "FrEIA", "normflows", "nflows")
RECOMPUTING = ("checkpointing", "memcnn")
ACCELERATED = "mflow_kernels, accelerated"


def _glow(task: str, spec: Spec, variants: tuple[str, ...], memory: bool = False) -> Group:
    measured = partial(
        models.measure, spec=spec, task=task, variants=variants, rounds=ROUNDS, memory=memory
    )
    return Group(f"{task}, {spec}", (*str(spec).split(), task), variants, measured)


def _spline(task: str, spec: Vectors) -> Group:
    names = tuple(name for name in NAMES if name != bench_splines.COMPILED)
    measured = partial(bench_splines.measure, spec=spec, task=task, names=names)
    return Group(f"spline flow, {task}, {spec}", (str(spec), task), names, measured)


def _accelerated(library: str, spec: Spec, memory: bool) -> Group:
    variants = bench_interop.VARIANTS[: 3 if memory else 2]
    measured = partial(
        bench_interop.measure, library=library, spec=spec, variants=variants, memory=memory
    )
    return Group(f"{library}, {spec}", (library, *str(spec).split()), variants, measured)


def _of(module: object, gpu: bool, start: str) -> tuple[Group, ...]:
    """The groups of another file's default set whose names begin with `start`."""
    groups = module.groups("default", gpu)  # type: ignore[attr-defined]
    return tuple(group for group in groups if group.name.startswith(start))


def _low_precision(group: Group) -> Group:
    """The group, if the CPU multiplies bfloat16."""

    def measure(bench: Bench) -> Measured:
        if bench.device.type == "cpu" and not (
            torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        ):
            raise Missing("this CPU does not multiply bfloat16")
        return group.measure(bench)

    return Group(group.name, group.words, group.variants, measure)


@cache
def claims(gpu: bool) -> list[Claim]:
    """Return every claim, by importance."""
    base = Spec(side=64, width=256, batch=32) if gpu else Spec()
    deep = _glow(
        "train", base._replace(steps=32), (REVERSIBLE, STORED, *STORING, *RECOMPUTING), memory=True
    )
    made = [
        Claim("deep-memory", "Glow of 96 steps, reversible: at most a quarter of the peak memory",
              (deep,), REVERSIBLE, STORING, 0.25, memory=True),
        Claim("deep-time", "The same: at most 1.25 of plain PyTorch's time for it",
              (deep,), REVERSIBLE, ("plain",), 1.25),
        Claim("deep-savers", "The same: faster than other ways to save memory",
              (deep,), REVERSIBLE, RECOMPUTING),
        Claim("deep-stored", "Glow of 96 steps, stored: a faster training step than any peer",
              (deep,), STORED, STORING),
    ]  # fmt: skip
    made += [
        Claim(f"alone-{kind}", f"{kind} alone is no slower than its peers: forward, inverse, "
              "training step", tuple(bench_layers.alone(kind, task, size, False)
              for size in bench_layers.sizes(gpu) for task in bench_layers.TASKS),
              "mflow_kernels", ("plain", "FrEIA", "normflows"))
        for kind in LAYERS
    ]  # fmt: skip
    vectors = [Vectors(10, 256, 64), Vectors(64, 128, 64), Vectors(6, 1024, 128)]
    training = tuple(_spline("train", each) for each in vectors)
    others = tuple(_spline(task, vectors[0]) for task in ("forward", "sample"))
    libraries = ("nflows", "normflows", "zuko")
    made += [
        Claim("splines-train", "A spline flow trains in at most 0.7 of the time",
              training, "mflow_kernels", libraries, 0.7),
        Claim("splines-other", "Its density and samples take at most 0.7 of the time",
              others, "mflow_kernels", libraries, 0.7),
        *(Claim(f"splines-{name}", f"accelerate(a spline flow of {name}): at most 0.7 of the time "
                "of a training step", training, f"accelerated {name}", (name,), 0.7)
          for name in libraries),
    ]  # fmt: skip
    autoregressive = _of(bench_autoregressive, gpu, "autoregressive, sample")
    if autoregressive:
        made += [
            Claim("autoregressive", "A masked autoregressive layer inverts in at most half of the "
                  "time", autoregressive, "mflow_kernels", ("nflows",), 0.5),
            Claim("accelerate-autoregressive", "accelerate(a masked autoregressive layer of "
                  "nflows): the same", autoregressive, "accelerated nflows", ("nflows",), 0.5),
        ]  # fmt: skip
    short = {
        steps: _glow("train", base._replace(levels=1, steps=steps),
                     (REVERSIBLE, STORED, "plain", "plain, channels_last", "FrEIA", "normflows"),
                     memory=True)
        for steps in (8, 32)
    }  # fmt: skip
    for steps, part in ((8, 0.5), (32, 0.25)):
        group, peers = (short[steps],), ("plain", "plain, channels_last", "FrEIA", "normflows")
        made += [
            Claim(f"chain{steps}-stored", f"A chain of {steps} steps, stored: a faster training "
                  "step than any peer", group, STORED, peers),
            Claim(f"chain{steps}-time", f"A chain of {steps} steps, reversible: at most 1.25 of "
                  "plain PyTorch's time", group, REVERSIBLE, ("plain",), 1.25),
            Claim(f"chain{steps}-memory", f"A chain of {steps} steps, reversible: at most {part:g} "
                  "of the peak memory", group, REVERSIBLE, peers, part, memory=True),
        ]  # fmt: skip
    penalty = _of(bench_ops, gpu, "masked_penalty")[:2]
    made.append(Claim("penalty", "The penalty and its gradient are faster than eager and compiled",
                      penalty, "mflow_kernels", ("eager", "compiled")))  # fmt: skip
    for library, spec in bench_interop.specs_of("default", gpu):
        if library == "two moons" or (library == "FastFlow" and spec.channels > 64):
            continue
        if library == "CFLOW-AD" and spec.channels < 512:  # left as it is
            continue
        saves = library in ("normflows", "FrEIA", "FastFlow")
        group = (_accelerated(library, spec, saves),)
        made.append(Claim(f"accelerate-{library}", f"accelerate(a model of {library}): no slower "
                          "to train", group, ACCELERATED, ("original",)))  # fmt: skip
        if saves:
            reversibly, original = f"{ACCELERATED} reversibly", ("original",)
            made += [
                Claim(f"reversible-{library}", "The same, reversible=True: at most half of the "
                      "peak memory", group, reversibly, original, 0.5, memory=True),
                Claim(f"reversible-time-{library}", "The same: at most 1.5 of the time for it",
                      group, reversibly, original, 1.5),
            ]  # fmt: skip
    for task, what in (("forward", "density"), ("sample", "samples")):
        group = (_glow(task, base, (STORED, *STORING)),)
        made.append(Claim(f"glow-{task}", f"Glow of 24 steps: {what} faster than any peer",
                          group, STORED, STORING))  # fmt: skip
    low = base._replace(steps=8, precision="bfloat16")
    low_group = _low_precision(_glow("train", low, (STORED, "plain", "plain, channels_last")))
    made.append(Claim("bfloat16", "Networks in bfloat16: a faster training step than plain's",
                      (low_group,), STORED, ("plain", "plain, channels_last")))  # fmt: skip
    sequences = _of(bench_sequences, gpu, "Glow-TTS")
    made += [
        Claim("sequences-time", "Glow-TTS' decoder, stored: no slower to train than as published",
              sequences, STORED, ("original",)),
        Claim("sequences-memory", "The same, reversible: at most 0.4 of the peak memory",
              sequences, REVERSIBLE, ("original",), 0.4, memory=True),
    ]  # fmt: skip
    one_step = base._replace(levels=1, steps=8 if gpu else 2)
    compiled = _glow("train", one_step, (STORED, f"{STORED}, compiled", "plain", "plain, compiled"))
    made.append(
        Claim("compiled", "torch.compile of a stored chain: no slower than of plain PyTorch's",
              (compiled,), f"{STORED}, compiled", ("plain, compiled",))
    )  # fmt: skip
    return made


def groups(size: str, gpu: bool) -> Iterator[Group]:
    """Yield the groups of all claims, each once. There is no tiny set: other files have one."""
    seen: dict[str, Group] = {}
    if size != "tiny":
        for claim in claims(gpu):
            for group in claim.groups:
                seen.setdefault(group.name, group)
    yield from seen.values()
