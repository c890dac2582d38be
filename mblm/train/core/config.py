"""What an experiment configures, what a run writes back, and the rows of its CSV files.

An experiment with parameters of its own subclasses the models here. Unknown fields are refused,
and all errors are reported at once.
"""

import os
from typing import Annotated, Any, Generic, Literal, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from mblm.utils.fields import Fields

_Share = Annotated[float, Field(ge=0, lt=1)]


class CoreModelParams(Fields):
    """Parameters that every trained model has."""

    input_seq_len: PositiveInt = Field(description="Elements, such as bytes, in a sequence")


class CoreTrainConfig(Fields):
    """How to train."""

    target_elements: PositiveInt = Field(
        lt=2**63,
        description="At least how many elements all workers train on together, in whole steps",
    )
    target_elements_strategy: Literal["batch", "sequence"] = Field(
        description="What an element is: 'batch' counts the sequences of a batch, 'sequence' their "
        "elements, batch_size * input_seq_len"
    )
    warmup_steps_perc: float = Field(
        default=0.1, ge=0, le=1, description="Fraction of the gradient steps that warm up"
    )
    batch_size: PositiveInt = Field(description="Sequences in a batch of one worker")
    shuffle_train: bool = Field(
        default=False, description="Shuffle the training samples, differently in every epoch"
    )
    shuffle_eval: bool = Field(default=False, description="Shuffle the validation samples")
    max_eval_steps: PositiveInt | None = Field(
        default=None,
        description="At most how many batches a validation takes, all workers together; the "
        "sources of a mixture have equally many, and each at least one",
    )
    learning_rate: PositiveFloat = Field(
        allow_inf_nan=False, description="The learning rate after the warm-up"
    )
    optimizer: Literal["adam", "adamw", "muon"] = Field(
        default="adam",
        description="'muon': Muon for the matrices of stages, patch embeddings and contexts, AdamW "
        "for the rest",
    )
    learning_rate_matrix: PositiveFloat | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Muon's learning rate; by default learning_rate",
    )
    betas: tuple[_Share, _Share] = Field(default=(0.9, 0.95), description="Of Adam and AdamW")
    weight_decay: NonNegativeFloat = Field(
        default=0.0,
        allow_inf_nan=False,
        description="Decay of the matrices by adamw or muon; nothing else decays",
    )
    lr_schedule: Literal["cosine", "wsd", "linear"] = Field(
        default="cosine",
        description="How the learning rate falls after the warm-up: along a cosine, linearly, or "
        "'wsd', not at all but in the last decay_ratio of the steps, linearly",
    )
    decay_ratio: float = Field(
        default=0.4, gt=0, le=1, description="Fraction of the gradient steps in which wsd falls"
    )
    min_lr_factor: float = Field(
        default=0.0, ge=0, le=1, description="What the learning rate falls to, as a share of it"
    )
    gradient_clipping: PositiveFloat | None = Field(
        default=None, description="Largest total norm of the gradient; longer ones are scaled"
    )
    gradient_accumulate_every: PositiveInt = Field(
        description="Batches whose gradients are averaged for one step"
    )
    loss_average: Literal["batches", "entries"] = Field(
        default="batches",
        description="What the loss of a step is the mean of: of its batches' means, as published, "
        "or of all entries that count, so that a step of many small batches is one of a large",
    )
    strategy: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="'ddp': every worker holds the model; 'fsdp': the workers share its weights, "
        "gradients and optimizer state out, for models that outgrow one GPU",
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="What the forward pass computes in. 'auto': on CUDA bfloat16, or half with a "
        "gradient scaler where it is missing; on a CPU float32",
    )
    compile: bool = Field(
        default=False, description="Compile the model by torch.compile, which takes its time first"
    )
    seed: NonNegativeInt | None = Field(
        default=None,
        lt=2**32,
        description="Seed of weights, dropout and shuffling. By default mblm train draws one; in a "
        "program, the first rank's generators are used as they are, and seed those of the others",
    )
    non_finite_loss: Literal["skip", "stop"] = Field(
        default="stop",
        description="A step whose loss or gradient is NaN or infinite is left out. 'stop': the run "
        "fails after max_non_finite_steps of them in a row; 'skip': it never does",
    )
    max_non_finite_steps: PositiveInt = Field(
        default=10, description="Steps in a row that may be left out, the last of which is fatal"
    )

    @model_validator(mode="after")
    def _check_recipe(self) -> Self:
        if self.weight_decay and self.optimizer == "adam":
            raise ValueError(
                f"weight_decay: expected 0 with optimizer adam, got {self.weight_decay}; adamw and "
                "muon decay"
            )
        if self.learning_rate_matrix is not None and self.optimizer != "muon":
            raise ValueError(
                f"learning_rate_matrix: expected none with optimizer {self.optimizer}, got "
                f"{self.learning_rate_matrix}; it is muon's"
            )
        if self.lr_schedule == "wsd" and self.warmup_steps_perc + self.decay_ratio > 1:
            raise ValueError(
                "decay_ratio: expected at most what warmup_steps_perc leaves, "
                f"{1 - self.warmup_steps_perc:g}, got {self.decay_ratio}"
            )
        return self


