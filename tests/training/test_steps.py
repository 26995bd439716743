"""Training steps: skipping, clipping, averaging, stages, precision and compilation."""

import dataclasses
import math

import lightning
import pytest
import torch
from cases import HostReads
from tiny_runs import change_losses, checkpoint, logged, metrics, spy, weights

from mflow_kernels import AffineCoupling, HierarchicalFlow, testing
from mflow_kernels.runs.config import TrainConfig
from mflow_kernels.runs.folder import load_run, read_config
from mflow_kernels.training import checks, train
from mflow_kernels.training.averaging import WeightAverage
from mflow_kernels.training.cli import main
from mflow_kernels.training.coupling_networks import compile_networks
from mflow_kernels.training.guard import StepGuard
from mflow_kernels.training.module import FlowTraining


def rows(folder):
    return metrics(folder, "loss_bits_per_dim")


class TestGuard:
    def judge(self, guard, loss=1.0, norm=1.0, drift=0.0):
        return bool(guard.judge(torch.tensor(loss), torch.tensor(norm), torch.tensor(drift)))

    @pytest.mark.parametrize(
        "bad",
        [
            *({name: value} for name in ("loss", "norm") for value in (math.nan, math.inf)),
            *({"drift": value} for value in (0.02, math.nan)),
        ],
    )
    def test_steps_that_are_not_finite_or_drifted_are_skipped(self, bad):
        guard = StepGuard(spike=10, max_drift=0.01)
        assert [self.judge(guard), self.judge(guard, **bad), self.judge(guard)] == [0, 1, 0]
        reading = guard.read()
        assert (reading.skipped, reading.in_a_row) == (1, 1)
        assert guard.read().in_a_row == 0
        assert guard.read().skipped == 1

    def test_spikes_are_found_by_the_deviation_of_earlier_losses(self):
        guard = StepGuard(spike=10, max_drift=1.0)
        draw = torch.Generator().manual_seed(0)
        losses = 5 + 0.5 * torch.randn(200, generator=draw)
        assert not any(self.judge(guard, float(loss)) for loss in losses)
        assert not self.judge(guard, 5 + 0.5 * 8)
        assert self.judge(guard, 5 + 0.5 * 13)
        assert not self.judge(guard, 5 - 0.5 * 13)  # a falling loss is not a spike
        guard.begin_stage()
        assert not self.judge(guard, 100.0)

    def test_steps_in_a_row_are_counted_across_readings(self):
        guard = StepGuard(spike=10, max_drift=1.0)
        found = []
        for losses in ([math.nan] * 2, [math.nan], [1.0, math.nan]):
            for loss in losses:
                self.judge(guard, loss)
            found.append(guard.read().in_a_row)
        assert found == [2, 3, 1]


def test_a_skipped_step_changes_no_weight_and_is_counted(command, tmp_path, monkeypatch):
    """Step 1 has a gradient that is not finite. A checkpoint is written before and after it."""
    change_losses(monkeypatch, lambda step, loss: loss + (loss * 0).sqrt() if step == 1 else loss)
    saved = {}
    step = FlowTraining.optimizer_step

    def optimizer_step(self, *args, **kwargs):
        step(self, *args, **kwargs)
        moments = self.optimizers().state_dict()["state"]
        saved[self.global_step] = [
            *(p.detach().clone() for p in self.model.parameters()),
            *(t.clone() for moment in moments.values() for t in moment.values()),
        ]

    monkeypatch.setattr(FlowTraining, "optimizer_step", optimizer_step)
    assert main(command) == 0
    same = [
        all(torch.equal(a, b) for a, b in zip(saved[i], saved[i + 1], strict=True)) for i in (0, 1)
    ]
    assert same == [True, False]
    assert logged(tmp_path / "run", "skipped") == [0, 1, 1, 1, 1, 1]
    assert rows(tmp_path / "run")[1]["gradient_norm"] in ("nan", "inf")


def gradients_of_steps(monkeypatch):
    """Return a list that gets the gradients of each step."""
    kept = []

    def note(optimizer, *_):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        kept.append([p.grad.clone() for p in parameters if p.grad is not None])

    spy(monkeypatch, torch.optim.AdamW, "step", note)
    return kept


def test_gradients_are_clipped(command, tmp_path, monkeypatch):
    kept = gradients_of_steps(monkeypatch)
    assert main([*command, "--clip-norm", "0.5"]) == 0
    norms = logged(tmp_path / "run", "gradient_norm")
    assert max(norms) > 1
    clipped = [float(torch.nn.utils.get_total_norm(gradients)) for gradients in kept]
    assert clipped == pytest.approx([min(0.5, norm) for norm in norms], rel=1e-4)


