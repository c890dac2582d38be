"""Train MBLMs: their configurations, their datasets by name, and the two trainers.

Run by torchrun, or by itself as a single worker; one YAML file says all of an experiment.
"""

import math
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from pydantic import Field, ValidationError, model_validator
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from typing_extensions import Self

from mblm.data.dataset.byte_files import ByteFiles
from mblm.data.dataset.clevr import Clevr
from mblm.data.dataset.pg19 import PG19
from mblm.data.dataset.pg19_masked import PG19Masked
from mblm.data.types import BatchMaskedForMLM, BatchWithLossMask, ModelMode
from mblm.inference.score import Score
from mblm.model.config import MBLMEncoderModelConfig, MBLMModelConfig, MBLMReturnType
from mblm.model.embeddings import MBLM_TOKEN_EMB_MIGRATION
from mblm.model.encoder import IGNORED_LABEL
from mblm.model.mblm import MBLM, MBLMEncoder
from mblm.model.utils import count_params
from mblm.train.core.config import (
    CoreIoConfig,
    CoreModelParams,
    CoreTrainConfig,
    GenericEntryConfig,
    GenericOutputConfig,
    TIoConfig,
    TrainMaskedConfig,
)
from mblm.train.core.hooks import CoreTrainerOptions, TBatch, TModel
from mblm.train.core.parallel import Workers
from mblm.train.core.trainer import CoreTrainer
from mblm.train.core.training_state import read_manifest, state_to_resume
from mblm.train.recipe import make_optimizer, make_schedule
from mblm.utils.distributed import process_group
from mblm.utils.errors import with_title
from mblm.utils.logging import create_logger, shutdown_log_handlers

SAMPLE_BYTES = 256


class _Params(CoreModelParams):
    @model_validator(mode="after")
    def _check_length(self) -> Self:
        config: Any = getattr(self, "mblm_config", self)
        context = math.prod(config.seq_lens)
        if self.input_seq_len > context and config.stage_blocks()[0].pos_emb_type == "fixed":
            raise ValueError(
                f"input_seq_len: expected at most the context of {context} bytes, which fixed "
                f"positions of stage 1 limit, got {self.input_seq_len}"
            )
        return self


class TrainMBLMParams(MBLMModelConfig, _Params):
    """An MBLM, and the length of the sequences it is trained on."""


class TrainMaskedMBLMParams(MBLMEncoderModelConfig, _Params):
    """An MBLM encoder, and the length of the sequences it is trained on."""


class TrainMBLMIoConfig(CoreIoConfig):
    """What a run reads and writes, and where."""

    dataset_dir: str = Field(description="Folder of the dataset")
    dataset_id: str = Field(description="The name that the dataset is registered by")
    dataset_args: dict[str, Any] | None = Field(
        default=None, description="Arguments of the dataset, as its class documents them"
    )
    description: str | None = Field(default=None, description="What the experiment is about")


class TrainEntryConfig(GenericEntryConfig[TrainMBLMParams, CoreTrainConfig, TrainMBLMIoConfig]):
    """The configuration of a run that trains an MBLM."""

    @model_validator(mode="after")
    def _check_prompts(self) -> Self:
        context = math.prod(self.params.seq_lens)
        for prompt in self.io.sample_prompts:
            if (size := len(prompt.encode())) >= context:
                raise ValueError(
                    f"io.sample_prompts: expected less than the context of {context} bytes, got "
                    f"{size}: {prompt[:40]!r}"
                )
        return self


class TrainOutputConfig(GenericOutputConfig[TrainMBLMParams, CoreTrainConfig, TrainMBLMIoConfig]):
    """The ``config.yaml`` of a run that has trained an MBLM."""


class TrainMaskedEntryConfig(
    GenericEntryConfig[TrainMaskedMBLMParams, TrainMaskedConfig, TrainMBLMIoConfig]
):
    """The configuration of a run that trains an MBLM encoder."""


Class = TypeVar("Class")


class DatasetRegistry(dict[str, Any]):
    """Classes of datasets by the names that configurations use.

    A class is a `DistributedDataset` with two static methods more. ``from_train_entry_config(
    config, mode, worker_id, num_workers)`` gives a part of the data, or a worker's share of it;
    ``supports_test_mode()`` tells whether there is a part to test on.
    """

    def register(self, dataset_id: str) -> Callable[[type[Class]], type[Class]]:
        """Register a class by a name, which is then this class's.

        @dataset_registry.register("my-dataset")
        class MyDataset(DistributedDataset[BatchWithLossMask]): ...
        """

        def register(dataset: type[Class]) -> type[Class]:
            self[dataset_id] = dataset
            return dataset

        return register

    def retrieve(self, dataset_id: str) -> Any:
        """The class of this name.

        Raises:
            KeyError: There is none; the message lists the names there are.
        """
        if dataset_id not in self:
            raise KeyError(
                f"io.dataset_id: no dataset is registered as {dataset_id!r}; there are "
                f"{', '.join(sorted(self))}"
            )
        return self[dataset_id]


