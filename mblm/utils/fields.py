"""The base of configurations: no unknown fields, and no truth values where numbers are meant."""

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidatorFunctionWrapHandler, field_validator


class Fields(BaseModel):
    """Refuses unknown fields, and ``yes`` for a number, which would count as 1."""

    model_config = ConfigDict(extra="forbid")

    @field_validator("*", mode="wrap")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, parse: ValidatorFunctionWrapHandler) -> Any:
        parsed = parse(value)
        pairs = [(value, parsed)]
        if isinstance(value, (list, tuple)) and isinstance(parsed, (list, tuple)):
            pairs = list(zip(value, parsed, strict=True))
        elif isinstance(value, dict) and isinstance(parsed, dict):
            pairs = list(zip(value.values(), parsed.values(), strict=True))
        for given, taken in pairs:
            if isinstance(given, bool) and not isinstance(taken, bool):
                raise ValueError("expected a number, no truth value (in YAML, yes and on are true)")
        return parsed
