"""Errors in a line, or in one for each field that is wrong."""

import pytest
from pydantic import BaseModel, ValidationError, field_validator

from mblm.utils.errors import describe, with_title


class Config(BaseModel):
    """Fields that may be wrong."""

    width: int
    name: str

    @field_validator("name")
    @classmethod
    def _check(cls, name: str) -> str:
        if not name:
            raise ValueError("expected\na name")
        return name


def mistakes(**fields: object) -> ValidationError:
    with pytest.raises(ValidationError) as refused:
        Config.model_validate(fields)
    return with_title(refused.value, "a.yaml")


@pytest.mark.parametrize(
    "error, line",
    [
        (FileNotFoundError(2, "No such file or directory", "a.txt"), "a.txt: No such file or"),
        (OSError("the disk  is\nfull"), "the disk is full"),
        (ValueError("bad\n  value"), "bad value"),
        (KeyError(), "KeyError"),
    ],
)
def test_any_error_is_one_line(error: Exception, line: str) -> None:
    assert describe(error).startswith(line) and "\n" not in describe(error)


def test_one_wrong_field_is_one_line() -> None:
    assert describe(mistakes(width=1, name="")) == "a.yaml: name: expected a name, got ''"


def test_several_wrong_fields_are_a_line_each() -> None:
    lines = describe(mistakes(width="wide", name=[1])).splitlines()
    assert lines[0] == "a.yaml: 2 mistakes"
    assert lines[1].startswith("  width: Input should be") and lines[1].endswith(", got 'wide'")
    assert lines[2].startswith("  name: Input should be a valid string")
    assert len(lines) == 3
