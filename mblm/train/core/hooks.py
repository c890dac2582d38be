"""What a trainer lets its subclass decide: the model, the optimizer, the loaders, the names."""

import logging
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, PolynomialLR
from torch.utils.data import DataLoader

from mblm.data.datasets import DistributedDataset
from mblm.model.utils import count_params
from mblm.train.core.config import GenericEntryConfig, TIoConfig, TModelParams, TTrainConfig
from mblm.train.core.parallel import Workers
from mblm.train.core.sampling import EpochBatches
from mblm.utils import cuda
from mblm.utils.logging import create_logger

TModel = TypeVar("TModel", bound=nn.Module)
TBatch = TypeVar("TBatch", bound=torch.Tensor | Sequence[torch.Tensor])


@dataclass
class CoreTrainerOptions:
    """What a program may want otherwise.

    Attributes:
        config_file_name, loss_file_name, timemem_file_name: Names in the run folder.
        max_train_restarts: How often a run of one worker goes on from its last training state
            after an error.
        skip_validation: Train without validating, and so without checkpoints.
        display_progress: Whether to show a bar; by default on a terminal. Elsewhere it is a line a
            minute.
        announce: Whether to say on standard error what is trained, how far it is and what came out;
            train.log has it anyway.
        train_prog_min_interval_seconds, valid_prog_min_interval_seconds: Between two updates.
        track_first_fw_bw_exec_times: How many passes ``timemem.csv`` tells about.
        profile_steps: How many steps the main worker profiles, into ``profile/``.
        draws_seed: Whether `train_mblm` and `train_encoder_mblm` draw a ``train.seed`` where none
            is configured, as in ``mblm train``; ``config.yaml`` has it.
        amp_dtype: What ``precision: auto`` computes in on CUDA.
    """

    config_file_name: str = "config.yaml"
    loss_file_name: str = "loss.csv"
    timemem_file_name: str = "timemem.csv"
    max_train_restarts: int = 0
    skip_validation: bool = False
    display_progress: bool = field(
        default_factory=lambda: sys.stderr is not None and sys.stderr.isatty()
    )
    announce: bool = True
    train_prog_min_interval_seconds: int = 1
    valid_prog_min_interval_seconds: int = 1
    track_first_fw_bw_exec_times: int | None = 30
    profile_steps: int = 0
    draws_seed: bool = False
    amp_dtype: torch.dtype = field(
        default_factory=lambda: torch.bfloat16 if cuda.IS_BF16_AVAILABLE else torch.half
    )


