"""The schema of an experiment: the fields that a configuration has, and what is registered."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from mblm.train.schema import experiment_schema

ROOT = Path(__file__).parents[2]
SCHEMA = experiment_schema()


def problems(value: Any, schema: dict[str, Any]) -> list[str]:
    """What a value has that its schema does not allow: of fields, choices and enumerations."""
    if "$ref" in schema:
        return problems(value, SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]])
    if "anyOf" in schema:
        return min((problems(value, option) for option in schema["anyOf"]), key=len)
    if "enum" in schema:
        return [] if value in schema["enum"] else [f"{value!r} is none of {schema['enum']}"]
    if schema.get("type") == "array":
        if not isinstance(value, list):
            return [f"{value!r} is no list"]
        return [problem for item in value for problem in problems(item, schema["items"])]
    if "properties" in schema:
        if not isinstance(value, dict):
            return [f"{value!r} has no fields"]
        found = [f"{name} is missing" for name in {*schema["required"]} - {*value}]
        for name, item in value.items():
            of_field = schema["properties"].get(name)
            found += [f"no field {name}"] if of_field is None else problems(item, of_field)
        return found
    return []


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.name)
def test_the_configurations_fit(file: Path) -> None:
    assert problems(yaml.safe_load(file.read_text()), SCHEMA) == []


@pytest.mark.parametrize(
    "path, value",
    [
        (["train", "colour"], 1),
        (["params", "block", 0, "colour"], 1),
        (["params", "block", 0, "block_type"], "teleporter"),
        (["io", "dataset_id"], "book"),
    ],
    ids=str,
)
def test_mistakes_do_not(path: list[Any], value: object) -> None:
    fields = yaml.safe_load((ROOT / "configs" / "small_2d_st.yaml").read_text())
    *parents, name = path
    at = fields
    for parent in parents:
        at = at[parent]
    at[name] = value
    assert problems(fields, SCHEMA) != []
