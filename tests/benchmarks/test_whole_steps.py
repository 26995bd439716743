"""The counts of whole steps: their rules, and that no step needs more than is recorded."""

import json
from pathlib import Path

import pytest
from own_process import ROOT, run_python

RULES = """
from benchmarks.reports import step_counts
import torch
from torch import nn

def names(function, module, images):
    return [(k.name, k.part, k.read, k.written, k.flops) for k in
            step_counts.count(function, module, images)]

last = torch.channels_last
x = torch.zeros(2, 4, 8, 8, requires_grad=True)
image = x.numel() * 4

# A convolution's bias is a pass of its own. cuDNN first converts tensors in the other layout.
conv = nn.Conv2d(4, 4, 3, padding=1)
weights = conv.weight.numel() * 4
made = names(lambda: conv(x), conv, x)
products = 2 * x.numel() * 4 * 9
assert made == [
    ("convolution", "flow kernels", image + weights, image, products),
    ("convolution bias", "flow kernels", image + 16, image, 0),
], made
conv.to(memory_format=last)
made = names(lambda: conv(x), conv, x)
assert [m[0] for m in made] == ["layout conversion", "convolution", "convolution bias"], made
assert conv(x).is_contiguous(memory_format=last)

# Its backward is dx, dw and db.
y = conv(x)
made = names(lambda: y.backward(torch.ones_like(y)), conv, x)
backward = {m[0] for m in made}
assert {"convolution dx", "convolution dw", "convolution db"} <= backward, made

# Views are free. An expanded tensor counts the bytes of its memory. An operator in place reads and
# writes its tensor.
plain = x.detach()
assert names(lambda: plain.transpose(2, 3)[:, :2].view_as(plain[:, :2]), conv, plain) == []
(made,) = names(lambda: plain + torch.zeros(()).expand(2, 4, 8, 8), conv, plain)[-1:]
assert made[2:4] == (image + 4, image), made
(made,) = names(lambda: plain.mul_(2.0), conv, plain)
assert made[2:4] == (image, image), made
(made,) = names(lambda: plain[:, :2].copy_(plain[:, 2:]), conv, plain)
assert made[2:4] == (image // 2, image // 2), made

# Coupling networks are counted separately, backward included; pixel_unshuffle leaves channels_last.
net = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
made = names(lambda: net(x).backward(torch.ones(2, 4, 8, 8)), net, x)
parts = {m[0]: m[1] for m in made}
assert parts["relu"] == parts["threshold_backward"] == parts["convolution dw"] == "networks", parts
seen = []
unshuffle = nn.functional.pixel_unshuffle
step_counts.count(lambda: seen.append(unshuffle(plain.to(memory_format=last), 2)), net, plain)
assert seen[0].is_contiguous()

# Operators on large states compute nothing, in place or not, and keep layouts.
large = torch.ones(2, 64, 64, 64).to(memory_format=last)
images = large[:, :4]
def passes():
    seen[:] = [large.relu(), large.mul_(2.0), large.to(torch.bfloat16), large[:, :3].clone()]
made = names(passes, conv, images)
assert [m[0] for m in made] == ["relu", "mul_", "_to_copy", "clone"], made
assert [m[2:4] for m in made[:3]] == [(2**21, 2**21), (2**21, 2**21), (2**21, 2**20)], made
assert all(t.is_contiguous(memory_format=last) for t in seen[:3])
assert seen[1] is large and large.eq(1.0).all()
weight = torch.ones(512, 512)
step_counts.count(lambda: seen.append(2.0 * weight), conv, images)
assert seen[-1].eq(2.0).all()

# Vectors have one pixel. The products of the package's own kernels are counted.
from mflow_kernels.layers import FlowStep
step, vectors = FlowStep(6, width=8, spatial_dims=0), torch.zeros(5, 6)
with torch.no_grad():
    made = step_counts.count(lambda: step(vectors), step, vectors)
(own,) = [k for k in made if k.name == "conv1x1_kernel"]
assert (own.part, own.side, own.flops) == ("flow kernels", 1, 2 * 5 * 6 * 6), own
found = [(k.name, k.flops) for k in made if k.part == "networks" and k.flops]
products = [2 * 5 * pair for pair in (3 * 8, 8 * 8, 8 * 6)]
assert found == list(zip(["_addmm_activation"] * 2 + ["addmm"], products)), found

# A network without kernels runs layer by layer: bias and ReLU in the convolutions, 4 H forward; a
# gradient masked in place, 16 H backward; and the weights packed, their gradients joined.
from mflow_kernels.layers.networks import coupling_net
net = coupling_net(30, 60, 64, 2).to(memory_format=last)
x = torch.zeros(2, 30, 8, 8).to(memory_format=last).requires_grad_()
dparams = torch.zeros(2, 60, 8, 8).to(memory_format=last)
made = [m for m in names(lambda: net(x).backward(dparams), net, x) if m[1] == "networks"]
forward = [m[0] for m in made[:5]]
fused = "convolution, bias and ReLU"
assert forward == ["_foreach_copy_", fused, fused, "convolution", "convolution bias"], forward
hidden, inputs, params = (4 * 2 * 8 * 8 * c for c in (64, 30, 60))
kernel = 4 * sum(p.numel() for p in net.parameters() if p.dim() > 1)
biases = 4 * (64 + 64)
moved = sum(m[2] + m[3] for m in made[1:5])
assert moved == 4 * hidden + inputs + 3 * params + kernel + biases + 4 * 60, (moved, hidden)
moved = sum(m[2] + m[3] for m in made[5:-1])
assert [m[0] for m in made[5:]].count("threshold_backward") == 2, made
assert made[-1][0] == "cat", made
rest = 3 * params + 2 * inputs + 2 * kernel + biases + 4 * 60
assert moved == 16 * hidden + rest, (moved, hidden)
"""


