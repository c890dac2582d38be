"""Read and write a program's files: YAML configurations, CSV and JSON lines, checkpoints."""

import csv
import json
import logging
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import yaml
from pydantic import BaseModel, RootModel, ValidationError
from pydantic_core import PydanticSerializationError

from mblm.utils.atomic import atomic_write
from mblm.utils.checkpoint import StateDict, load_model_state, save_model_state
from mblm.utils.errors import with_title
from mblm.utils.naming import naming_file

__all__ = [
    "CSVWriter",
    "NDJSONWriter",
    "StateDict",
    "dump_yml",
    "load_model_state",
    "load_yml",
    "read_jsonl",
    "save_model_state",
]

T = TypeVar("T")
Model = TypeVar("Model", bound=BaseModel)
Row = TypeVar("Row", bound=NamedTuple)

STANDARD_INPUT = Path("-")

_OTHER_SUFFIX = {".yaml": ".yml", ".yml": ".yaml"}


@contextmanager
def open_binary(file: Path) -> Iterator[Callable[[int], bytes]]:
    """Open a file and read so many bytes of it; ``-`` is standard input, which stays open.

    Errors of reading, and no others of the block, name the file.
    """
    if file == STANDARD_INPUT and sys.stdin is None:
        raise OSError("standard input is closed")
    opened = nullcontext(sys.stdin.buffer) if file == STANDARD_INPUT else file.open("rb")
    with opened as stream:

        def read(count: int) -> bytes:
            with naming_file(file):
                return stream.read(count)

        yield read


def load_yml(path: str | Path, parse_to: type[Model], try_yaml_suffixes: bool = False) -> Model:
    """Read a YAML file into a pydantic model.

    Args:
        path: The file, ending in ``.yaml`` or ``.yml``.
        parse_to: The model's class.
        try_yaml_suffixes: If there is no such file, try the other of the two suffixes.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file has another suffix, is no valid YAML or no mapping, or has fields
            that are unknown, missing or wrong: pydantic's ``ValidationError``, which names them.
    """
    path = Path(path)
    if try_yaml_suffixes and path.suffix in _OTHER_SUFFIX and not path.exists():
        other = path.with_suffix(_OTHER_SUFFIX[path.suffix])
        path = other if other.exists() else path
    data = _read_yml(path) if issubclass(parse_to, RootModel) else load_fields(path)
    try:
        return parse_to.model_validate(data)
    except ValidationError as error:
        raise with_title(error, f"{error.title} in {path}") from None


def load_fields(path: Path) -> dict[str, Any]:
    """The fields of a YAML file as they are; raises as `load_yml` does."""
    data = _read_yml(path)
    if not isinstance(data, dict):
        came = "nothing" if data is None else type(data).__name__
        raise ValueError(f"{path}: expected a mapping of fields at the top level, got {came}")
    return data


def _read_yml(path: Path) -> Any:
    if path.suffix not in _OTHER_SUFFIX:
        raise ValueError(f"{path} is not a YAML file: its suffix must be .yaml or .yml")
    return parse_yml(path.read_bytes(), str(path))


def parse_yml(text: str | bytes, name: str) -> Any:
    """What a YAML document says, refused where a key comes twice; ``1e6`` is a number."""
    try:
        return yaml.load(text, _Loader)  # a safe one
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        reason = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ValueError(f"{name}{where}: invalid YAML: {reason}") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's, in which the last of equal keys counts, and a number needs a point to be one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Refuse a key that comes twice; what ``<<`` merges in later may be said anew."""
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if (key.tag, str(key.value)) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} comes twice", key.start_mark
                )
            seen.add((key.tag, str(key.value)))
        return node

    def construct_scalar(self, node: Any) -> Any:
        """Join the halves of a character that is escaped as in JSON; one alone is no text."""
        try:
            text = super().construct_scalar(node)
            return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            problem = "half of a character"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark) from None


class _Dumper(yaml.SafeDumper):
    """PyYAML's, which quotes a text that reads like a number to `_Loader`."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def dump_yml(path: str | Path, data: BaseModel) -> Path:
    """Write a pydantic model to a YAML file, which is replaced as a whole or left as it was.

    Args:
        path: The file; its suffix becomes ``.yaml``.
        data: The model.

    Returns:
        The file written.

    Raises:
        TypeError: `data` is no pydantic model or holds a value that YAML has no form for.
    """
    if not isinstance(data, BaseModel):
        raise TypeError(f"data must be a pydantic model, got {type(data).__name__}")
    path = Path(path).with_suffix(".yaml")
    try:
        text = yaml.dump(data.model_dump(mode="json"), Dumper=_Dumper)
    except (yaml.representer.RepresenterError, PydanticSerializationError) as error:
        name = type(data).__name__
        raise TypeError(f"{name} holds a value that YAML has no form for: {error}") from error
    with atomic_write(path) as file:
        file.write(text.encode())
    return path


class CSVWriter(Generic[Row]):
    """Appends named tuples to a CSV file, which begins empty; their field names are its header.

    Several threads and processes may append to one file: a lock file beside it,
    ``<name>.csv.lock``, keeps their rows apart.

    Args:
        output_dir: Folder of the file, created if missing.
        file_name: Name of the file; its suffix becomes ``.csv``.
        noop: Write nothing and create nothing.
    """

    def __init__(self, output_dir: str | Path, file_name: str, noop: bool = False) -> None:
        self.noop = noop
        if noop:
            return
        from filelock import FileLock

        if (lock_logger := logging.getLogger("filelock")).level == logging.NOTSET:
            lock_logger.setLevel(logging.WARNING)  # it logs every row at debug level

        self._file = Path(output_dir, file_name).with_suffix(".csv")
        self._file.parent.mkdir(parents=True, exist_ok=True)
        self._file.write_bytes(b"")
        self._lock = FileLock(f"{self._file}.lock")

    def write_row(self, row: Row) -> None:
        """Append a row, after the header if it is the first."""
        if self.noop:
            return
        if not hasattr(row, "_fields"):
            raise TypeError(f"row must be a named tuple, got {type(row).__name__}")
        with self._lock, self._file.open("a", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            if file.tell() == 0:
                writer.writerow(row._fields)
            writer.writerow(row)


class NDJSONWriter(Generic[Model]):
    """Appends pydantic models to a file, one JSON object a line.

    Args:
        path: The file; what it holds already is kept.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.stream_positions: list[int] = []  # where the lines of this writer begin

    def write_line(self, obj: Model) -> None:
        """Append a line."""
        line = obj.model_dump_json() + "\n"
        with self.path.open("ab") as file:
            self.stream_positions.append(file.tell())
            file.write(line.encode())

    def remove_last_line(self) -> None:
        """Remove the last line of those this writer has written, if there is one."""
        if self.stream_positions:
            with self.path.open("ab") as file:
                file.truncate(self.stream_positions.pop())


def read_jsonl(path: Path | str, parse_lines_to: Callable[..., T]) -> list[T]:
    """Read a file of one JSON object a line.

    Args:
        path: The file.
        parse_lines_to: Called with an object's entries as keyword arguments, such as a class.

    Returns:
        The results, one per line.

    Raises:
        ValueError: A line is no JSON object; the message names it.
    """
    results = []
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            results.append(parse_lines_to(**_parse_object(line, f"{path}, line {number}")))
    return results


def _parse_object(line: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise json.JSONDecodeError(f"{where}: {error.msg}", error.doc, error.pos) from None
    except RecursionError as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(value).__name__}")
    return value