class TrainMaskedConfig(CoreTrainConfig):
    """How to train a model to fill in masked elements."""

    masking_proba: float = Field(ge=0, le=1, description="Probability that an element is masked")


class ResumeConfig(Fields):
    """Where to go on from. A run fills it in so that its output is a next run's configuration.

    A checkpoint ``.pth`` gives the weights only: optimizer, schedule and random numbers start
    anew, in a new run folder. A training state (a folder ``<run>/state/step_<n>``) continues that
    run exactly, in its own folder; epoch and batch are then the state's.
    """

    checkpoint_file: str = Field(description="A checkpoint .pth, or the folder of a training state")
    next_epoch_index: int = Field(default=0, description="The epoch to start in")
    next_batch_index: int = Field(default=0, description="The batch of that epoch to start with")
    migrate_embeddings: bool = Field(
        default=False, description="Let a checkpoint's embeddings be fewer than the model's"
    )
    rename_modules: bool = Field(
        default=False, description="Rename modules as the trainer's rename_modules_if_enabled says"
    )
    resumed_from: str | None = Field(
        default=None, description="The checkpoint that the run before this one started from"
    )


class CoreIoConfig(Fields):
    """What a run writes, and where."""

    name_model: str = Field(min_length=1, description="Name of the model; begins its files' names")
    output_dir: Annotated[str, AfterValidator(os.path.expanduser)] = Field(
        description="Folder of the run's folder; both are created"
    )
    num_models_to_save: NonNegativeInt = Field(description="How many of the best models to keep")
    validate_amount: PositiveInt = Field(
        description="How often to validate, always at the end; at least num_models_to_save for as "
        "many models"
    )
    log_train_loss_amount: NonNegativeInt = Field(description="How often to log the training loss")
    enabled_loss_log_for_gpus: list[int] = Field(
        default=[0], description="The (global) ranks that log their losses"
    )
    save_every_minutes: float = Field(
        default=15,
        ge=0,
        description="Save a training state after so many minutes without one, besides after every "
        "validation; 0: not by time",
    )
    tensorboard: bool = Field(
        default=False, description="The same as tensorboard among the loggers"
    )
    loggers: list[Literal["tensorboard", "wandb", "trackio"]] = Field(
        default=[],
        description="Where losses, speed and samples go, too; each needs its library, mblm[<name>]",
    )
    sample_amount: NonNegativeInt = Field(
        default=0, description="At how many of the validations to let the model write"
    )
    sample_prompts: list[str] = Field(
        default=[""], min_length=1, description="What it goes on from then, each by itself"
    )

    @field_validator("name_model")
    @classmethod
    def _check_name(cls, name: str) -> str:
        if set(name) & {"/", "\\", "\0"}:
            raise ValueError("expected a name, which begins files' names, and no path")
        return name