dataset_registry = DatasetRegistry(pg19=PG19, clevr=Clevr, bytes=ByteFiles)
masked_dataset_registry = DatasetRegistry(pg19masked=PG19Masked)


class _HierarchyTrainer(
    CoreTrainer[TModel, TBatch, Any, Any, TIoConfig], Generic[TModel, TBatch, TIoConfig]
):
    """What the trainers of decoder and encoder share: the configured recipe, names."""

    progress_unit = "byte"
    model_class: type[TModel]
    config_class: type[MBLMModelConfig | MBLMEncoderModelConfig]

    def init_model(self) -> TModel:
        """The model of ``config.params``."""
        params = self.config.params
        fields = {name: getattr(params, name) for name in self.config_class.model_fields}
        return self.model_class(self.config_class(**fields))

    def configure_optimizer(self, parameters: Iterator[nn.Parameter]) -> Optimizer:
        """The one of ``train.optimizer``."""
        return make_optimizer(self.config.train, self._parallel.base, parameters)

    def configure_scheduler(self, optimizer: Optimizer, local_gradient_steps: int) -> LRScheduler:
        """The one of ``train.lr_schedule``, after the warm-up."""
        return make_schedule(self.config.train, optimizer, local_gradient_steps)

    def configure_run_id(self) -> str:
        """The environment variable ``JOB_ID`` or ``SLURM_JOB_ID``, or the time."""
        job = os.environ.get("JOB_ID") or os.environ.get("SLURM_JOB_ID")
        return job or super().configure_run_id()

    def configure_count_parameters(self, model: TModel) -> tuple[int, dict[str, int]]:
        """All parameters, and those of each stage."""
        stages: Any = model.stage_models
        return count_params(model, *((f"stage {n}", [s]) for n, s in enumerate(stages, start=1)))

    def configure_stage_types(self, model: TModel) -> list[str]:
        """The type of each stage's block, such as which Mamba."""
        config: Any = model.config
        return [block.block_type for block in config.stage_blocks()]

    def configure_fsdp_units(self, model: TModel) -> Iterable[nn.Module]:
        """The stage models; embeddings, contexts and logits are gathered with the whole."""
        stages: Any = model.stage_models
        return stages


class MegabyteTrainer(_HierarchyTrainer[MBLM, BatchWithLossMask, CoreIoConfig]):
    """Trains an MBLM to predict the next byte."""

    model_class, config_class = MBLM, MBLMModelConfig

    def configure_next_command(self, run_dir: Path) -> str:
        """To generate with the best model."""
        return f"mblm generate {shlex.quote(str(run_dir))} --prompt 'The '"

    def model_forward(self, model: MBLM, batch: BatchWithLossMask, device: str) -> torch.Tensor:
        """The loss of ``(ids, loss_mask)``, both ``(B, L)``."""
        ids, loss_mask = (tensor.to(device, non_blocking=True) for tensor in batch)
        loss: torch.Tensor = model(ids, return_type=MBLMReturnType.LOSS, loss_mask=loss_mask)
        return loss

    def generate_samples(self, model: MBLM, prompts: Sequence[str], seed: int) -> list[bytes]:
        """At most 256 bytes after each, as ``mblm generate`` does it."""
        texts = [prompt.encode() for prompt in prompts]
        limits = [min(SAMPLE_BYTES, model.context_size - len(text)) for text in texts]
        written = model.generate_batch(
            texts,
            seeds=[seed] * len(texts),
            max_bytes=limits,
            filter_thres=0.9,
            enable_progress=False,
        )
        return [result.data for result in written]

    def losses_by_position(self, model: MBLM, samples: Sequence[BatchWithLossMask]) -> list[float]:
        """Of the local stage's patch, unless that is the whole context."""
        params = self.config.params
        patch, pad = params.seq_lens[-1], params.pad_token_id
        if len(params.seq_lens) == 1 or params.input_seq_len > model.context_size:
            return []
        scores = cast("list[Score]", model.score([ids[ids != pad] for ids, _ in samples]))
        losses = torch.cat([-score.log_probs for score in scores])
        places = torch.cat([torch.arange(len(score)) % patch for score in scores])
        sums = torch.zeros(patch).index_add_(0, places, losses)
        return (sums / places.bincount(minlength=patch)).tolist()

    def count_entries(self, batch: BatchWithLossMask) -> int:
        """Ids that are no padding, where the mask is not zero."""
        ids, loss_mask = batch
        return int(((ids != self.config.params.pad_token_id) & (loss_mask != 0)).sum())

    def migrate_embeddings_if_enabled(self) -> set[str] | None:
        """The tables of older models had fewer rows: no special tokens."""
        return MBLM_TOKEN_EMB_MIGRATION


