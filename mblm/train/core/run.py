"""A run while it goes: the model and what trains it, where it is, and its state as plain values."""

import math
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mblm.train.core.config import CoreTrainConfig, Lineage
from mblm.train.core.evaluation import Sources
from mblm.train.core.parallel import ParallelModel, Workers, like_shard, to_local
from mblm.train.core.sampling import TrainBatches
from mblm.train.core.schedule import Plan
from mblm.train.core.training_state import SavedState, State
from mblm.utils.seed import get_rng, set_rng

Tell: TypeAlias = Callable[[str], object]


class NonFiniteLossError(ValueError):
    """The loss or the gradient was NaN or infinite in too many steps in a row."""


@dataclass
class Position:
    """How far a worker has come.

    Attributes:
        step: Cumulative index of the next batch, over all epochs and runs.
        done: Batches of this run.
        epoch, batch: Where the next batch is.
        elements_seen: Elements of this worker in this run.
        applied: Steps of the optimizer and of the schedule; those left out do not count.
        non_finite: Steps left out in a row.
        without_gradient: Steps whose gradient was zero.
        entries: Entries with loss since the last step, where they are counted.
        avg_grad, avg_grad_clipped: Mean gradient of the last step that was looked at, or -1.
        validates_after: Epoch and batch that a validation is due after, if one is.
    """

    step: int = 0
    done: int = 0
    epoch: int = 0
    batch: int = 0
    elements_seen: int = 0
    applied: int = 0
    non_finite: int = 0
    without_gradient: int = 0
    entries: int = 0
    avg_grad: float = -1.0
    avg_grad_clipped: float = -1.0
    validates_after: tuple[int, int] | None = None

    def advance(self, next_epoch: int, next_batch: int, elements: int) -> None:
        """Note that a batch of so many elements is done, and where the next one is."""
        self.step += 1
        self.done += 1
        self.epoch, self.batch = next_epoch, next_batch
        self.elements_seen += elements

    def share_out(self, batch_before: int, every_before: int, batch: int, every: int) -> None:
        """Go on from the last whole step with other workers, or batches of another size.

        A ``batch`` has so many sequences, all workers together, and a step is ``every`` batches.
        The steps are as many as the same sequences make, and the place in the data is as far in its
        epoch. The cumulative index goes on: states and rows stay in their order.
        """
        whole, pending = divmod(self.done, every_before)
        left_out = whole - self.applied
        steps = whole * every_before * batch_before // (batch * every)
        self.done, self.applied = steps * every, max(steps - left_out, 0)
        self.entries = 0
        self.batch = max(self.batch - pending, 0) * batch_before // batch