@pytest.mark.parametrize("domain", ["latent", "data"])
def test_the_host_waits_for_the_device_in_logged_steps_only(domain, command, monkeypatch):
    found, readings = [], []
    step, init = FlowTraining.optimizer_step, FlowTraining.__init__

    def counted(self, *args, **kwargs):
        with HostReads() as reads:
            step(self, *args, **kwargs)
        found.append(reads.found)

    def logs_every_third(self, *args):
        init(self, *args)
        self.log_interval = 3

    spy(monkeypatch, StepGuard, "read", lambda _: readings.append(len(found)))
    monkeypatch.setattr(FlowTraining, "optimizer_step", counted)
    monkeypatch.setattr(FlowTraining, "__init__", logs_every_third)
    # This function computes a constant from Python numbers on the host.
    monkeypatch.setattr("mflow_kernels.models.objectives.penalty_log_normalizer", lambda *_: 0.0)
    assert main([*command, "--domain", domain]) == 0
    assert found[1] == found[4] == []
    # The first backward pass through a chain reads whether its networks repeat their results. In
    # the data domain the inverse pass has a chain of its own.
    assert found[0] == found[3] == ["tolist"] * (2 if domain == "data" else 1)
    assert readings == [2, 5]


class TestAverage:
    @pytest.mark.parametrize("highest", [0.15, 0.0])
    def test_it_is_the_exponential_average(self, highest):
        net = torch.nn.Linear(3, 2)
        average = WeightAverage(net, decay=highest)
        expected = net.weight.detach().clone()
        for step in range(4):
            with torch.no_grad():
                net.weight.add_(1.0)
            decay = min(highest, (1 + step) / (10 + step))
            expected = decay * expected + (1 - decay) * net.weight.detach()
            average.update([(net, average.model)], step)
        torch.testing.assert_close(average.model.weight.detach(), expected)
        assert not any(p.requires_grad for p in average.parameters())

    def test_load_run_loads_the_average(self, trained):
        model = load_run(str(trained), "cpu").model
        saved = weights(trained)
        differ = 0
        for name, value in model.state_dict().items():
            assert torch.equal(value, saved[f"average.model.{name}"])
            differ += not torch.equal(value, saved[f"model.{name}"])
        assert differ > 10

    def test_stages_are_trained_on_the_averages_of_earlier_stages(self, trained):
        saved = weights(trained)
        first = [name for name in saved if name.startswith("model.stages.0.")]
        assert first
        assert all(torch.equal(saved[name], saved[f"average.{name}"]) for name in first)


class TestStages:
    FIRST = "{dim: 5, steps: 1, width: 8, max_steps: 2, domain: latent, weight: 9}"
    SECOND = "{dim: 4, steps: 1, width: 8, max_steps: 4, domain: data, weight: variance}"
    OPTIONS = ("--stages", f"[{FIRST}, {SECOND}]")

    @pytest.fixture
    def command(self, command):
        """Without TINY's values for all further flows."""
        short = [at for at, word in enumerate(command) if word.startswith("--stage-")]
        return [w for at, w in enumerate(command) if at not in short and at - 1 not in short]

    def test_each_has_its_own_budget_and_objective(self, command, tmp_path):
        assert main([*command, *self.OPTIONS]) == 0
        stages = logged(tmp_path / "run", "stage")
        assert stages == [0, 0, 0, 1, 1, 2, 2, 2, 2]
        objectives = [s.objective for s in load_run(str(tmp_path / "run")).model.stages]
        assert [o.domain for o in objectives] == ["data", "latent", "data"]
        assert [o.weight for o in objectives] == [1000.0, 9.0, "variance"]
        assert int(objectives[2].batches) == 4  # the tracked variance is in the checkpoint

    def test_the_weight_follows_a_bound_or_a_schedule(self, command, tmp_path):
        """Such weights are in the checkpoint and in the metrics. A constant one is not logged."""
        stages = "[{dim: 4, weight: 1000, final_weight: 10, weight_steps: 2}, {dim: 3}]"
        assert main([*command, "--error-bound", "1e-6", "--stages", stages]) == 0
        # The error stays above e times the bound, so that each step multiplies w by e^0.005.
        expected = [1000 * math.exp(0.005 * step) for step in (1, 2, 3)] + [100.0, 10.0, 10.0]
        cells = [row["penalty_weight"] for row in rows(tmp_path / "run")]
        assert cells[6:] == [""] * 3  # Lightning would log the last value of a metric again
        trained = [float(cell) for cell in cells[:6]]
        assert trained == pytest.approx(expected, rel=1e-5)
        objectives = [s.objective for s in load_run(str(tmp_path / "run")).model.stages[:2]]
        assert [o.trained_weight.item() for o in objectives] == [trained[2], trained[5]]

    @pytest.mark.parametrize("release", [False, True])
    def test_earlier_stages_change_only_if_released(self, release, command, tmp_path, monkeypatch):
        kept, models = [], []

        def note(guard):
            kept.append([p.detach().clone() for p in models[0].stages[0].parameters()])

        spy(monkeypatch, train, "_fit", lambda run: models.append(run.model))
        spy(monkeypatch, StepGuard, "begin_stage", note)
        assert main([*command, *(["--release"] if release else [])]) == 0
        after = list(models[0].stages[0].parameters())
        changed = [not torch.equal(a, b) for a, b in zip(kept[1], after, strict=True)]
        assert all(changed) if release else not any(changed)


