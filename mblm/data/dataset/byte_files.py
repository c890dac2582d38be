"""Any files, folders or globs as one row of bytes: the dataset for everyone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from typing_extensions import Self, Unpack

from mblm.data.dataset.mixture import Mixture, check_weights
from mblm.data.datasets import DistributedDataset, DistributedDatasetConfig
from mblm.data.deal import Dealer
from mblm.data.file_bytes import FileBytes
from mblm.data.find_files import find_files
from mblm.data.packed import is_packed, lineage_of_part, open_part, refuse_packed
from mblm.data.types import BatchWithLossMask, ModelMode
from mblm.utils.checks import check_integer
from mblm.utils.errors import describe
from mblm.utils.fields import Fields

_PARTS_OF_FILES = {
    *("files", "valid_files", "test_files"),
    *("valid_fraction", "test_fraction", "split_by"),
}


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
        default=None, ge=0, description="The id between two documents; may be above 255"
    )
    sample_starts: Literal["anywhere", "documents"] = Field(
        default="anywhere",
        description="Where samples start: one where another ends; or at every document, a long one "
        "being cut, and what follows fills a sample up",
    )
    sources: dict[Annotated[str, Field(min_length=1)], float] | None = Field(
        default=None,
        min_length=1,
        description="Files, folders or packed folders to mix, and their shares of the samples",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        for part in ("valid", "test"):
            if getattr(self, f"{part}_files") and f"{part}_fraction" in self.model_fields_set:
                raise ValueError(f"give {part}_files or {part}_fraction, not both")
        if self.valid_fraction + self.test_fraction >= 1:
            raise ValueError(
                f"valid_fraction {self.valid_fraction} and test_fraction {self.test_fraction} "
                "leave nothing to train on"
            )
        if self.sources is not None:
            if given := self.model_fields_set & {"files", "valid_files", "test_files"}:
                raise ValueError(f"give sources or {min(given)}, not both")
            check_weights(self.sources)
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

    The files follow one another, with ``separator_id`` between two documents if it is given; a
    document is a file, or one of a packed folder. Making the dataset looks at their sizes; a sample
    is read when it is asked for. The same files and arguments give the same parts, always:

    - ``valid_files`` and ``test_files`` are parts of their own; their files are in no other part.
    - ``split_by: bytes`` cuts the row: training first, then validation, then test, whose sizes
      are their fractions of it, rounded down. A cut may go through a file.
    - ``split_by: documents`` deals whole files out, from all over the row: each goes to the part
      that lacks most of its fraction of the bytes so far.
    - A packed folder has parts of its own.

    Args:
        data_dir: The folder that the arguments are relative to; a packed folder; or a single file.
        mode: Which part.
        optional_args: What to read; everything in ``data_dir`` by default.
        without: A folder that is left out, such as the one that runs write to.
        config: ``seq_len, worker_id, num_workers`` of ``DistributedDataset``.

    Raises:
        FileNotFoundError: A file or folder does not exist, or a folder or glob means no file.
        ValueError: A file in two parts; a part that has no bytes, or too few for the workers;
            ``sources``, which `from_train_entry_config` mixes.
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
        if args.sources is not None:
            raise ValueError("sources: expected none, make a Mixture of several datasets")
        root = Path(os.path.expanduser(data_dir))
        if is_packed(root):
            if given := args.model_fields_set & _PARTS_OF_FILES:
                raise ValueError(f"{min(given)}: {str(root)!r} is packed and has its own parts")
            self._data = open_part(root, mode, args.separator_id)
            self._first, self._stop = 0, len(self._data)
            self._lineage = lineage_of_part(root, mode)
        else:
            self._data, self._first, self._stop = _part_of_files(root, mode, args, without)
            folder = (root if root.is_dir() else root.parent).absolute()
            names = [os.path.relpath(file, folder) for file in self._data.files]
            self._lineage = list(zip(names, self._data.sizes, strict=True))
        self._samples_until: NDArray[np.int64] | None = None
        size = self._stop - self._first
        if args.sample_starts == "documents":
            size = self._cut_documents(config["seq_len"], args.separator_id is not None)
        is_sequential = self._samples_until is None
        try:
            super().__init__(data_size=size, is_sequential=is_sequential, **config)
        except ValueError as error:
            raise ValueError(f"{str(data_dir)!r}, split by {args.split_by}: {error}") from None

    def _cut_documents(self, seq_len: int, is_separated: bool) -> int:
        """Note where documents start and how many samples there are up to the end of each."""
        check_integer("seq_len", seq_len, 1)
        inside = slice(*np.searchsorted(self._data.starts, (self._first + 1, self._stop)))
        starts = np.append(self._first, self._data.starts[inside])
        ends = np.append(starts[1:] - int(is_separated), self._stop)
        last = np.minimum(ends - 1, self._stop - seq_len)  # that a sample may start at
        self._document_starts = starts
        self._samples_until = np.cumsum(np.maximum((last - starts) // seq_len + 1, 0))
        return int(self._samples_until[-1])

    @staticmethod
    def from_train_entry_config(
        config: Any, mode: ModelMode, worker_id: int, num_workers: int
    ) -> Any:
        """The part of the files that a `TrainEntryConfig` names, a `Mixture` if of `sources`.

        None if there is to be no test part.

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
        root = Path(os.path.expanduser(config.io.dataset_dir))
        if args.sources is None:
            return _open_configured(config, root, mode, args, worker_id, num_workers)
        parts: dict[str, DistributedDataset[BatchWithLossMask]] = {}
        names: dict[str, str] = {}
        for name in args.sources:
            path = root / os.path.expanduser(name)
            if (other := names.setdefault(os.path.realpath(path), name)) != name:
                raise ValueError(f"sources: {other!r} and {name!r} are the same")
            unfit = {"sources"} | (_PARTS_OF_FILES if is_packed(path) else set())
            of_source = ByteFilesArgs(**args.model_dump(exclude_unset=True, exclude=unfit))
            try:
                part = _open_configured(config, path, mode, of_source, worker_id=0, num_workers=1)
            except (OSError, ValueError) as error:
                raise ValueError(f"sources: {name!r}: {describe(error)}") from error
            if part is None:  # a test on the others alone would be no test of the mixture
                return None
            parts[name] = part
        return Mixture(
            parts,
            weights=args.sources,
            seed=config.train.seed or 0,
            seq_len=config.params.input_seq_len,
            worker_id=worker_id,
            num_workers=num_workers,
        )

    @staticmethod
    def supports_test_mode() -> bool:
        """Whether there may be a test part: yes; `from_train_entry_config` gives None if not."""
        return True

    def lineage(self) -> list[tuple[str, int]]:
        """The files by their place in the folder, and how many ids of them are this part."""
        return self._lineage

    def get_sample(self, from_idx: int) -> BatchWithLossMask:
        """The ids from position ``from_idx`` of this part on, and their loss mask.

        With ``sample_starts: documents``, of its sample ``from_idx``.
        """
        start = self._first + from_idx
        if self._samples_until is not None:
            document = int(np.searchsorted(self._samples_until, from_idx, side="right"))
            before = self._samples_until[document - 1] if document else 0
            start = int(self._document_starts[document] + (from_idx - before) * self.seq_len)
        ids = self._data.read(start, min(start + self.seq_len, self._stop))
        return ids, torch.ones_like(ids, dtype=torch.float16)


