"""Training of all stages of a hierarchical flow, as one LightningModule and in one `fit`."""

import math
import sys
import time
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from mflow_kernels.data.batches import (
    Batch,
    BatchStream,
    OrderedBatches,
    flip_at_random,
    images_and_classes,
)
from mflow_kernels.data.dequantization import dequantize
from mflow_kernels.data.generators import Stream, stream_generator
from mflow_kernels.data.splits import Splits
from mflow_kernels.layers import ReversibleChain
from mflow_kernels.models import HierarchicalFlow, ManifoldFlow
from mflow_kernels.models.bits import bits_per_dimension
from mflow_kernels.models.graphs import CaptureError, graphed
from mflow_kernels.ops.fastest import retry
from mflow_kernels.runs.checkpoints import Checkpoint
from mflow_kernels.runs.config import TrainConfig
from mflow_kernels.training.averaging import WeightAverage, copy_buffers
from mflow_kernels.training.conditions import bound_conditions, largest_conditions
from mflow_kernels.training.coupling_networks import parameter_groups
from mflow_kernels.training.guard import StepGuard, mean_over_ranks, problem_of
from mflow_kernels.training.muon import MuonAdamW
from mflow_kernels.training.schedule import Schedule

_PARTS = ("loss", "on_manifold", "off_manifold", "logdet", "penalty")  # logged fields of Terms
_BOUND_EVERY = 100  # --max-condition is enforced at this interval, in steps
_FITTED_IMAGES = 4096  # the prior of a stage is fitted to at most this many images