class TrainerHooks(ABC, Generic[TModel, TBatch, TModelParams, TTrainConfig, TIoConfig]):
    """The methods that a trainer must (the abstract ones) or may implement.

    Attributes:
        config: The run's configuration.
        options: The program's wishes.
        progress_unit: What an element of a sequence is called; of a ``"byte"``, progress is shown
            in bits per byte.
    """

    config: GenericEntryConfig[TModelParams, TTrainConfig, TIoConfig]
    options: CoreTrainerOptions
    progress_unit = "element"

    _workers: Workers
    _seed: int

    @abstractmethod
    def init_model(self) -> TModel:
        """Make the model, on a CPU."""

    @abstractmethod
    def model_forward(self, model: TModel, batch: TBatch, device: str) -> torch.Tensor:
        """One forward pass.

        Args:
            model: The model, or what distributes it: only ``model.forward`` may be used.
            batch: A batch as the loader gives it, not yet on the device.
            device: ``"cuda:<n>"`` or ``"cpu"``.

        Returns:
            The loss, a scalar with a gradient.
        """

    @abstractmethod
    def configure_optimizer(self, parameters: Iterator[nn.Parameter]) -> Optimizer:
        """Make the optimizer of these parameters."""

    def generate_samples(self, model: TModel, prompts: Sequence[str], seed: int) -> list[bytes]:
        """Let the model write after each prompt, for ``io.sample_amount``. Default: it cannot.

        Called on the main worker, with a copy on the CPU of a model that is sharded; the random
        numbers of the run stay as they are.
        """
        raise NotImplementedError

    def losses_by_position(self, model: TModel, samples: Sequence[TBatch]) -> list[float]:
        """The mean loss at each position in a patch, for the loggers. Default: none.

        Called on the main worker.

        Args:
            model: The model, as for `generate_samples`.
            samples: Samples of the validation data, not collated.
        """
        return []

    def count_entries(self, batch: TBatch) -> int:
        """How many entries of a batch have loss, which is what the batch weighs in a validation.

        With ``loss_average: entries`` it weighs as much in a step. Default: 1, so that all batches
        weigh the same.
        """
        return 1

    def configure_scheduler(self, optimizer: Optimizer, local_gradient_steps: int) -> LRScheduler:
        """Make the scheduler, which steps with the optimizer. Default: linearly to 0.

        Args:
            optimizer: The optimizer.
            local_gradient_steps: The steps of the whole run.

        Nothing else may decide the learning rate after so many steps: a run that goes on makes the
        scheduler anew and repeats the steps, so that a target that was changed takes effect.
        """
        return PolynomialLR(optimizer, total_iters=local_gradient_steps, power=1.0)

    def configure_logger(self, output_dir: Path, is_main_worker: bool) -> logging.Logger:
        """Make the logger. Default: ``train.log`` in the run folder, by the main worker only."""
        return create_logger("train", log_dir=output_dir, noop=not is_main_worker, alone=True)

    def configure_count_parameters(self, model: TModel) -> tuple[int, dict[str, int]]:
        """Count the parameters: in all, and of parts by name. Default: no parts."""
        return count_params(model)

    def configure_stage_types(self, model: TModel) -> list[str]:
        """What the model is built of, for ``config.yaml``; a run goes on with the same only."""
        return [type(model).__name__]

    def configure_run_id(self) -> str:
        """What follows the model's name in that of the run folder. Default: the time."""
        return f"{time.time():.0f}"

    def configure_next_command(self, run_dir: Path) -> str | None:
        """What to type next, told when the run has ended. Default: nothing.

        Args:
            run_dir: The run's folder, in which there is a model.
        """
        return None

    def configure_fsdp_units(self, model: TModel) -> Iterable[nn.Module]:
        """For ``strategy: fsdp``, the submodules to gather one at a time. Default: none.

        Their parameters may be used only while they are called.
        """
        return ()

    def migrate_embeddings_if_enabled(self) -> set[str] | None:
        """Entries of the state dict that may have fewer rows in a checkpoint. Default: none."""
        return None

    def rename_modules_if_enabled(self) -> Iterable[tuple[str, str]] | None:
        """Pairs of a prefix in a checkpoint and what replaces it. Default: none."""
        return None

    def get_train_dataloader(
        self, dataset: DistributedDataset[TBatch], **additional_data_loader_kwargs: Any
    ) -> "DataLoader[TBatch]":
        """Make the loader for training; the keywords replace those of the ``DataLoader``.

        The default starts within an epoch without loading what comes before. Any other loader may
        be returned: after a resume it is asked for the batches before, which are dropped.
        """
        order = {
            "shuffle": self.config.train.shuffle_train,
            "seed": self._seed + 1 + self._workers.rank,
        }
        return self._get_dataloader(
            dataset, order, {"drop_last": True, **additional_data_loader_kwargs}
        )

    def get_valid_dataloader(
        self, dataset: DistributedDataset[TBatch], **additional_data_loader_kwargs: Any
    ) -> "DataLoader[TBatch]":
        """Make the loader for validation: this worker's batches of a dataset that all have whole.

        Of another loader, which gives every worker all batches, each takes its own.
        """
        order = self._shared_order(self.config.train.shuffle_eval)
        return self._get_dataloader(dataset, order, additional_data_loader_kwargs)

    def get_test_dataloader(
        self, dataset: DistributedDataset[TBatch], **additional_data_loader_kwargs: Any
    ) -> "DataLoader[TBatch]":
        """Make the loader for testing, as that for validation."""
        order = self._shared_order(shuffle=False)
        return self._get_dataloader(dataset, order, additional_data_loader_kwargs)

    def _shared_order(self, shuffle: bool) -> dict[str, Any]:
        ours = {"rank": self._workers.rank, "world_size": self._workers.world_size}
        return {"shuffle": shuffle, "seed": self._seed, **ours}

    def _get_dataloader(
        self, dataset: DistributedDataset[TBatch], order: dict[str, Any], given: dict[str, Any]
    ) -> "DataLoader[TBatch]":
        """A loader of `EpochBatches` in an order, or of what the keywords given say to sample.

        Ours draws no random numbers of the program's; one that the subclass made to sample draws
        those that `TrainBatches` can repeat.
        """
        given = {"pin_memory": self._workers.device_type == "cuda", **given}
        if "batch_sampler" in given:
            given.pop("drop_last", None)
            return DataLoader(dataset, **given)
        size = given.pop("batch_size", self.config.train.batch_size)
        if {"shuffle", "sampler"} & given.keys() or size is None:
            return DataLoader(dataset, batch_size=size, **given)
        batches = EpochBatches(dataset, size, drop_last=given.pop("drop_last", False), **order)
        return DataLoader(
            dataset, **{"batch_sampler": batches, "generator": batches.generator, **given}
        )
