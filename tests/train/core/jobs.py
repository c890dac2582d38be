"""A trainer of a tiny model on a tiny dataset, and processes that run it as workers."""

import csv
import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mblm.data.dataset.mixture import Mixture
from mblm.data.datasets import DistributedDataset
from mblm.train.core.config import (
    CoreIoConfig,
    CoreModelParams,
    CoreTrainConfig,
    GenericEntryConfig,
)
from mblm.train.core.hooks import CoreTrainerOptions
from mblm.train.core.trainer import CoreTrainer
from mblm.train.core.training_state import find_latest_state
from mblm.train.mblm import MegabyteTrainer
from mblm.utils.distributed import ElasticRunVars, process_group

SEQ_LEN = 8
NUM_TOKENS = 16
SAMPLES = 48


class Params(CoreModelParams):
    """How much dropout there is."""

    dropout: float = 0.0


Config = GenericEntryConfig[Params, CoreTrainConfig, CoreIoConfig]


class Ids(DistributedDataset[torch.Tensor]):
    """Ids that depend on their position alone; remembers where its samples began."""

    def __init__(self, samples: int = SAMPLES, worker_id: int = 0, num_workers: int = 1) -> None:
        super().__init__(
            samples * SEQ_LEN,
            is_sequential=True,
            seq_len=SEQ_LEN,
            worker_id=worker_id,
            num_workers=num_workers,
        )
        positions = torch.arange(samples * SEQ_LEN)
        self.ids = (positions * positions // 3 + positions // 7) % NUM_TOKENS
        self.seen: list[int] = []

    def get_sample(self, from_idx: int) -> torch.Tensor:
        self.seen.append(from_idx)
        return self.ids[from_idx : from_idx + SEQ_LEN]


def mixed(samples: int = SAMPLES, **worker: int) -> Mixture[torch.Tensor]:
    """Two sources; the first has all of the samples, the second the first few of them."""
    parts = {"all": Ids(samples), "few": Ids(samples // 2)}
    alone = {"worker_id": 0, "num_workers": 1, **worker}
    return Mixture(parts, {"all": 0.25, "few": 0.75}, 7, seq_len=SEQ_LEN, **alone)


class Model(nn.Module):
    """Predicts the next id from the last one."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        # Not in the order of their use, in which DDP would arrange them after the first step.
        self.logits = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, NUM_TOKENS))
        self.embedding = nn.Embedding(NUM_TOKENS, 8)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: torch.Tensor, return_logits: bool = False) -> torch.Tensor:
        logits: torch.Tensor = self.logits(self.dropout(self.embedding(ids[:, :-1])))
        if return_logits:
            return logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


class Trainer(CoreTrainer[Model, torch.Tensor, Params, CoreTrainConfig, CoreIoConfig]):
    """Counts what the tests want to know."""

    def init_model(self) -> Model:
        return Model(self.config.params.dropout)

    def model_forward(self, model: Model, batch: torch.Tensor, device: str) -> torch.Tensor:
        return model.forward(batch.to(device))

    def configure_optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.config.train.learning_rate)

    def configure_fsdp_units(self, model: Model) -> Any:
        return [model.logits]


class StopsItself(Trainer):
    """Asks itself to stop while it computes a batch."""

    stop_in = 0

    def model_forward(self, model: Model, batch: torch.Tensor, device: str) -> torch.Tensor:
        if model.training:
            type(self).stop_in -= 1
            if self.stop_in == 0:
                signal.raise_signal(signal.SIGTERM)
        return super().model_forward(model, batch, device)


class ByRecipe(Trainer):
    """Is optimized as the configuration says."""

    configure_optimizer = MegabyteTrainer.configure_optimizer  # type: ignore[assignment]
    configure_scheduler = MegabyteTrainer.configure_scheduler  # type: ignore[assignment]


# Three epochs; steps of four batches that do not end with the epochs; dropout and shuffling.
EVERYTHING: dict[str, Any] = {
    "batches": 34,
    "dropout": 0.3,
    "shuffle_train": True,
    "gradient_accumulate_every": 4,
    "gradient_clipping": 0.5,
}
MUON = {
    "optimizer": "muon",
    "learning_rate_matrix": 0.01,
    "weight_decay": 0.1,
    "lr_schedule": "wsd",
}
RECIPES: dict[str, dict[str, Any]] = {"adam": {}, "muon": MUON}


def config(folder: Path, batches: int = 12, workers: int = 1, **fields: Any) -> Config:
    """A configuration of so many batches of each worker; fields of any part by their names."""
    batch_size = fields.get("batch_size", 4)
    parts: dict[str, dict[str, Any]] = {
        "params": {"input_seq_len": SEQ_LEN},
        "train": {
            "target_elements": batches * batch_size * workers,
            "target_elements_strategy": "batch",
            "batch_size": batch_size,
            "learning_rate": 0.02,
            "gradient_accumulate_every": 1,
            "seed": 5,
        },
        "io": {
            "name_model": "tiny",
            "output_dir": str(folder),
            "num_models_to_save": 2,
            "validate_amount": 4,
            "log_train_loss_amount": batches,
        },
    }
    models = {"params": Params, "train": CoreTrainConfig, "io": CoreIoConfig}
    resume = fields.pop("resume", None)
    for name, value in fields.items():
        (part,) = [part for part, model in models.items() if name in model.model_fields]
        parts[part][name] = value
    if resume is not None:
        parts["resume"] = {"checkpoint_file": str(resume)}
    return Config.model_validate(parts)


def alone(trainer: type[Trainer], cfg: Config, **options: Any) -> Trainer:
    """A trainer that is the only worker."""
    run_vars = ElasticRunVars(local_rank=0, world_size=1, is_cuda=False)
    options.setdefault("display_progress", False)
    return trainer(cfg, run_vars, CoreTrainerOptions(**options))


def train_alone(trainer: type[Trainer], cfg: Config, dataset: Any = Ids) -> Path:
    """Train as the only worker; returns the run folder."""
    made = alone(trainer, cfg)
    made.train(dataset(), dataset(10))
    return made._folder.path


def run_of(folder: Path) -> Path:
    """The latest run folder."""
    return max(folder.glob("tiny_*"), key=lambda run: run.stat().st_ctime_ns)


def losses(run: Path) -> list[list[str]]:
    """The rows of loss.csv without their timestamps."""
    with (run / "loss.csv").open(newline="") as file:
        return [[value for i, value in enumerate(row) if i != 1] for row in csv.reader(file)]


def final_state(run: Path) -> list[Any]:
    """All that the latest training state holds, of all workers."""
    state = find_latest_state(run)
    assert state is not None
    return [torch.load(file, weights_only=True) for file in sorted(state.glob("*.pt"))]


def same(a: Any, b: Any) -> bool:
    """Whether nested plain containers are equal, tensors to the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def assert_same_runs(run: Path, whole: Path) -> None:
    """That a run has come to the same losses, state and models as one that went through."""
    assert losses(run) == losses(whole)
    assert same(final_state(run), final_state(whole))
    for file in whole.glob("*.pth"):
        assert same(torch.load(run / file.name), torch.load(file))


# -- Processes ------------------------------------------------------------------------------------

# One server imports torch, and what an optimizer's first step does; every worker is forked from it.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload([__name__, "torch._dynamo"])


def start(function: Any, workers: int, *args: Any) -> list[Any]:
    """Start processes that call a function as torchrun's workers would: ``function(*args)``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes = [
        context.Process(target=_work, args=(rank, workers, port, function, args))
        for rank in range(workers)
    ]
    for process in processes:
        process.start()
    return processes


def join(processes: list[Any], timeout: float = 600) -> list[int | None]:
    """Their exit codes; None of one that waits, as for a collective's timeout of half an hour."""
    for process in processes:
        process.join(timeout)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def _work(rank: int, workers: int, port: int, function: Any, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(workers),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    function(*args)


def train(
    cfg: Config,
    trainer: type[Trainer] = Trainer,
    dataset: Any = Ids,
    validation: Any = 10,
) -> None:
    """Train as one worker of several."""
    with process_group(backend="gloo") as run_vars:
        worker, workers = run_vars.rank or 0, run_vars.world_size
        made = trainer(cfg, run_vars, CoreTrainerOptions(display_progress=False))
        training = dataset(SAMPLES, worker_id=worker, num_workers=workers)
        made.train(training, dataset(validation))


def train_by(workers: int, cfg: Config, *what: Any, function: Any = train) -> Path:
    """Train as so many workers to the end; returns the run folder."""
    assert join(start(function, workers, cfg, *what)) == [0] * workers
    return run_of(Path(cfg.io.output_dir))