@dataclass
class Run:
    """What a run is made of; what changes of it while it trains, a training state holds.

    Attributes:
        facts: All that its numbers depend on.
        losses: The losses of the batches since the last step, scalars on the device.
        options: Those of the optimizer's groups before the first step.
    """

    config: CoreTrainConfig
    workers: Workers
    plan: Plan
    lineage: Lineage
    facts: State
    batches: TrainBatches[Any]
    validation: Sources
    model: ParallelModel
    optimizer: Optimizer
    scheduler: LRScheduler | None
    scaler: torch.amp.GradScaler
    position: Position = field(default_factory=Position)
    losses: list[torch.Tensor] = field(default_factory=list)
    options: list[dict[str, Any]] = field(init=False)

    def __post_init__(self) -> None:
        self.options = _options(self.optimizer)

    def backward(self, loss: torch.Tensor, divisor: float) -> None:
        """Add the gradients of a batch, whose loss is divided for its share in a step.

        A loss that is not finite makes all gradients NaN, so that no worker applies the step.
        """
        checked = torch.where(torch.isfinite(loss.detach()), divisor, math.nan)
        scaled: Any = self.scaler.scale(loss / checked)
        scaled.backward()
        self.losses.append(loss.detach())

    def step(self, measure: Callable[[], float] | None, factor: float) -> float:
        """Apply the gradients, unless one of them is NaN or infinite on any worker.

        Waits for the device once, for the norm of the gradients, which it returns: weights that a
        bad gradient has reached cannot be repaired. They are multiplied by a factor first.
        """
        self.scaler.unscale_(self.optimizer)
        if factor != 1 and (gradients := [g for g in self.model.gradients() if g is not None]):
            torch._foreach_mul_(gradients, factor)
        device_norm = self.model.gradient_norm()
        if measure is not None:
            self.position.avg_grad = measure()
        norm = float(device_norm)
        if math.isfinite(norm):
            if (clip := self.config.gradient_clipping) is not None:
                torch.nn.utils.clip_grads_with_norm_(
                    self.model.base.parameters(), clip, device_norm
                )
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.position.applied += 1
            if self.scheduler is not None:
                self.scheduler.step()
        elif self.scaler.is_enabled():
            self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor())
        if measure is not None:
            self.position.avg_grad_clipped = measure()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def judge(self, norm: float, losses: list[torch.Tensor], place: str, tell: Tell) -> None:
        """Tell of a step that was left out or learned nothing; end a run that has too many of them.

        Called by all workers, each with the losses of its batches, the last of which was at a
        place.
        """
        position, config = self.position, self.config
        if math.isfinite(norm):
            position.non_finite = 0
            if norm == 0:
                self._judge_no_gradient(tell)
            return
        bad = "; ".join(
            f"loss {loss} on rank {rank}, batch {index}"
            for rank, of_rank in enumerate(self.workers.gather([float(loss) for loss in losses]))
            for index, loss in enumerate(of_rank, start=position.step - len(of_rank))
            if not math.isfinite(loss)
        )
        if not bad and self.scaler.is_enabled():
            return  # The scale was too large for half precision, and is smaller now.
        position.non_finite += 1
        what = bad or "the gradient is not finite, though the losses are"
        message = f"Step left out after {place}: {what} ({position.non_finite} in a row)"
        tell(message)
        if config.non_finite_loss == "stop" and position.non_finite >= config.max_non_finite_steps:
            raise NonFiniteLossError(message)

    def _judge_no_gradient(self, tell: Tell) -> None:
        position = self.position
        position.without_gradient += 1
        steps = position.done // self.config.gradient_accumulate_every
        message = (
            f"The gradient was zero in {position.without_gradient} of {steps} steps: do entries of "
            "their batches have loss, or are all masked out or padding?"
        )
        never_learned = position.without_gradient == steps
        if never_learned and steps in (self.config.max_non_finite_steps, self.plan.gradient_steps):
            raise ValueError(message)
        if position.without_gradient == 1:
            tell(message)

    def common_state(self) -> State:
        """What all workers share."""
        weights = {} if self.model.is_sharded else self._weights()
        return {**weights, "options": self.options, "scaler": self.scaler.state_dict()}

    def own_state(self) -> State:
        """What is this worker's."""
        state: State = {
            "position": asdict(self.position),
            "rng": get_rng(*self.validation.generators),
            "epoch_rng": self.batches.epoch_rng,
            "gradients": self.model.gradients(),
            "losses": [loss.detach().cpu() for loss in self.losses],
        }
        return {**state, **self._weights()} if self.model.is_sharded else state

    def load(self, saved: SavedState) -> None:
        """Go on from a state, at the place that `position` says already.

        Raises:
            ValueError: The state is of another model or optimizer.
        """
        common, own = saved.common, saved.own
        weights = own if self.model.is_sharded else common
        self._repeat_schedule()
        try:
            self.model.load_state(weights["model"], is_whole=False)
            self._load_optimizer(weights["optimizer"], common["options"])
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{saved.path} cannot be gone on from: {error}") from error
        if self.scaler.is_enabled() and common["scaler"]:
            self.scaler.load_state_dict(common["scaler"])
        if not saved.is_exact:  # the rest is of other workers
            return
        self.model.load_gradients(own["gradients"])
        self.losses = list(own["losses"])
        self.batches.epoch_rng = own["epoch_rng"]
        set_rng(own["rng"], *self.validation.generators)

    def _repeat_schedule(self) -> None:
        """Bring the schedule to where it was: it depends on the plan and the steps, nothing else.

        Its steps are made again, so that the learning rate is the same to the bit where the plan is
        the same, and that of the new plan where it is not.
        """
        if (scheduler := self.scheduler) is None:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of steps of the optimizer that are missing between
            for _ in range(self.position.applied):
                scheduler.step()

    def _weights(self) -> State:
        return {"model": self.model.base.state_dict(), "optimizer": self.optimizer.state_dict()}

    def _load_optimizer(self, state: State, before: list[dict[str, Any]]) -> None:
        """Load the optimizer's state, the tensors of sharded parameters as shards.

        The learning rate stays what the schedule has made it, and so does any option that was
        configured otherwise ``before``.
        """
        now = _options(self.optimizer)
        self.optimizer.load_state_dict(state)
        for parameter, entries in self.optimizer.state.items():
            for name, value in entries.items():
                if isinstance(value, torch.Tensor) and value.shape == to_local(parameter).shape:
                    entries[name] = like_shard(value, parameter)
        for group, old, configured, at in zip(
            self.optimizer.param_groups, before, self.options, now, strict=True
        ):
            changed = {name for name, value in configured.items() if value != old.get(name)}
            group.update({name: at[name] for name in changed | {"lr"}})


def _options(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [{n: v for n, v in group.items() if n != "params"} for group in optimizer.param_groups]
