"""The JSON schema of an experiment's YAML file, with what is registered: blocks, datasets."""

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from mblm.model.block import StageBlock
from mblm.model.config import block_registry
from mblm.train.mblm import (
    TrainEntryConfig,
    TrainMaskedEntryConfig,
    TrainMBLMIoConfig,
    dataset_registry,
    masked_dataset_registry,
)


def experiment_schema() -> dict[str, Any]:
    """The schema of `TrainEntryConfig` and `TrainMaskedEntryConfig`, one of which a file is."""
    blocks: list[type[BaseModel]] = list(block_registry)
    entries: list[type[BaseModel]] = [TrainEntryConfig, TrainMaskedEntryConfig]
    references, schema = models_json_schema(
        [(model, "validation") for model in (*entries, *blocks)],
        title="An experiment of mblm",
    )
    definitions = schema["$defs"]
    # A block's own fields are those of one of the registered classes.
    definitions[StageBlock.__name__] = {"anyOf": [references[b, "validation"] for b in blocks]}
    dataset_id = definitions[TrainMBLMIoConfig.__name__]["properties"]["dataset_id"]
    dataset_id["enum"] = sorted({*dataset_registry, *masked_dataset_registry})
    either = [references[entry, "validation"] for entry in entries]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "anyOf": either}
