"""Join the process group of a program started with torchrun, or be one on one's own."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
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


_cpu_group: "dist.ProcessGroup | None" = None


@contextmanager
def process_group(
    *, backend: Literal["gloo", "nccl"] | None = None, timeout: timedelta | None = None
) -> Iterator[ElasticRunVars]:
    """Join the default process group for the length of the block.

        with process_group() as run_vars:
            print(run_vars.local_rank, run_vars.world_size)

    Without any of torchrun's variables the process is a group of its own. When the block ends
    with an error, the group is left without waiting for the other processes. They fail where they
    next wait for this one, with its error as theirs.

    Args:
        backend: ``"nccl"`` for CUDA devices, one per process, which becomes the current device,
            or ``"gloo"``. By default nccl where CUDA is available.
        timeout: How long to wait for another process. By default torch's, of 10 or 30 minutes.

    Raises:
        RuntimeError: Another process has failed; the message is that of its error.
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
        dist.init_process_group(backend=backend, timeout=timeout)
    else:
        store = dist.HashStore()
        dist.init_process_group(backend=backend, store=store, rank=0, world_size=1, timeout=timeout)
    global _cpu_group
    try:
        if run_vars.world_size > 1:
            # Now: a process that fails before all have made it would be waited for to the timeout.
            _cpu_group = dist.new_group(backend="gloo", timeout=timeout)
        yield run_vars
    except BaseException as error:
        first = _first_error(run_vars, error)
        _abort()
        # What is said of a lost connection; an error of one's own stays what it is.
        if first and (type(error) is RuntimeError or isinstance(error, dist.DistError)):
            raise RuntimeError(f"another process failed: {first}") from error
        raise
    finally:
        _cpu_group = None
    dist.destroy_process_group()


def cpu_group() -> "dist.ProcessGroup":
    """The gloo group of all processes, for what is exchanged between CPUs."""
    return dist.new_group(backend="gloo") if _cpu_group is None else _cpu_group


def _first_error(run_vars: ElasticRunVars, error: BaseException) -> str | None:
    """Tell the others of an error; what another process has told before, if one has."""
    if run_vars.world_size == 1 or not isinstance(error, Exception):
        return None  # all are told to stop by a signal
    own = f"rank {run_vars.rank}: {type(error).__name__}: {error}"
    try:
        store = dist.distributed_c10d._get_default_store()
        first: str = store.compare_set("mblm/error", "", own).decode()
    except Exception:  # the process that has the store may be the one that failed
        return None
    return None if first == own else first


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
    backend = dist.get_backend()
    abort = getattr(dist.distributed_c10d, "_abort_process_group", None)
    if backend == "nccl" and abort is not None:
        abort()
    else:
        dist.destroy_process_group()