class FlowTraining(LightningModule):
    """Trains the stages one after another, each for its own number of steps.

    The stage, the batch, its noise and the learning rate depend on the options and `global_step`
    only, and the checkpoint holds everything else. A run that resumes at any step with the same
    options therefore computes the same bits as one that was never interrupted. A stage is trained
    on the averaged weights of the stages before it, which do not change unless they are released.
    A step that the guard skips changes no weight but is counted.

    Metrics are logged in bits per dimension. bits_per_dim is per dimension of the image, under all
    stages up to the trained one. The loss and its parts are per dimension of the data that the
    stage is trained on: its own input, or the image if earlier stages are released. The host waits
    for the device in logged steps only.

    With W ranks, rank r takes the images r, r + W, r + 2 W, ... of each batch, in training and in
    validation. They train as one process would, and validate each image once.

    Args:
        model: flow to train; Lightning moves it to the device.
        splits: images to train on (`train`) and to validate on (`valid`).
        config: configuration of the run.
        checkpoint: checkpoint to resume from. The trainer needs `loops.resume_loops` too.
        schedule: class of the schedule.

    Attributes:
        logged: the metrics of the last logged step.
        loss: of the last step, a scalar on the device.
    """

    def __init__(
        self,
        model: HierarchicalFlow,
        splits: Splits,
        config: TrainConfig,
        checkpoint: Checkpoint | None = None,
        schedule: type[Schedule] = Schedule,
    ) -> None:
        super().__init__()
        self.model = model
        self.average = WeightAverage(model, config.ema_decay)
        self.guard = StepGuard(config.loss_spike, config.max_drift)
        self._splits, self._config = splits, config
        start = checkpoint.progress if checkpoint else None
        self.schedule = schedule(config, len(splits.train), start)
        self.log_interval = min(50, max(1, self.schedule.total_steps // 500))
        self._dims = math.prod(splits.train.image_shape)
        self._chains = [
            [module for module in stage.modules() if isinstance(module, ReversibleChain)]
            for stage in model.stages
        ]
        # The parameters of each stage that have gradients while it is trained.
        self._weights = [[p for p in m.parameters() if p.requires_grad] for m in model.stages]
        self._unfrozen = -1  # the stage that `_freeze_others` was last called with
        self._last_logged = (0.0, 0)  # time and step
        self.loss = torch.zeros(())
        self._measured: dict[str, Any] = {}  # metrics of the step that runs
        self.logged: dict[str, float] = {}
        self._checkpoint = checkpoint
        if checkpoint is not None:
            self.load_state_dict(checkpoint.tensors)

    @property
    def stage(self) -> int:
        """The stage that the next step trains, from 0."""
        return self.schedule.stage_of(self.global_step)

    @property
    def trained_stage(self) -> int:
        """The stage that the last step trained. After the last step of a stage, `stage` is already
        the next one."""
        return self.schedule.stage_of(max(0, self.global_step - 1))

    @property
    def averaged(self) -> HierarchicalFlow:
        """The model with averaged weights."""
        return cast(HierarchicalFlow, self.average.model)

    def _step_in_stage(self, stage: int) -> int:
        """Return the number of steps that a stage has taken."""
        return self.global_step - self.schedule.begins[stage]

    @property
    def _is_logged(self) -> bool:
        """Whether this step's metrics are logged and the guard is read."""
        return (self.global_step + 1) % self.log_interval == 0

    def setup(self, stage: str) -> None:
        if (count := self.trainer.accumulate_grad_batches) != 1:
            expected = "accumulate_grad_batches: expected 1, and the option accumulate"
            raise ValueError(f"{expected}, got {count}")
        config = self._config
        half = config.precision == "float16"
        self._scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        if self._checkpoint is not None and self._checkpoint.grad_scaler:
            self._scaler.load_state_dict(self._checkpoint.grad_scaler)
        self._captures = config.cuda_graphs
        self._freeze_others(self.stage)

    def _freeze_others(self, stage: int) -> None:
        """Let only the weights that `stage` trains have gradients, so that ranks exchange these."""
        if stage == self._unfrozen:
            return
        self._unfrozen, active = stage, self.schedule.active(stage)
        self._compute: Any = partial(self._losses, stage)
        if self._captures:
            stages = nn.ModuleList(self.model.stages[i] for i in active)
            self._compute = graphed(stages, self._compute)
        for i, weights in enumerate(self._weights):
            for weight in weights:
                weight.requires_grad_(i in active)
        strategy = self.trainer.strategy
        if isinstance(strategy, DDPStrategy) and strategy.model is not self:
            # Ranks agreed on the gradients that they exchange when the model was wrapped.
            strategy.model = self
            strategy.configure_ddp()

    def train_dataloader(self) -> BatchStream:
        config, position = self._config, self.schedule.progress(self.global_step).position
        return BatchStream(self._splits.train, config.batch_size, config.seed, position)

    def val_dataloader(self) -> OrderedBatches:
        return OrderedBatches(self._splits.valid, self._config.part_size)

    def configure_optimizers(self) -> Any:
        groups, rates = [], []
        for index, stage in enumerate(self.model.stages):
            networks, others = parameter_groups(stage)
            decay, muon = self._config.weight_decay, self._config.optimizer == "muon"
            # LambdaLR multiplies initial_lr by what `rate_of` returns.
            groups += [
                {"params": networks, "weight_decay": decay, "initial_lr": 1.0, "muon": muon},
                {"params": others, "weight_decay": 0.0, "initial_lr": 1.0, "muon": False},
            ]
            rates += [self.schedule.rate_of(index)] * 2
        optimizer = MuonAdamW(groups, lr=1.0)
        if self._checkpoint is not None:
            state = {**optimizer.state_dict(), "state": self._checkpoint.moments}
            optimizer.load_state_dict(state)
        how: Any = {"scheduler": LambdaLR(optimizer, rates, last_epoch=self.global_step - 1)}
        return {"optimizer": optimizer, "lr_scheduler": how | {"interval": "step"}}

    def on_fit_end(self) -> None:
        for weight in (w for weights in self._weights for w in weights):
            weight.requires_grad_()

    def on_train_start(self) -> None:
        self._last_logged = time.perf_counter(), self.global_step

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        stage = self.stage
        self.zero_grad()
        self._freeze_others(stage)
        if self._step_in_stage(stage) == 0:
            retry()
            copy_buffers(self.model, self.averaged)
            for earlier in range(stage):
                average = self.averaged.stages[earlier].state_dict()
                self.model.stages[earlier].load_state_dict(average)
            with torch.no_grad():
                if self.model.stages[stage].prior is None:
                    x, classes = self._dequantize(batch)
                    self.model.initialize(x, stage=stage, context=classes)
                else:
                    self._initialize_with_prior(stage)
            self.averaged.stages[stage].load_state_dict(self.model.stages[stage].state_dict())
            self.guard.begin_stage()

    def _initialize_with_prior(self, stage: int) -> None:
        """Initialize a stage from u of more images than a batch has, because its prior is fitted
        to them. Every rank takes the same images."""
        train, seed = self._splits.train, self._config.seed
        drawn = torch.randperm(len(train), generator=stream_generator(seed, Stream.FIRST, stage))
        noise = stream_generator(seed, Stream.FIRST, stage, 1, device=self.device)
        u, classes = [], []
        for rows in drawn[:_FITTED_IMAGES].sort().values.split(self._config.part_size):
            x = self._as_data(train.batch(rows).to(self.device), noise)
            own = None if train.classes is None else train.classes[rows].to(self.device)
            with self._autocast():
                u.append(self.model.encode(x, stages=stage, context=own))
            classes += [] if own is None else [own]
        context = torch.cat(classes) if classes else None
        cast(ManifoldFlow, self.model.stages[stage]).initialize(torch.cat(u), context=context)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Run the forward pass, and the backward pass of every part of the batch but the last."""
        stage = self.stage
        x, classes = self._dequantize(batch)
        inputs = (x,) if classes is None else (x, classes)
        parts = [*zip(*(t.chunk(self._config.accumulate) for t in inputs), strict=True)]
        losses, found, self._drifts = [], [], []
        for part in parts:
            loss, *terms = self._run(part)
            losses.append(loss * (len(part[0]) / len(x)) if len(parts) > 1 else loss)
            found.append(terms)
            if len(losses) < len(parts):
                self._scaler.scale(losses[-1]).backward()
                self._drifts += self._last_drifts()
        self.loss = sum((loss.detach() for loss in losses[1:]), losses[0].detach())
        if self._is_logged:
            *terms, log_likelihood = (torch.cat(values) for values in zip(*found, strict=True))
            scale = 1 / (self._trained_dims(stage) * math.log(2.0))
            bits = bits_per_dimension(log_likelihood, self._dims, self._config.n_bits)
            means = [*(term.mean() * scale for term in terms), bits.mean()]
            names = (*(f"{part}_bits_per_dim" for part in _PARTS), "bits_per_dim")
            values = mean_over_ranks(torch.stack(means)).unbind()
            self._measured = dict(zip(names, values, strict=True))
            weight = cast(ManifoldFlow, self.model.stages[stage]).objective.trained_weight
            if weight is not None:
                self._measured["penalty_weight"] = weight
        return self._scaler.scale(losses[-1])

    def _run(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        for chain in self._trained_chains():
            chain.drift = None
        try:
            return cast(tuple[Tensor, ...], self._compute(*inputs))
        except CaptureError as error:
            print(f"training continues without CUDA graphs: {error}", file=sys.stderr)
            self._captures = False  # other stages could not be captured either
            self._compute = partial(self._losses, self.stage)
            return self._run(inputs)

    def optimizer_zero_grad(self, *_: Any) -> None:
        """Do nothing: Lightning calls this after `training_step`, which has added gradients."""

    def _losses(self, stage: int, x: Tensor, classes: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return the loss to minimize, then _PARTS and log p(x), (N,) each, without gradients."""
        with self._autocast():
            terms, log_likelihood = self.model.terms_and_log_prob(
                x, stage=stage, release=self._config.release, context=classes
            )
        loss = terms.loss.mean() / self._trained_dims(stage)
        parts = [getattr(terms, name).detach() for name in _PARTS]
        return loss, *parts, log_likelihood.detach()

    def _trained_dims(self, stage: int) -> int:
        """Return the dimensions of the data that `stage` is trained on."""
        first = 0 if self._config.release else stage
        return math.prod(cast(ManifoldFlow, self.model.stages[first]).input_shape)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        """Run forward and backward, then update the weights unless the guard skips the step."""
        optimizer_closure()
        fused: Any = optimizer.optimizer
        self._scaler.unscale_(fused)
        parameters = [p for g in fused.param_groups for p in g["params"] if p.grad is not None]
        norm = nn.utils.get_total_norm([cast(Tensor, p.grad) for p in parameters])
        nn.utils.clip_grads_with_norm_(parameters, self._config.clip_norm, norm)
        drifts = self._drifts + self._last_drifts()
        drift = torch.stack(drifts).max() if drifts else None
        fused.grad_scale, fused.found_inf = None, self.guard.judge(self.loss, norm, drift)
        if self._is_logged:
            self._read_guard(norm, drift)
            self._measured["learning_rate"] = fused.param_groups[2 * self.stage]["lr"]
        fused.step()
        self._scaler.update()
        stage = self.stage
        step, limit = self._step_in_stage(stage), self._config.max_condition
        active = self.schedule.active(stage)
        pairs = [(self.model.stages[i], self.averaged.stages[i]) for i in active]
        # Before checkpoints, so that a run that resumes starts from bounded weights too.
        if limit is not None and (step + 1) % _BOUND_EVERY == 0:
            for trained, averaged in pairs:
                bound_conditions(trained, averaged, limit)
        self.average.update(pairs, step)

    def _read_guard(self, norm: Tensor, drift: Tensor | None) -> None:
        """Wait for the device; stop training before this step's update if it cannot continue."""
        reading = self.guard.read()
        where = f"at step {self.global_step} (stage {self.stage + 1})"
        if problem := problem_of(reading, self._config, where):
            raise FloatingPointError(problem)
        self._measured |= {"skipped": reading.skipped, "gradient_norm": norm}
        if drift is not None:
            self._measured["drift"] = drift

    def _last_drifts(self) -> list[Tensor]:
        return [c.drift for c in self._trained_chains() if c.drift is not None]

    def _trained_chains(self) -> list[ReversibleChain]:
        return [chain for i in self.schedule.active(self.stage) for chain in self._chains[i]]

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step % self.log_interval:
            return
        started, step = self._last_logged
        self._last_logged = time.perf_counter(), self.global_step
        seconds = self._last_logged[0] - started
        speed = len(images_and_classes(batch)[0]) * (self.global_step - step) / seconds
        self.logged = self._log({"images_per_second": speed, **self._measured})

    def _log(self, metrics: Mapping[str, Any]) -> dict[str, float]:
        """Pass metrics of the last step to the loggers, and return them as numbers.

        Lightning's `log` would log the last value of each metric again until it gets another one,
        also in later stages, and would count the steps of a resumed run from 0.
        """
        values = {"stage": float(self.trained_stage)}
        values |= {name: float(value) for name, value in metrics.items()}
        for logger in self.loggers:
            logger.log_metrics(values, step=self.global_step - 1)
            logger.save()
        return values

    def on_validation_epoch_start(self) -> None:
        self._held_out = torch.zeros(2, dtype=torch.float64, device=self.device)  # sum and count
        copy_buffers(self.model, self.averaged)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        generator = stream_generator(0, Stream.VALIDATION_NOISE, batch_idx, device=self.device)
        images, classes = images_and_classes(batch)
        x = self._rank_share(dequantize(images, self._config.n_bits, generator))
        if not len(x):  # the last batch can have fewer images than there are ranks
            return
        with self._autocast():
            own = None if classes is None else self._rank_share(classes)
            log_prob = self.averaged.log_prob(x, stages=self.trained_stage + 1, context=own)
        bits = bits_per_dimension(log_prob, self._dims, self._config.n_bits)
        self._held_out[0] += bits.double().sum()
        self._held_out[1] += len(bits)

    def on_validation_epoch_end(self) -> None:
        # Lightning would average the ranks' counts with integer division.
        total, count = mean_over_ranks(self._held_out).unbind()
        bits = (total / count).float()
        self.log("heldout_bits_per_dim", bits, logger=False)  # for callbacks that monitor it
        conditions = largest_conditions(self.model.stages[self.trained_stage])
        self._log({"heldout_bits_per_dim": bits, **conditions})

    on_validation_end = on_train_start

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        copy_buffers(self.model, self.averaged)
        checkpoint["grad_scaler"] = self._scaler.state_dict()
        checkpoint["progress"] = self.schedule.progress(self.global_step).to_dict()

    def _autocast(self) -> torch.autocast:
        dtype = getattr(torch, self._config.precision)
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def _dequantize(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """Return this rank's images of a batch as data, and their classes, if they have any."""
        generator = stream_generator(
            self._config.seed, Stream.TRAINING_NOISE, self.global_step, device=self.device
        )
        images, classes = images_and_classes(batch)
        x = self._rank_share(self._as_data(images, generator))
        return x, None if classes is None else self._rank_share(classes)

    def _as_data(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return training images as data, mirrored at random if the configuration says so."""
        if self._config.flips:
            images = flip_at_random(images, generator)
        return dequantize(images, self._config.n_bits, generator)

    def _rank_share(self, x: Tensor) -> Tensor:
        """Return the images of a batch that this rank computes."""
        return x[self.trainer.global_rank :: self.trainer.world_size]
