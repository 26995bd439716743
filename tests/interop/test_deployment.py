"""Models leave as ONNX files, which OpenVINO computes with the same results."""

import copy
import importlib.util

import pytest
import torch

from interop import peers
from interop.test_costs import freia
from mflow_kernels import Glow
from mflow_kernels.interop import accelerate, decelerate, plain_module
from mflow_kernels.testing import assert_close

BATCH = (1, 64)


def fast_flow():
    """FastFlow's flow, accelerated, with images of 8 channels."""
    model = peers.perturbed(freia(8, 8, 8, affine_clamping=2.0)).eval()
    assert accelerate(model).replaced
    return model, (torch.randn(4, 8, 8, 8),), "forward"


def glow(method):
    torch.manual_seed(0)
    model = peers.perturbed(Glow((3, 8, 8), levels=2, steps=2, width=8), 0.05).eval()
    x = torch.rand(4, 3, 8, 8)
    model.initialize(x)
    return model, (x,) if method == "log_prob" else (model(x)[0],), method


MODELS = {
    "FastFlow": fast_flow,
    "Glow.log_prob": lambda: glow("log_prob"),
    "Glow's samples": lambda: glow("inverse"),
}


def flat(values):
    return [t.detach() for t in torch.utils._pytree.tree_leaves(values)]


def assert_same(got, want):
    for one, other in zip(flat(got), flat(want), strict=True):
        assert_close(one, other, terms=4096, scale=max(1.0, other.abs().max().item()))


@pytest.mark.parametrize("name", MODELS)
def test_a_plain_module_computes_the_same_by_torchs_operators(name):
    model, inputs, method = MODELS[name]()
    plain = plain_module(model, inputs, method=method, batch=BATCH)
    called = {str(n.target) for n in plain.graph.nodes if n.op == "call_function"}
    assert not [n for n in called if "mflow" in n or "inv" in n]
    assert_same(plain(*inputs), getattr(model, method)(*inputs))
    more = torch.utils._pytree.tree_map(lambda x: torch.cat([x, x[:1]]), inputs)
    assert_same(plain(*more), getattr(model, method)(*more))


@pytest.mark.skipif(
    not importlib.util.find_spec("onnxscript"), reason="onnxscript is not installed"
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["FastFlow, decelerated", *MODELS])
def test_openvino_computes_the_same(name, tmp_path):
    openvino = pytest.importorskip("openvino")
    model, inputs, method = MODELS[name.partition(",")[0]]()
    if "decelerated" in name:
        plain = copy.deepcopy(model)
        decelerate(plain)
    else:
        plain = plain_module(model, inputs, method=method, batch=BATCH)
    tensors = flat(inputs)
    n = torch.export.Dim("n", min=BATCH[0], max=BATCH[1])
    shapes = torch.utils._pytree.tree_map(lambda _: {0: n}, inputs)
    path = tmp_path / "model.onnx"
    torch.onnx.export(plain, inputs, path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for count in (4, 3):
        results = compiled([t[:count].numpy() for t in tensors])
        some = torch.utils._pytree.tree_map(lambda x: x[:count], inputs)  # noqa: B023
        want = getattr(model, method)(*some)
        assert_same([torch.from_numpy(r) for r in results.values()], flat(want))


def test_bad_models_are_refused():
    model, inputs, _ = fast_flow()
    with pytest.raises(ValueError, match="expected one in eval mode"):
        plain_module(copy.deepcopy(model).train(), inputs)
    with pytest.raises(ValueError, match="expected a model on a CPU, got one on meta"):
        plain_module(copy.deepcopy(model).to("meta"), inputs)
