"""A run while it goes: the model and what trains it, where it is, and its state as plain values."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mblm.train.core.parallel import ParallelModel, like_shard, to_local
from mblm.train.core.rng import Rng, get_rng
from mblm.train.core.training_state import State, map_tensors


@dataclass
class Position:
    """How far a worker has come.

    Attributes:
        step: Cumulative index of the next batch, over all epochs and runs.
        done: Batches of this run.
        epoch, batch: Where the next batch is.
        elements_seen: Elements of this worker in this run.
        non_finite: Steps left out in a row.
        without_gradient: Steps whose gradient was zero.
        avg_grad, avg_grad_clipped: Mean gradient of the last step that was looked at, or -1.
    """

    step: int = 0
    done: int = 0
    epoch: int = 0
    batch: int = 0
    elements_seen: int = 0
    non_finite: int = 0
    without_gradient: int = 0
    avg_grad: float = -1.0
    avg_grad_clipped: float = -1.0

    def advance(self, next_epoch: int, next_batch: int, elements: int) -> None:
        """Note that a batch of so many elements is done, and where the next one is."""
        self.step += 1
        self.done += 1
        self.epoch, self.batch = next_epoch, next_batch
        self.elements_seen += elements


@dataclass
class Run:
    """What changes while training, all of which a training state holds.

    Attributes:
        losses: The losses of the batches since the last step, scalars on the device.
    """

    model: ParallelModel
    optimizer: Optimizer
    scheduler: LRScheduler | None
    scaler: torch.amp.GradScaler
    position: Position = field(default_factory=Position)
    losses: list[torch.Tensor] = field(default_factory=list)

    def step(self, *, clip: float | None, measure: Callable[[], float] | None = None) -> float:
        """Apply the gradients, unless one of them is NaN or infinite on any worker.

        Waits for the device once, for the norm of the gradients: weights that a bad gradient has
        reached cannot be repaired.

        Args:
            clip: The largest norm.
            measure: Measures the mean gradient, if that is to be noted.

        Returns:
            The norm of the gradients, which were applied if it is finite.
        """
        self.scaler.unscale_(self.optimizer)
        device_norm = self.model.gradient_norm()
        if measure is not None:
            self.position.avg_grad = measure()
        norm = float(device_norm)
        if math.isfinite(norm):
            if clip is not None:
                self.model.clip_gradients(clip, device_norm)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            if self.scheduler is not None:
                self.scheduler.step()
        elif self.scaler.is_enabled():
            self.scaler.update(self.scaler.get_scale() * self.scaler.get_backoff_factor())
        if measure is not None:
            self.position.avg_grad_clipped = measure()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def common_state(self) -> State:
        """What all workers share."""
        state: State = {
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        return state if self.model.is_sharded else {**state, **self._weights()}

    def own_state(self, epoch_rng: Rng | None) -> State:
        """What is this worker's."""
        state: State = {
            "position": asdict(self.position),
            "rng": get_rng(),
            "epoch_rng": epoch_rng,
            "gradients": self.model.gradients(),
            "losses": [loss.detach().cpu() for loss in self.losses],
        }
        return {**state, **self._weights()} if self.model.is_sharded else state

    def load(self, common: State, own: State) -> None:
        """Go on from a state; the generators are left as they are."""
        weights = own if self.model.is_sharded else common
        self.model.load_local_state(weights["model"])
        self._load_optimizer(weights["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(common["scheduler"])
        self.scaler.load_state_dict(common["scaler"])
        self.position = Position(**own["position"])
        self.model.load_gradients(own["gradients"])
        self.losses = list(own["losses"])

    def _weights(self) -> State:
        return {
            "model": self.model.local_state(),
            "optimizer": map_tensors(self.optimizer.state_dict(), to_local),
        }

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        """Load the optimizer's state, the tensors of sharded parameters as shards."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, entries in state["state"].items():
            parameter = parameters[index]
            for name, value in entries.items():
                if isinstance(value, torch.Tensor) and value.shape == to_local(parameter).shape:
                    entries[name] = like_shard(value.to(parameter.device), parameter)
        self.optimizer.load_state_dict(state)
