"""PG19: books from Project Gutenberg, as one row of bytes."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from typing_extensions import Self, Unpack

from mblm.data.datasets import DistributedDataset, DistributedDatasetConfig
from mblm.data.file_bytes import FileBytes
from mblm.data.types import BatchWithLossMask, ModelMode

_T = TypeVar("_T")


class PG19Books(DistributedDataset[_T]):
    """The books of one part of PG19; subclasses say what a sample is.

    ``data_dir`` has the dataset's own folders ``train``, ``validation`` and ``test``, of text files
    (https://github.com/google-deepmind/pg19). Books follow one another in the order of their
    names, so that every machine of a run has the same row; the published package takes them as
    the file system lists them. Hidden files are no books. A sample is read when it is asked for.

    Args:
        data_dir: The dataset's folder.
        mode: Which part.
        config: ``seq_len, worker_id, num_workers`` of ``DistributedDataset``.

    Attributes:
        txt_files: The books.
        data: Their bytes, which read like a uint8 tensor.

    Raises:
        FileNotFoundError: No folder of that part.
        ValueError: No books, or too few bytes for the workers.
    """

    def __init__(
        self, data_dir: str | Path, mode: ModelMode, **config: Unpack[DistributedDatasetConfig]
    ) -> None:
        mode = ModelMode(mode)
        part = "validation" if mode is ModelMode.VALID else mode.value
        folder = Path(os.path.expanduser(data_dir)) / part
        if not folder.is_dir():
            raise FileNotFoundError(f"data_dir: no folder {str(folder)!r}")
        names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
        self.txt_files = [folder / name for name in names]
        if not self.txt_files:
            raise ValueError(f"data_dir: no books in {str(folder)!r}")
        self.data = FileBytes(self.txt_files)
        super().__init__(data_size=len(self.data), is_sequential=True, **config)

    @classmethod
    def from_train_entry_config(
        cls, config: Any, mode: ModelMode, worker_id: int, num_workers: int
    ) -> Self:
        """The part of the dataset that a `TrainEntryConfig` names."""
        return cls(
            config.io.dataset_dir,
            mode,
            seq_len=config.params.input_seq_len,
            worker_id=worker_id,
            num_workers=num_workers,
            **cls._configured(config),
        )

    @staticmethod
    def _configured(config: Any) -> dict[str, Any]:
        """What else a training configuration says of samples."""
        return {}

    @staticmethod
    def supports_test_mode() -> bool:
        """Whether there is a test part: yes."""
        return True

    def lineage(self) -> list[tuple[str, int]]:
        """The books by their names, and their sizes."""
        names = [file.name for file in self.data.files]
        return list(zip(names, self.data.sizes, strict=True))

    def book(self, name: str) -> str:
        """The text of the book with this file name, such as ``44381.txt``.

        Raises:
            ValueError: No such book in this part.
        """
        for file in self.txt_files:
            if file.name == name:
                return file.read_text(encoding="utf8")
        raise ValueError(f"name: no book {name!r} among {len(self.txt_files)}")

    def iter_sequences_rand(self) -> Iterator[torch.Tensor]:
        """Endless uint8 sequences ``(seq_len,)`` from anywhere, drawn by ``random``."""
        last = max(len(self.data) - self.seq_len - 1, 0)
        while True:
            start = random.randint(0, last)
            yield self.data[start : start + self.seq_len]

    def iter_books(self, shuffle: bool = False) -> Iterator[tuple[str, str]]:
        """Every book's file name and text, in an order drawn by ``random`` if ``shuffle``."""
        files = list(self.txt_files)
        if shuffle:
            random.shuffle(files)
        for file in files:
            yield file.name, file.read_text(encoding="utf8")


class PG19(PG19Books[BatchWithLossMask]):
    """PG19 for a decoder: a sample is ``(ids, loss_mask)``, int64 and float16, ``(seq_len,)``.

    ``load_mininterval`` and ``display_load_progress`` are accepted as in the published package;
    there is nothing to load and so no progress to show. Otherwise as ``PG19Books``.
    """

    def __init__(
        self,
        data_dir: str | Path,
        mode: ModelMode,
        load_mininterval: int = 30,
        display_load_progress: bool = True,
        **config: Unpack[DistributedDatasetConfig],
    ) -> None:
        super().__init__(data_dir, mode, **config)

    def get_sample(self, from_idx: int) -> BatchWithLossMask:
        """The ids from byte ``from_idx`` on, and their loss mask."""
        ids = self.data.read(from_idx, from_idx + self.seq_len)
        return ids, torch.ones_like(ids, dtype=torch.float16)