def _open_configured(
    config: Any,
    data_dir: Path,
    mode: ModelMode,
    args: ByteFilesArgs,
    worker_id: int,
    num_workers: int,
) -> ByteFiles | None:
    """One folder for a run; None if there is to be no test part."""
    output_dir = Path(config.io.output_dir)
    if data_dir.is_dir() and data_dir.resolve() == output_dir.resolve():
        raise ValueError(
            f"io.output_dir: expected another folder than io.dataset_dir {str(data_dir)!r}: "
            "a run would be trained on what runs have written"
        )
    has_test_part = not is_packed(data_dir) and (args.test_files or args.test_fraction)
    if mode is ModelMode.TEST and not has_test_part:
        return None
    return ByteFiles(
        data_dir=data_dir,
        mode=mode,
        optional_args=args,
        without=output_dir,
        seq_len=config.params.input_seq_len,
        worker_id=worker_id,
        num_workers=num_workers,
    )


def _part_of_files(
    root: Path, mode: ModelMode, args: ByteFilesArgs, without: str | Path | None
) -> tuple[FileBytes, int, int]:
    """A row of files, and from where to where in it the part is."""
    own_files, files = _files_of_part(root, mode, args, without)
    refuse_packed(files)
    data, shares = FileBytes(files, args.separator_id), args.shares()
    if own_files:
        return data, 0, len(data)
    if args.split_by == "documents":
        dealer, of_files = Dealer(shares), zip(data.files, data.sizes, strict=True)
        files = [file for file, size in of_files if dealer.deal(size) is mode]
        data = FileBytes(files, args.separator_id)
        return data, 0, len(data)
    stop = len(data)
    valid, test = (int(stop * shares[part]) for part in (ModelMode.VALID, ModelMode.TEST))
    cuts = {
        ModelMode.TRAIN: (0, stop - valid - test),
        ModelMode.VALID: (stop - valid - test, stop - test),
        ModelMode.TEST: (stop - test, stop),
    }
    return data, *cuts[mode]


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
        raise FileNotFoundError(
            f"data_dir (an experiment's io.dataset_dir): no file or folder {str(root)!r}"
        )
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
