"""Start the processes of a training run, on one machine or as one of several."""

import logging
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch

from mblm.train.core.hooks import CoreTrainerOptions
from mblm.train.core.interrupt import EXIT_INTERRUPTED, STOPS, TrainingInterrupted
from mblm.train.experiment import load_experiment
from mblm.train.mblm import TrainMaskedEntryConfig, train_encoder_mblm, train_mblm
from mblm.utils.imports import import_modules
from mblm.utils.interrupt import handled
from mblm.utils.say import say

# Workers finish their step and save when they are told to stop; later they are killed.
SECONDS_TO_STOP = 300

STOPPED_MARK = "MBLM_STOPPED_MARK"
"""Environment variable: a file that a process makes when it was stopped and its state is saved."""


def launch(
    file: Path,
    *,
    settings: Sequence[str] = (),
    resume: str | None = None,
    imports: Sequence[str] = (),
    nproc: int | None = None,
    nnodes: int = 1,
    node_rank: int | None = None,
    rdzv_endpoint: str | None = None,
    profile: int = 0,
) -> None:
    """Train an experiment in this process, or with torchrun's launcher in several.

    What torchrun has started, here or by itself, is one of several already, and trains.

    Args:
        file, settings, resume: As for `load_experiment`.
        imports: Modules that register blocks and datasets of the user's, imported by every worker.
        nproc: Processes on this machine. Default: the number of GPUs, or 1; of a process that
            torchrun has started, 1.
        nnodes: Machines, each of which runs this with the same arguments. Default 1.
        node_rank: Number of this machine, from 0. Default: given out as the machines arrive.
        rdzv_endpoint: ``HOST:PORT`` on one of the machines, where they meet.
        profile: How many steps the first worker profiles.

    Raises:
        OSError: The file cannot be read.
        ValueError: An argument or the experiment is not valid.
        SystemExit: A worker failed or the run was interrupted; with its exit status.
    """
    is_worker = bool(os.environ.get("LOCAL_RANK"))
    if is_worker and (nproc or 1, nnodes) != (1, 1):
        raise ValueError(
            "nproc, nnodes: expected neither, since torchrun has started this process and says how "
            f"many there are (LOCAL_RANK is set), got {nproc} and {nnodes}"
        )
    if nproc is None:
        nproc = 1 if is_worker else torch.cuda.device_count() or 1
    if nproc < 1 or nnodes < 1:
        raise ValueError(f"nproc and nnodes must be at least 1, got {nproc} and {nnodes}")
    if nnodes > 1 and not rdzv_endpoint:
        raise ValueError("rdzv_endpoint: several nodes need HOST:PORT of one of them")
    if node_rank is not None and not 0 <= node_rank < nnodes:
        raise ValueError(f"node_rank: expected 0 to {nnodes - 1}, got {node_rank}")

    import_modules(imports)
    if nproc == nnodes == 1:
        train = _train
        if is_worker:
            from torch.distributed.elastic.multiprocessing.errors import record

            train = record(_train)  # leaves an error where the launcher finds it
        train(file, settings, resume, profile)
        return
    config = load_experiment(file, settings, resume)  # refuses before anything is started
    arguments = [str(file), "--profile", str(profile)]
    for setting in settings:
        arguments += ["--set", setting]
    for module in imports:
        arguments += ["--import", module]
    if resume in ("latest", "auto"):
        # The latest of now: later it could be one that these workers write.
        resume = config.resume.checkpoint_file if config.resume else None
    if resume is not None:
        arguments += ["--resume", resume]
    _run_workers(arguments, nproc, nnodes, node_rank, rdzv_endpoint)


def _train(file: Path, settings: Sequence[str], resume: str | None, profile: int) -> None:
    """Train as one worker; of those that a signal stops, the first says how to go on."""
    config = load_experiment(file, settings, resume)
    options = CoreTrainerOptions(profile_steps=profile, draws_seed=True)
    try:
        if isinstance(config, TrainMaskedEntryConfig):
            train_encoder_mblm(config, options)
        else:
            train_mblm(config, options)
    except TrainingInterrupted:
        if mark := os.environ.get(STOPPED_MARK):
            Path(mark).touch()
        if os.environ.get("RANK", "0") == "0":
            say("mblm: to go on with it, add --resume latest")
        raise


def _run_workers(
    arguments: list[str],
    nproc: int,
    nnodes: int,
    node_rank: int | None,
    rdzv_endpoint: str | None,
) -> None:
    """Run ``python -m mblm train ARGUMENTS`` in every process and wait for all of them."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max((os.cpu_count() or 1) // nproc, 1)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_STOP))
    config = LaunchConfig(
        min_nodes=nnodes,
        max_nodes=nnodes,
        nproc_per_node=nproc,
        # All machines of a run have the same id; on one machine, two runs must not meet.
        run_id="mblm" if rdzv_endpoint else uuid.uuid4().hex,
        rdzv_backend="c10d" if node_rank is None else "static",
        rdzv_endpoint=rdzv_endpoint or "localhost:0",
        rdzv_configs={} if node_rank is None else {"rank": node_rank},
        max_restarts=0,
    )

    def stop(number: int, _: object) -> None:
        raise SignalException(f"got signal {number}", signal.Signals(number))

    # It tells of a failed worker in pages; here that takes a line.
    logging.getLogger("torch.distributed.elastic.multiprocessing.api").setLevel(logging.CRITICAL)
    # The launcher does not tell how the workers ended that a signal was passed on to.
    with tempfile.TemporaryDirectory() as folder:
        mark = Path(folder, "saved")
        os.environ[STOPPED_MARK] = str(mark)
        try:
            # By itself it stops its workers for three of them, and dies of the others alone.
            with handled(STOPS, stop):
                elastic_launch(config, sys.executable)("-m", "mblm", "train", *arguments)
        except SignalException as stopped:
            raise SystemExit(EXIT_INTERRUPTED if mark.exists() else 128 + stopped.sigval) from None
        except ChildFailedError as failed:
            rank, failure = failed.get_first_failure()
            status = failure.exitcode
            if status != EXIT_INTERRUPTED:
                said = failure.message
                said = said["message"] if isinstance(said, dict) else said
                say(f"mblm: error: rank {rank}: {said}")
            raise SystemExit(128 - status if status < 0 else status) from None
        finally:
            del os.environ[STOPPED_MARK]
