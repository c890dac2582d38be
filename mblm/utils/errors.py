"""Say what went wrong in a line, or in one for each field that is wrong."""

from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError


def describe(error: BaseException) -> str:
    """An error as one line; of several fields of a configuration, one line each.

    Of files their name and the reason are told, of fields also what came.
    """
    if isinstance(error, ValidationError):
        lines = [_describe_field(item) for item in error.errors(include_url=False)]
        if len(lines) == 1:
            return f"{error.title}: {lines[0]}"
        return "\n  ".join([f"{error.title}: {len(lines)} mistakes", *lines])
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join((str(error) or type(error).__name__).split())


def _describe_field(item: Any) -> str:
    where = ".".join(map(str, item["loc"]))
    reason = " ".join(item["msg"].removeprefix("Value error, ").split())
    if not isinstance(item["input"], (dict, list, BaseModel)):  # which would fill pages
        reason += f", got {item['input']!r}"
    return f"{where}: {reason}" if where else reason


def with_title(error: ValidationError, title: str) -> ValidationError:
    """The same error, which says where the fields come from, such as a file's name."""
    details = [
        InitErrorDetails(
            type=PydanticCustomError(item["type"], "{reason}", {"reason": item["msg"]}),
            loc=item["loc"],
            input=item["input"],
        )
        for item in error.errors(include_url=False)
    ]
    return ValidationError.from_exception_data(title, details)