TModelParams = TypeVar("TModelParams", covariant=True, bound=CoreModelParams)
TTrainConfig = TypeVar("TTrainConfig", covariant=True, bound=CoreTrainConfig)
TIoConfig = TypeVar("TIoConfig", covariant=True, bound=CoreIoConfig)


class SummaryStats(BaseModel):
    """What became of a run: when it ended, if it has, and how it failed, if it did."""

    training_start: str
    training_end: str
    num_workers: int
    cuda_devices: list[str]
    parameter_count: int
    error: str | None


class DataLineage(BaseModel):
    """What data are; `DistributedDataset.lineage` tells the files.

    The ``size`` is in elements or ``in_samples``. Of the files there are their number, the total of
    their sizes, those of the first hundred by name, and SHA-256 of all names and sizes.
    """

    dataset: str
    first: dict[str, int]
    size: int
    in_samples: bool
    files: int
    total: int
    digest: str


class Lineage(BaseModel):
    """What a run was made of: the package's version, the type of each stage, the seed, the data.

    The ``seed`` is ``train.seed``; without one it is drawn after the weights, and does not make
    them again.
    """

    package: str
    stages: list[str]
    seed: int
    training_data: DataLineage
    validation_data: DataLineage


class _Parts(BaseModel, Generic[TModelParams, TTrainConfig, TIoConfig]):
    model_config = ConfigDict(extra="forbid")

    params: SerializeAsAny[TModelParams]
    train: SerializeAsAny[TTrainConfig]
    io: SerializeAsAny[TIoConfig]


class GenericEntryConfig(_Parts[TModelParams, TTrainConfig, TIoConfig]):
    """The configuration of a run. That which a run has written is one, too."""

    resume: ResumeConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_was_told(cls, data: Any) -> Any:
        """Leave out what the run before has told of itself; without a checkpoint start anew."""
        if not isinstance(data, dict) or not {"summary", "lineage"} & data.keys():
            return data
        data = {key: value for key, value in data.items() if key not in ("summary", "lineage")}
        resume = data.get("resume")
        if isinstance(resume, dict) and resume.get("checkpoint_file") == "":
            data["resume"] = None
        return data


class GenericOutputConfig(_Parts[TModelParams, TTrainConfig, TIoConfig]):
    """What a run writes to its ``config.yaml``: its configuration, how to go on, what it was."""

    resume: ResumeConfig
    summary: SummaryStats
    lineage: Lineage | None = None


class CSVLossEntry(NamedTuple):
    """A row of ``loss.csv``; -1 stands for what there is not.

    ``kind`` is train, valid or test; of one source of a mixture ``valid/<source>``.
    """

    gpu_rank: int
    timestamp: str
    elements_seen: int
    kind: str
    epoch: int
    batch: int
    cum_batch: int
    loss: float
    lr: float
    avg_grad: float
    avg_grad_clipped: float


class CSVMetricsEntry(NamedTuple):
    """A row of ``metrics.csv``, of all workers together; empty where there is nothing.

    Attributes:
        cum_batch, kind: The batch and train or valid, as in ``loss.csv``.
        elements_seen: Elements of this run that were trained on.
        seconds: Since the first batch of this process.
        loss: Mean over the workers and the batches of the step.
        lr, gradient_norm: Those of the step.
        elements_per_second: Since the row before, without validating and saving.
        waiting: Which share of that time the data were waited for.
        memory_max: The most memory of the main worker in 1024**3 bytes, the GPU's or the process's.
    """

    cum_batch: int
    kind: str
    elements_seen: int
    seconds: float
    loss: float
    lr: float | None = None
    gradient_norm: float | None = None
    elements_per_second: float | None = None
    waiting: float | None = None
    memory_max: float | None = None


class CSVTimeAndMemSnapshotEntry(NamedTuple):
    """A row of ``timemem.csv``: seconds of a forward and backward pass, and the GPU's memory."""

    cum_batch: int
    num_items: int
    kind: str
    fw_time: float
    bw_time: float | None
    allocated: float
    allocated_max: float
    reserved: float
    reserved_max: float
    total: float
