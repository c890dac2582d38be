"""What a run depends on: told in its files, compared when it goes on and between workers."""

import hashlib
from collections import ChainMap
from collections.abc import Mapping
from typing import Any, TypeAlias

from mblm.data.datasets import DistributedDataset
from mblm.train.core.config import DataLineage, GenericEntryConfig, Lineage
from mblm.train.core.parallel import Workers
from mblm.utils.checkpoint import listing

Facts: TypeAlias = dict[str, Any]
"""Plain values by dotted names, such as ``train.batch_size``."""

_LISTED_FILES = 100

# What the place in the data, the steps of the schedule and the random numbers of a state mean.
_FIXED = (
    "params.input_seq_len",
    "train.target_elements_strategy",
    "train.batch_size",
    "train.shuffle_train",
    "train.gradient_accumulate_every",
    "train.loss_average",
    "train.optimizer",
    "train.seed",
    "optimizer",
    "io.name_model",
    "io.dataset_id",
    "io.dataset_args",
    "stages",
    "training_data",
    "validation_data",
)
_OF_A_STEP = ("train.batch_size", "train.gradient_accumulate_every")
_OF_A_MACHINE = ("io.output_dir", "io.dataset_dir")


def lineage_of(dataset: DistributedDataset[Any]) -> DataLineage:
    """What the data of a dataset are, on whatever machine and in whatever folder."""
    files = dataset.lineage()
    text = "".join(f"{size} {name}\n" for name, size in files)
    return DataLineage(
        dataset=type(dataset).__name__,
        size=dataset._data_size,
        in_samples=not dataset.is_sequential,
        files=len(files),
        total=sum(size for _, size in files),
        first=dict(files[:_LISTED_FILES]),
        digest=hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest(),
    )


def facts_of(*parts: GenericEntryConfig[Any, Any, Any] | Lineage) -> Facts:
    """What is configured but for where to resume, and what it is trained on."""
    return _flat(ChainMap(*(part.model_dump(mode="json", exclude={"resume"}) for part in parts)))


def check_same_on_all(facts: Facts, workers: Workers) -> None:
    """Refuse workers that do not train the same: they would diverge, or wait without end.

    Folders may be others on another machine. Returns when all workers have come here.
    """
    of_all = workers.gather({n: value for n, value in facts.items() if n not in _OF_A_MACHINE})
    for rank, of_rank in enumerate(of_all):
        if changes := _changes(of_all[0], of_rank):
            raise ValueError(
                f"rank 0 and rank {rank} do not train the same: {listing(list(changes.values()))}"
            )


def check_same_as_before(before: Facts, now: Facts, state: object, *, exact: bool) -> list[str]:
    """Compare a run with the one that a training state is of; returns what has changed since.

    What the state's numbers depend on is refused; but the sizes of batches and steps only if the
    run is to go on exactly.
    """
    known = {_field_of(name) for name in before}  # a version before this one had fewer fields
    changes = _changes(before, {n: value for n, value in now.items() if _field_of(n) in known})
    names = _FIXED if exact else [name for name in _FIXED if name not in _OF_A_STEP]
    refused = [n for n in changes if any(f"{n}.".startswith(f"{fixed}.") for fixed in names)]
    refused.sort(key=lambda name: ".first." not in name)  # the names of files say most
    if refused:
        raise ValueError(
            f"{state} cannot be gone on from, since these have changed: "
            f"{listing([changes[name] for name in refused])}. Change them back, or begin a new "
            "run with the weights of a .pth file"
        )
    return list(changes.values())


def _field_of(name: str) -> str:
    return ".".join(name.split(".")[:2])


def _flat(value: Any, name: str = "") -> Facts:
    """Nested containers as one, in which the names of the items follow those around them."""
    if not isinstance(value, (Mapping, list)) or not value:
        return {name: value}
    items = value.items() if isinstance(value, Mapping) else enumerate(value)
    prefix = f"{name}." if name else ""
    return {n: v for key, item in items for n, v in _flat(item, f"{prefix}{key}").items()}


def _changes(before: Facts, now: Facts) -> dict[str, str]:
    names = [*before, *(name for name in now if name not in before)]
    pairs = {name: (before.get(name), now.get(name)) for name in names}
    return {n: f"{n}: {old} -> {new}" for n, (old, new) in pairs.items() if old != new}