class MaskedTrainer(_HierarchyTrainer[MBLMEncoder, BatchMaskedForMLM, CoreIoConfig]):
    """Trains an MBLM encoder to fill in masked bytes."""

    model_class, config_class = MBLMEncoder, MBLMEncoderModelConfig

    def configure_next_command(self, run_dir: Path) -> str:
        """To draw its losses."""
        return f"mblm plot {shlex.quote(str(run_dir))}"

    def model_forward(
        self, model: MBLMEncoder, batch: BatchMaskedForMLM, device: str
    ) -> torch.Tensor:
        """The loss of ``(masked ids, mask, labels)``, each ``(B, L)``."""
        ids, mask, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
        loss: torch.Tensor = model(
            ids, attention_mask=mask, labels=labels, return_type=MBLMReturnType.LOSS
        )
        return loss

    def count_entries(self, batch: BatchMaskedForMLM) -> int:
        """Hidden bytes that have a label."""
        _, mask, labels = batch
        return int(((mask != 0) & (labels != IGNORED_LABEL)).sum())


def train_mblm(config: TrainEntryConfig, options: CoreTrainerOptions | None = None) -> None:
    """Train an MBLM, and test the best where the dataset has a test part.

    Runs as one of torchrun's processes, on its GPU or, on a machine without, on the CPU; without
    torchrun it is the only worker.

    Args:
        config: The experiment.
        options: The program's wishes.

    Raises:
        Exception: Whatever fails; it is logged to ``<output_dir>/mblm.train.mblm.log`` first.
        TrainingInterrupted: A signal stopped the run; see `CoreTrainer.train`.
    """
    _train(MegabyteTrainer, dataset_registry, config, options)


def train_encoder_mblm(
    config: TrainMaskedEntryConfig, options: CoreTrainerOptions | None = None
) -> None:
    """Train an MBLM encoder; otherwise as `train_mblm`."""
    _train(MaskedTrainer, masked_dataset_registry, config, options)


def _train(
    trainer_class: Any, registry: DatasetRegistry, config: Any, options: CoreTrainerOptions | None
) -> None:
    log = create_logger(__name__, log_dir=config.io.output_dir, alone=True)
    try:
        with process_group() as run_vars:
            if options is not None and options.draws_seed:
                config = _with_seed(config, Workers(run_vars))
            dataset = registry.retrieve(config.io.dataset_id)

            def part(mode: ModelMode, worker: int = 0, workers: int = 1) -> Any:
                try:
                    return dataset.from_train_entry_config(
                        config, mode=mode, worker_id=worker, num_workers=workers
                    )
                except ValidationError as error:
                    raise with_title(error, "io.dataset_args") from None
                except ValueError as error:
                    raise ValueError(
                        f"the {mode.value} part of the dataset {config.io.dataset_id!r}: {error}"
                    ) from error

            training = part(ModelMode.TRAIN, run_vars.rank or 0, run_vars.world_size)
            validation = part(ModelMode.VALID)
            # Now: what is wrong with it should not end a run that has trained.
            testing = part(ModelMode.TEST) if dataset.supports_test_mode() else None
            trainer = trainer_class(config, run_vars=run_vars, options=options)
            with trainer.holding():
                best_model = trainer.train(training, validation)
                if best_model is not None and testing is not None:
                    try:
                        trainer.test(testing, best_model)
                    except (OSError, ValueError) as error:  # data that is gone since the run began
                        log.error(f"The run is finished, its best model not tested: {error}")
                trainer.tell_result()
    except Exception as error:
        log.critical(error, exc_info=True)
        shutdown_log_handlers()
        raise


def _with_seed(config: Any, workers: Workers) -> Any:
    """The configuration with a seed: its own, that of the state it goes on from, or a drawn one."""
    seed = workers.from_main(int(torch.randint(2**31, ())))  # by all, whatever each was given
    if config.train.seed is not None:
        return config
    if (state := state_to_resume(config.resume)) is not None:  # made by a program, it may have none
        seed = read_manifest(state).get("facts", {}).get("train.seed")
    return config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})
