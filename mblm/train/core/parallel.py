"""The workers of a run: one model on one or many devices, and what they tell one another."""

import contextlib
import time
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel

from mblm.train.core.config import CoreTrainConfig
from mblm.utils.distributed import ElasticRunVars, cpu_group

T = TypeVar("T")
State = dict[str, Any]
"""A state dict: tensors, and a module's extra state."""


class Workers:
    """This process among the workers. Collectives are called by all of them, in the same order.

    The main worker is rank 0, which writes the files. The ``group`` is of gloo, for what is
    exchanged between CPUs; None for a single worker.
    """

    def __init__(self, run_vars: ElasticRunVars) -> None:
        self.world_size = run_vars.world_size
        self.local_rank = run_vars.local_rank
        self.device_type = "cuda" if run_vars.is_cuda else "cpu"
        self.device = f"cuda:{run_vars.local_rank}" if run_vars.is_cuda else "cpu"
        self.rank = run_vars.local_rank if run_vars.rank is None else run_vars.rank
        self.group: dist.ProcessGroup | None = None
        if self.world_size > 1:
            if not dist.is_initialized():
                raise ValueError(
                    f"run_vars: {self.world_size} workers need a process group; construct the "
                    "trainer inside `with process_group() as run_vars`"
                )
            self.rank = dist.get_rank()
            self.group = cpu_group()
        self.is_main = self.rank == 0

    def clock(self) -> float:
        """Seconds, when the device has done what it was given."""
        if self.device_type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def barrier(self) -> None:
        """Wait for all workers."""
        if self.group is not None:
            dist.barrier(self.group)

    def from_main(self, value: T) -> T:
        """The main worker's value, a plain one, on every worker."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.group)
        return values[0]

    def gather(self, value: T) -> list[T]:
        """The values of all workers, by rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def sum(self, *values: float) -> list[float]:
        """The sums of the workers' numbers."""
        sums = torch.tensor(values, dtype=torch.float64, device="cpu")
        if self.group is not None:
            dist.all_reduce(sums, group=self.group)
        return sums.tolist()


class ParallelModel:
    """A model on all workers: alone, with its gradients averaged (DDP), or sharded (FSDP).

    It is given on a CPU, and moved; the main worker's weights and buffers are everyone's. Under
    FSDP, the ``units`` are gathered one at a time and the rest of the model as a whole. It is
    compiled in place, if configured: names in its state stay.

    Attributes:
        base: The model itself.
        call: What to call in training.
        to_evaluate: What to call in validation: not DDP, which exchanges buffers in every call.
        is_sharded: Whether the weights are shared out among the workers.
    """

    def __init__(
        self, model: nn.Module, workers: Workers, train: CoreTrainConfig, units: Iterable[nn.Module]
    ) -> None:
        self._workers = workers
        if train.compile:
            model.compile()
        self.is_sharded = train.strategy == "fsdp" and workers.world_size > 1
        self._ddp: DistributedDataParallel | None = None
        if self.is_sharded:
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), src=0, group=workers.group)
            mesh = init_device_mesh(workers.device_type, (workers.world_size,))
            for module in (*units, model):
                fully_shard(module, mesh=mesh)
            self.base = model
            self.call: nn.Module = _Called(self.base)
        elif workers.world_size > 1:
            self.base = nn.SyncBatchNorm.convert_sync_batchnorm(model).to(workers.device)
            device_ids = [workers.local_rank] if workers.device_type == "cuda" else None
            self.call = self._ddp = DistributedDataParallel(self.base, device_ids=device_ids)
            _settle_buckets(self._ddp)
        else:
            self.base = model.to(workers.device)
            self.call = _Called(self.base) if train.compile else self.base
        self.to_evaluate = self.call if self._ddp is None else self.base

    def accumulate(self, *, is_last: bool) -> contextlib.AbstractContextManager[None]:
        """Around a forward and backward pass; DDP averages gradients only in a step's last one.

        FSDP does in each: between two, nobody then holds a gradient of the whole model.
        """
        if self._ddp is not None and not is_last:
            return self._ddp.no_sync()
        return contextlib.nullcontext()

    def gradient_norm(self) -> torch.Tensor:
        """Norm of the gradients of all parameters, on all shards: a scalar on the device."""
        gradients = [p.grad for p in self.base.parameters() if p.grad is not None]
        return _full(torch.nn.utils.get_total_norm(gradients))

    def mean_gradient(self) -> float:
        """Mean over the parameters of the mean entry of their gradients."""
        means = [
            _full(p.grad.sum(dtype=torch.float32)) / p.numel()
            for p in self.base.parameters()
            if p.grad is not None
        ]
        return float(torch.stack(means).mean()) if means else 0.0

    # -- Weights --------------------------------------------------------------------------------

    def full_state(self) -> State:
        """The state dict of the whole model, for the main worker; on the CPU if it was sharded."""
        if not self.is_sharded:
            return self.base.state_dict()
        whole = {}
        for name, value in self.base.state_dict().items():
            full = _full(value)  # one tensor at a time is gathered
            if self._workers.is_main:
                whole[name] = full.detach().cpu() if isinstance(full, torch.Tensor) else full
        return whole

    def load_state(self, state: State, *, is_whole: bool) -> None:
        """Load a state dict that all workers have, or what `to_local` gives of it on this one.

        Raises:
            RuntimeError: It is not of this model.
        """
        own = self.base.state_dict()
        loaded = dict(state)
        for name, value in state.items():
            if isinstance(shards := own.get(name), DTensor):
                value = value.to(shards.device)
                loaded[name] = like_shard(shard_of(value, shards) if is_whole else value, shards)
        self.base.load_state_dict(loaded)

    def gradients(self) -> list[torch.Tensor | None]:
        """This worker's part of the gradients, by parameter."""
        return [None if p.grad is None else to_local(p.grad) for p in self.base.parameters()]

    def load_gradients(self, gradients: list[torch.Tensor | None]) -> None:
        """Load what `gradients` gave."""
        for parameter, gradient in zip(self.base.parameters(), gradients, strict=True):
            parameter.grad = None
            if gradient is not None:
                parameter.grad = like_shard(gradient.to(self._workers.device), parameter)


class _Called(nn.Module):
    """Calls the model, also where ``forward`` is called by its name, past compiler and FSDP."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def to_local(value: torch.Tensor) -> torch.Tensor:
    """The worker's own part of a tensor."""
    return value.to_local() if isinstance(value, DTensor) else value


def like_shard(local: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A worker's part, as a DTensor if the parameter is one."""
    if not isinstance(parameter, DTensor):
        return local
    return DTensor.from_local(
        local,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _full(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def gather(local: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """What the workers hold of something of a parameter's shape, as a whole on all of them."""
    return _full(like_shard(local, parameter))


def shard_of(full: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The worker's own part of what all of them have as a whole, as it is of the parameter."""
    if not isinstance(parameter, DTensor):
        return full
    mesh = parameter.device_mesh
    whole = DTensor.from_local(full, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=parameter.placements).to_local()


def _settle_buckets(ddp: DistributedDataParallel) -> None:
    """Let DDP arrange its buckets now instead of after the first step.

    A bucket's arrangement decides in which order nccl adds up the gradients of many workers. If the
    first step after a resume used another than the same step of a run that went through, the two
    would differ in the last bit.
    """
    ddp.reducer.prepare_for_backward([])
    trained = [p for p in ddp.module.parameters() if p.requires_grad]
    torch.stack([p.float().sum() * 0 for p in trained]).sum().backward()
    ddp.reducer._rebuild_buckets()
    for parameter in trained:
        parameter.grad = None