@pytest.mark.long
def test_rules() -> None:
    done = run_python("-c", RULES)
    assert done.returncode == 0, done.stderr


# Runs the report once for each list of arguments. Importing torch takes longer than a run.
REPORTS = """
import contextlib
import io
import json
import sys
from benchmarks.reports import whole_steps

made = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = whole_steps.main(arguments)
    made.append((code, output.getvalue()))
print(json.dumps(made))
"""


LAUNCHES = """
from benchmarks.reports import whole_steps  # before anything of mflow_kernels
from benchmarks.harness.models import Spec

def launches(width, variant, task):
    specs = (Spec(side=16, levels=1, steps=steps, width=width, batch=2, precision="bfloat16")
             for steps in (8, 16))
    few, many = (whole_steps.count(spec, f"mflow_kernels, {variant}", task) for spec in specs)
    return (many.launches - few.launches) / 8

for width, more in ((128, 0), (256, 1)):
    assert launches(width, "reversible", "train") <= 13 + more + 5 / 8
    assert launches(width, "stored", "train") <= 10 + more
assert launches(128, "stored", "sample") <= 4
assert launches(128, "stored", "forward") <= 4
"""


def test_launches_of_a_step_of_flow() -> None:
    """A step of flow makes at most 14 launches in training and 4 in sampling.

    A step has an eighth of the launches that a Glow of 16 steps makes beyond those of a Glow of 8.
    The larger one stores one state more, so the launches that store states are included: five
    compare a stored state with the rebuilt one.
    """
    done = run_python("-W", "ignore", "-c", LAUNCHES)
    assert done.returncode == 0, done.stderr


@pytest.mark.long
def test_no_step_moves_more_than_recorded_and_growth_is_reported(tmp_path: Path) -> None:
    """The test counts the package's own variants, at the size of the recorded files.

    If lower counts are right, save them with --record in place of --check.
    """
    recorded = ROOT / "benchmarks" / "reports"
    lean = json.loads((recorded / "whole_steps_float32.json").read_text())
    for row in lean:
        row["moved"] -= 1
    (tmp_path / "lean.json").write_text(json.dumps(lean))
    both = ["--steps", "2", "--variant", "mflow_kernels, stored", "mflow_kernels, reversible"]
    arguments = [
        [*both, "--precision", name, "--check", str(recorded / f"whole_steps_{name}.json")]
        for name in ("float32", "bfloat16")
    ]
    stored = ["--steps", "2", "--variant", "mflow_kernels, stored", "--task", "forward"]
    arguments.append([*stored, "--summary", "--check", str(tmp_path / "lean.json")])
    done = run_python("-W", "ignore", "-c", REPORTS, json.dumps(arguments))
    assert done.returncode == 0, done.stderr
    float32, bfloat16, grown = json.loads(done.stdout)
    for code, output in (float32, bfloat16):
        assert code == 0, output
    code, output = grown
    assert code == 1
    assert "grown: mflow_kernels, stored, evaluation" in output
    assert "| mflow_kernels, stored | - / " in output  # plain was not counted
