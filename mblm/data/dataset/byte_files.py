"""Any files, folders or globs as one row of bytes: the dataset for everyone."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from typing_extensions import Self, Unpack

from mblm.data.datasets import (
    DatasetEntryConfig,
    DistributedDataset,
    DistributedDatasetConfig,
)
from mblm.data.file_bytes import FileBytes
from mblm.data.find_files import find_files
from mblm.data.types import BatchWithLossMask, ModelMode
from mblm.utils.fields import Fields


class ByteFilesArgs(Fields):
    """What ``ByteFiles`` reads: ``io.dataset_args`` of a training configuration.

    An entry of a list is a file, a folder or a glob; ``find_files`` says what each means.
    """

    files: list[str] = Field(default=["."], min_length=1, description="What to read")
    valid_files: list[str] | None = Field(
        default=None, min_length=1, description="The validation part, in place of a fraction"
    )
    test_files: list[str] | None = Field(
        default=None, min_length=1, description="The test part, in place of a fraction"
    )
    valid_fraction: float = Field(
        default=0.05, ge=0, lt=1, description="Validation part of `files`"
    )
    test_fraction: float = Field(default=0.05, ge=0, lt=1, description="Test part of `files`")
    split_by: Literal["bytes", "documents"] = Field(
        default="bytes",
        description="Whether a fraction is the end of the bytes, or whole files from all over",
    )
    separator_id: int | None = Field(
        default=None, ge=0, description="The id between two files; may be above 255"
    )

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        for part in ("valid", "test"):
            if getattr(self, f"{part}_files") and f"{part}_fraction" in self.model_fields_set:
                raise ValueError(f"give {part}_files or {part}_fraction, not both")
        if self.valid_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"valid_fraction {self.valid_fraction} and test_fraction {self.test_fraction} "
                "leave nothing to train on"
            )
        return self

    def shares(self) -> dict[ModelMode, float]:
        """The share of ``files`` that each part takes: none where it has files of its own."""
        valid = 0.0 if self.valid_files else self.valid_fraction
        test = 0.0 if self.test_files else self.test_fraction
        return {
            ModelMode.TRAIN: 1 - valid - test,
            ModelMode.VALID: valid,
            ModelMode.TEST: test,
        }


class ByteFiles(DistributedDataset[BatchWithLossMask]):
    """Files for a decoder: a sample is ``(ids, loss_mask)``, int64 and float16, ``(seq_len,)``.

    The files follow one another, with ``separator_id`` between two if it is given. Making
    the dataset looks at their sizes; a sample is read when it is asked for.
    The same files and arguments give the same parts, always:

    - ``valid_files`` and ``test_files`` are parts of their own; their files are in no other part.
    - ``split_by: bytes`` cuts the row: training first, then validation, then test, whose sizes
      are their fractions of it, rounded down. A cut may go through a file.
    - ``split_by: documents`` deals whole files out, from all over the row: each goes to the part
      that lacks most of its fraction of the bytes so far.

    Args:
        data_dir: The folder that the arguments are relative to; or a single file.
        mode: Which part.
        optional_args: What to read; everything in ``data_dir`` by default.
        without: A folder that is left out, such as the one that runs write to.
        config: ``seq_len, worker_id, num_workers`` of ``DistributedDataset``.

    Raises:
        FileNotFoundError: A file or folder does not exist, or a folder or glob means no file.
        ValueError: A file in two parts; a part that has no bytes, or too few for the workers.
    """

    def __init__(
        self,
        data_dir: str | Path,
        mode: ModelMode,
        optional_args: ByteFilesArgs | None = None,
        without: str | Path | None = None,
        **config: Unpack[DistributedDatasetConfig],
    ) -> None:
        mode, args = ModelMode(mode), optional_args or ByteFilesArgs()
        root = Path(data_dir).expanduser()
        own_files, files = _files_of_part(root, mode, args, without)
        self._root = root if root.is_dir() else root.parent
        self._data = FileBytes(files, args.separator_id)
        self._first, self._stop = 0, len(self._data)
        shares = args.shares()
        if not own_files and args.split_by == "documents":
            parts = deal_documents(self._data.sizes, shares)
            files = [
                file for file, part in zip(self._data.files, parts, strict=True) if part is mode
            ]
            self._data = FileBytes(files, args.separator_id)
            self._stop = len(self._data)
        elif not own_files:
            stop = self._stop
            valid, test = (int(stop * shares[part]) for part in (ModelMode.VALID, ModelMode.TEST))
            cuts = {
                ModelMode.TRAIN: (0, stop - valid - test),
                ModelMode.VALID: (stop - valid - test, stop - test),
                ModelMode.TEST: (stop - test, stop),
            }
            self._first, self._stop = cuts[mode]
        try:
            super().__init__(data_size=self._stop - self._first, is_sequential=True, **config)
        except ValueError as error:
            raise ValueError(f"{str(data_dir)!r}, split by {args.split_by}: {error}") from None

    @staticmethod
    def from_train_entry_config(
        config: DatasetEntryConfig, mode: ModelMode, worker_id: int, num_workers: int
    ) -> ByteFiles:
        """The part of the files that a training configuration names.

        Raises:
            ValueError: Unknown or unfit ``dataset_args``, or a separator outside the vocabulary.
        """
        args = ByteFilesArgs.model_validate(config.io.dataset_args or {})
        num_tokens = config.params.num_tokens
        if args.separator_id is not None and args.separator_id >= num_tokens:
            raise ValueError(
                f"separator_id: expected one in [0, {num_tokens}), the vocabulary of num_tokens, "
                f"got {args.separator_id}"
            )
        data_dir, output_dir = Path(config.io.dataset_dir).expanduser(), Path(config.io.output_dir)
        if data_dir.is_dir() and data_dir.resolve() == output_dir.resolve():
            raise ValueError(
                f"io.output_dir: expected another folder than io.dataset_dir {str(data_dir)!r}: "
                "a run would be trained on what runs have written"
            )
        return ByteFiles(
            data_dir=data_dir,
            mode=mode,
            optional_args=args,
            without=output_dir,
            seq_len=config.params.input_seq_len,
            worker_id=worker_id,
            num_workers=num_workers,
        )

    @staticmethod
    def supports_test_mode() -> bool:
        """Whether there is a test part: yes; one without bytes is an error."""
        return True

    def lineage(self) -> list[tuple[str, int]]:
        """The files by their place in the folder, and how many ids of them are this part."""
        names = [os.path.relpath(file, self._root.absolute()) for file in self._data.files]
        return list(zip(names, self._data.sizes, strict=True))

    def get_sample(self, from_idx: int) -> BatchWithLossMask:
        """The ids from position ``from_idx`` of this part on, and their loss mask."""
        start = self._first + from_idx
        ids = self._data.read(start, min(start + self.seq_len, self._stop))
        return ids, torch.ones_like(ids, dtype=torch.float16)


def deal_documents(sizes: Iterable[int], shares: dict[ModelMode, float]) -> list[ModelMode]:
    """The part that each document goes to: the one that lacks most bytes of its share so far."""
    lacking = dict.fromkeys(shares, 0.0)
    parts = []
    for size in sizes:
        for part, share in shares.items():
            lacking[part] += share * size
        part = max(lacking, key=lacking.__getitem__)
        lacking[part] -= size
        parts.append(part)
    return parts


def _files_of_part(
    root: Path, mode: ModelMode, args: ByteFilesArgs, without: str | Path | None
) -> tuple[bool, list[Path]]:
    """Whether the part has files of its own, and its files, or else those that parts share."""
    if root.is_file():
        if "files" in args.model_fields_set:
            raise ValueError(f"data_dir: {str(root)!r} is a file, so files cannot be given, too")
        root, everything = root.parent, [root.name]
    elif root.is_dir():
        everything = args.files
    else:
        raise FileNotFoundError(f"data_dir: no file or folder {str(root)!r}")
    named = {ModelMode.VALID: args.valid_files, ModelMode.TEST: args.test_files}
    own = {part: find_files(root, entries, without) for part, entries in named.items() if entries}
    if len(own) == 2 and (both := own[ModelMode.VALID].keys() & own[ModelMode.TEST].keys()):
        raise ValueError(f"test_files: {min(both)!r} is one of valid_files, too")
    if mode in own:
        return True, list(own[mode].values())
    shared = find_files(root, everything, without)
    return False, [
        file for real, file in shared.items() if not any(real in files for files in own.values())
    ]
