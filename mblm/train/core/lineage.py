"""What a run is trained on: told in its files, compared when it goes on and between workers."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from mblm.data.datasets import DistributedDataset
from mblm.train.core.config import DataLineage, GenericEntryConfig, Lineage
from mblm.train.core.parallel import Workers

Config = GenericEntryConfig[Any, Any, Any]

_LISTED = 100

# What the place in the data, the steps of the schedule and the random numbers of a state mean.
_FIXED = {
    "params": {"input_seq_len"},
    "train": {
        "target_elements_strategy",
        "batch_size",
        "shuffle_train",
        "gradient_accumulate_every",
        "seed",
    },
    "io": {"name_model", "dataset_id", "dataset_args"},
}

_OF_A_MACHINE = {"io": {"output_dir", "dataset_dir"}}


def lineage_of(dataset: DistributedDataset[Any]) -> DataLineage:
    """What the data of a dataset are, on whatever machine and in whatever folder."""
    sources = dataset.lineage()
    text = "".join(f"{size} {name}\n" for name, size in sources)
    return DataLineage(
        digest=hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest(),
        size=sources[0][1],
        files=len(sources) - 1,
        first=[f"{name}: {size}" for name, size in sources[:_LISTED]],
    )


def check_same_on_all(lineage: Lineage, workers: Workers) -> None:
    """Refuse workers that do not train the same; returns when all of them have come here.

    Raises:
        ValueError: On all workers: what differs between the main one and another.
    """
    of_all = workers.gather(lineage)
    for rank, of_rank in enumerate(of_all):
        if differences := _differences(of_all[0], of_rank):
            raise ValueError(f"rank 0 and rank {rank} do not train the same: {differences[0]}")


def check_same_settings(config: Config, workers: Workers, **others: object) -> None:
    """Refuse workers whose settings differ: they would diverge, or wait for one another forever.

    Args:
        config: The configuration; its folders may be others on another machine.
        workers: The workers.
        others: What must not differ beside it.

    Raises:
        ValueError: On all workers: a field that differs between the main one and another.
    """
    settings: dict[str, object] = dict(others)
    for part, fields in config.model_dump(mode="json", exclude=_OF_A_MACHINE).items():
        settings |= {f"{part}.{name}": value for name, value in (fields or {}).items()}
    of_all = workers.gather(settings)
    for rank, of_rank in enumerate(of_all):
        for name in sorted(of_all[0].keys() | of_rank.keys()):
            main, other = of_all[0].get(name), of_rank.get(name)
            if main != other:
                raise ValueError(
                    f"the processes of a run need the same settings: {name} is {main!r} on rank 0 "
                    f"and {other!r} on rank {rank}"
                )


def check_same_as_before(
    before: dict[str, Any], now: dict[str, Any], lineage: Lineage, state: object
) -> list[str]:
    """Compare a run with the one that a training state is of.

    Args:
        before: The configuration and the lineage that the state was saved with.
        now: The configuration.
        lineage: What the run would be trained on.
        state: The state, for the message.

    Returns:
        The fields that have changed and take effect from now on.

    Raises:
        ValueError: Something has changed that the state's numbers depend on; all of it is named.
    """
    now, then = json.loads(json.dumps(now)), Lineage.model_validate(before["lineage"])
    is_same = then.package == lineage.package
    taken = [] if is_same else [f"package: {then.package} -> {lineage.package}"]
    refused = _differences(then, lineage)
    for part, fixed in _FIXED.items():
        for name, value in before["config"][part].items():
            if name in now[part] and now[part][name] != value:
                change = f"{part}.{name}: {value} -> {now[part][name]}"
                (refused if name in fixed else taken).append(change)
    if refused:
        raise ValueError(
            f"{state} cannot be gone on from, since these have changed: {'; '.join(refused)}. "
            "Change them back, or begin a new run with the weights of a .pth file"
        )
    return taken


def _differences(before: Lineage, now: Lineage) -> list[str]:
    changes = []
    if before.stages != now.stages:
        changes.append(f"stages: {before.stages} -> {now.stages}")
    for name in ("training_data", "validation_data"):
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            changes.append(
                f"{name}: {_told(old)} -> {_told(new)}{_first_other(old.first, new.first)}"
            )
    return changes


def _told(data: DataLineage) -> str:
    files = f" of {data.files:,} file{'s' * (data.files != 1)}"
    return f"{data.size:,} elements" + (files if data.files else "")


def _first_other(old: Sequence[str], new: Sequence[str]) -> str:
    for before, now in zip([*old, "nothing"], [*new, "nothing"], strict=False):
        if before != now:
            return f", such as {before} -> {now}"
    return ""