@pytest.mark.parametrize("domain", ["latent", "data"])
def test_accumulated_gradients_are_those_of_the_whole_batch(domain, command, tmp_path, monkeypatch):
    kept, passes = gradients_of_steps(monkeypatch), []

    def count(model, x, **options):
        passes.append(len(x))

    spy(monkeypatch, HierarchicalFlow, "terms_and_log_prob", count)
    command = [*command, "--domain", domain]
    assert main(command) == 0
    first = rows(tmp_path / "run")[0]
    assert main([*command, "--overwrite", "--accumulate", "4"]) == 0
    assert passes == [4] * 6 + [1] * 24
    for whole, summed in zip(kept[0], kept[6], strict=True):  # later steps begin at other weights
        # Sums over 4 images of 8 x 8 pixels, which both runs round.
        testing.assert_close(summed, whole.double(), terms=2 * 4 * 8 * 8)
    again = rows(tmp_path / "run")[0]
    for name in ("loss_bits_per_dim", "bits_per_dim", "gradient_norm"):
        assert float(again[name]) == pytest.approx(float(first[name]), rel=1e-5)
    assert 0 < float(again["drift"]) < 1e-4


def test_a_trainer_that_accumulates_is_refused(trained):
    values = vars(read_config(trained))
    config = TrainConfig(**{f.name: values[f.name] for f in dataclasses.fields(TrainConfig)})
    run = checks.load(config)
    trainer = lightning.Trainer(accelerator="cpu", accumulate_grad_batches=2, logger=False)
    with pytest.raises(ValueError, match=r"accumulate_grad_batches: expected 1, .* got 2"):
        trainer.fit(FlowTraining(run.model, run.splits, run.config))


def test_half_precision_scales_its_loss(command, tmp_path, trained, monkeypatch):
    """Runs on a CPU, although the command refuses float16 there."""
    monkeypatch.setattr(checks, "check_precision", lambda *_: None)
    assert main([*command, "--precision", "float16"]) == 0
    found = rows(tmp_path / "run")
    assert all(math.isfinite(float(row["loss_bits_per_dim"])) for row in found)
    norms = [float(row["gradient_norm"]) for row in found]
    overflows = sum(not math.isfinite(norm) for norm in norms)
    assert 0 < overflows < 6  # the scale starts at 2^16, which is too high for these losses
    assert float(found[-1]["skipped"]) == overflows
    assert checkpoint(tmp_path / "run")["grad_scaler"]["scale"] == 2.0 ** (16 - overflows)
    # Up to the first step that is not skipped, the weights are those of the run in float32.
    first = next(step for step, norm in enumerate(norms) if math.isfinite(norm))
    whole = rows(trained)[first]
    # Only the networks round to float16; 9 * 8 products are the longest sum in them.
    rounding = testing.tolerance(torch.float16, terms=72)
    assert norms[first] == pytest.approx(float(whole["gradient_norm"]), rel=rounding)


def test_networks_are_compiled_in_place_and_compute_the_same(
    command, tmp_path, trained, monkeypatch
):
    monkeypatch.setattr(train, "compile_networks", lambda m: compile_networks(m, backend="eager"))
    seen = []
    spy(monkeypatch, torch.nn.Module, "compile", lambda network, **_: seen.append(network))
    assert main([*command, "--compile"]) == 0
    networks = [m for m in load_run(str(trained)).model.modules() if isinstance(m, AffineCoupling)]
    assert len(seen) == len(networks)
    torch.testing.assert_close(weights(tmp_path / "run"), weights(trained), rtol=0, atol=0)
