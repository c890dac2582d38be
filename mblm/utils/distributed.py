"""Join the process group of a program started with torchrun, or be one on one's own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.distributed
from pydantic import BaseModel

# What torchrun sets and the process group needs.
_TORCHRUN_VARIABLES = ("LOCAL_RANK", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class ElasticRunVars(BaseModel):
    """This process among those torchrun started.

    Attributes:
        local_rank: Its index on its machine.
        world_size: The number of processes on all machines.
        is_cuda: Whether each has a CUDA device, that of its local rank.
        rank: Its index among all processes; None where the program did not say.
    """

    local_rank: int
    world_size: int
    is_cuda: bool
    rank: int | None = None


@contextmanager
def process_group(*, backend: Literal["gloo", "nccl"] | None = None) -> Iterator[ElasticRunVars]:
    """Join the default process group for the length of the block.

        with process_group() as run_vars:
            print(run_vars.local_rank, run_vars.world_size)

    Without any of torchrun's variables the process is a group of its own. When the block ends
    with an error, the group is left without waiting for the other processes.

    Args:
        backend: ``"nccl"`` for CUDA devices, one per process, which becomes the current device,
            or ``"gloo"``. By default nccl where CUDA is available.

    Raises:
        ValueError: A variable that torchrun sets is missing or no integer, or nccl is asked for
            without CUDA.
    """
    if backend is None:
        backend = "nccl" if torch.cuda.is_available() else "gloo"
    is_cuda = backend == "nccl"
    if is_cuda and not torch.cuda.is_available():
        raise ValueError("backend 'nccl' needs CUDA, which torch does not find; use 'gloo'")

    run_vars = _run_vars(is_cuda)
    if is_cuda:
        torch.cuda.set_device(run_vars.local_rank)
    if os.environ.get("RANK"):
        torch.distributed.init_process_group(backend=backend)
    else:
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group(backend=backend, store=store, rank=0, world_size=1)
    try:
        yield run_vars
    except BaseException:
        _abort()
        raise
    torch.distributed.destroy_process_group()


def _run_vars(is_cuda: bool) -> ElasticRunVars:
    missing = [name for name in _TORCHRUN_VARIABLES if not os.environ.get(name)]
    if len(missing) == len(_TORCHRUN_VARIABLES):
        return ElasticRunVars(local_rank=0, world_size=1, is_cuda=is_cuda, rank=0)
    if missing:
        raise ValueError(
            f"environment variables not set: {', '.join(missing)}; start the program with "
            "`torchrun --standalone --nproc-per-node=1 program.py`"
        )
    names = {"local_rank": "LOCAL_RANK", "world_size": "WORLD_SIZE", "rank": "RANK"}
    values = {field: os.environ[variable] for field, variable in names.items()}
    return ElasticRunVars.model_validate({**values, "is_cuda": is_cuda})


def _abort() -> None:
    """Leave the group; what nccl still waits for is given up, which a mere destroy waits for."""
    backend = torch.distributed.get_backend()
    abort = getattr(torch.distributed.distributed_c10d, "_abort_process_group", None)
    if backend == "nccl" and abort is not None:
        abort()
    else:
        torch.distributed.destroy_process_group()
