"""CLEVR: questions about images, as the bytes of question, image, question and answer."""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from typing_extensions import Unpack

from mblm.data.datasets import DistributedDataset, DistributedDatasetConfig
from mblm.data.types import BatchWithLossMask, ModelMode
from mblm.data.utils import (
    Bytes,
    ColorSpace,
    ImagePipeline,
    Tokenizer,
    TokenizerOptions,
    shift_remap_tensor,
    target_loss_mask,
)
from mblm.utils.fields import Fields

_PARTS = {ModelMode.TRAIN: "train", ModelMode.VALID: "val", ModelMode.TEST: "test"}
_ANSWERS = """
    0 1 2 3 4 5 6 7 8 9 10 blue brown cube cyan cylinder gray green large metal no purple
    red rubber small sphere yellow yes
"""


class ClevrOptionalArgs(Fields):
    """How a sample is made: ``io.dataset_args`` of a training configuration.

    A number that is 0 counts as not given, as in the published package.
    """

    target_mode: Literal["qiqa", "a"] = Field(description="What is learned; for the record")
    qiqa_loss_mask: tuple[float, float, float, float] = Field(
        description="Weights of question, image, question and answer; fractions are cut off"
    )
    answer_categorical: bool = Field(
        default=False, description="Whether an answer is one letter of `ANSWER_CLASS_MAP`"
    )
    resize_to_h: int | None = Field(default=None, description="Height in pixels, with the width")
    resize_to_w: int | None = Field(default=None, description="Width in pixels, with the height")
    crop_h_perc: float | None = Field(
        default=None, description="Share cut off above and below each, with the width's"
    )
    crop_w_perc: float | None = Field(
        default=None, description="Share cut off left and right each, with the height's"
    )
    downsample_channels: int | None = Field(
        default=None, description="How many values a color channel has"
    )
    shift_channels_start: int | None = Field(
        default=None, description="Renumber the downsampled values from here on"
    )
    eom_token_id: int | None = Field(default=None, description="Ends a question, image or answer")
    som_text_token_id: int | None = Field(default=None, description="Starts a question or answer")
    som_image_token_id: int | None = Field(default=None, description="Starts an image")
    enable_jpeg_stream_with_quality: int | None = Field(
        default=None, ge=0, le=95, description="Make the image a JPEG file of this quality"
    )
    jpeg_in_rgb_color_space: bool = Field(
        default=True, description="Whether the JPEG file stores RGB rather than YCbCr"
    )


class Clevr(DistributedDataset[BatchWithLossMask]):
    """CLEVR for a decoder: a sample is ``(ids, loss_mask)``, int64, ``(seq_len,)`` each.

    The ids are question, image, question and answer, each between its special tokens, padded at
    the end; the image is its red, green and blue planes row by row, or a JPEG file. ``data_dir``
    has the dataset's own folders ``images`` and ``questions``
    (https://cs.stanford.edu/people/jcjohns/clevr/). Images are read when a sample is.

    Args:
        data_dir: The dataset's folder.
        mode: Which part; the test part has no answers and so no samples.
        pad_token_id: Fills up the ids, and the loss mask with them.
        optional_args: How a sample is made.
        config: ``seq_len, worker_id, num_workers`` of ``DistributedDataset``.

    Attributes:
        entries: The questions.
        images_root: The folder of their images.

    Raises:
        FileNotFoundError: No file of questions.
        OSError: A sample's image is missing or cannot be read.
        ValueError: A file of questions that holds none, fewer questions than workers, a sample
            that is longer than ``seq_len``.
    """

    ANSWER_CLASS_MAP: ClassVar[dict[str, str]] = dict(
        zip(_ANSWERS.split(), "0123456789ABCDEFGHIJKLMNOPQR", strict=True)
    )
    """The letter that stands for each answer."""

    QUESTION_TYPES: ClassVar[dict[str, str]] = {
        "exist": "exists",
        "count": "count",
        **dict.fromkeys(["equal_integer", "less_than", "greater_than"], "compare_integer"),
        **dict.fromkeys(
            ["query_color", "query_material", "query_size", "query_shape"], "query_attribute"
        ),
        **dict.fromkeys(
            ["equal_size", "equal_material", "equal_shape", "equal_color"], "compare_attribute"
        ),
    }
    """The type of question by the last function of its program."""

    IMAGE_SHAPE_C_W_H = (3, 480, 320)
    MAX_QUESTION_LEN_BYTES = 205
    MAX_ANSWER_LEN_BYTESN = 8
    NUM_ITEMS_TRAIN = 699_989
    NUM_ITEMS_VALID = 149_991

    image_color_space = ColorSpace.RGB

    def __init__(
        self,
        data_dir: str | Path,
        mode: ModelMode,
        pad_token_id: int,
        optional_args: ClevrOptionalArgs,
        **config: Unpack[DistributedDatasetConfig],
    ) -> None:
        self.mode = mode = ModelMode(mode)
        self.args = optional_args
        if any(weight % 1 for weight in optional_args.qiqa_loss_mask):
            warnings.warn(
                f"qiqa_loss_mask: {optional_args.qiqa_loss_mask} lose their fractions, as in the "
                "published package; use whole numbers",
                stacklevel=2,
            )
        self.tokenize = Tokenizer(
            TokenizerOptions(
                pad_token_id=pad_token_id,
                eom_token_id=optional_args.eom_token_id,
                som_text_token_id=optional_args.som_text_token_id,
                som_image_token_id=optional_args.som_image_token_id,
            )
        ).pipeline
        part, data_dir = _PARTS[mode], Path(os.path.expanduser(data_dir))
        self.images_root = data_dir / "images" / part
        self._questions = data_dir / "questions" / f"CLEVR_{part}_questions.json"
        self.entries = _read_questions(self._questions)
        super().__init__(data_size=len(self.entries), is_sequential=False, **config)

    @staticmethod
    def from_train_entry_config(
        config: Any, mode: ModelMode, worker_id: int, num_workers: int
    ) -> Clevr:
        """The part of the dataset that a `TrainEntryConfig` names."""
        return Clevr(
            data_dir=config.io.dataset_dir,
            mode=mode,
            pad_token_id=config.params.pad_token_id,
            optional_args=ClevrOptionalArgs.model_validate(config.io.dataset_args or {}),
            seq_len=config.params.input_seq_len,
            worker_id=worker_id,
            num_workers=num_workers,
        )

    @staticmethod
    def supports_test_mode() -> bool:
        """Whether there is a test part with answers: no."""
        return False

    def lineage(self) -> list[tuple[str, int]]:
        """The file of the questions; the images are those that it names."""
        return [(self._questions.name, self._questions.stat().st_size)]

    def process_and_flatten_img(self, image: ImagePipeline) -> torch.Tensor:
        """Crop, resize and downsample an image as the arguments say; its bytes, uint8 ``(L,)``."""
        args = self.args
        if args.crop_h_perc and args.crop_w_perc:
            image.crop((args.crop_h_perc, args.crop_w_perc))
        if args.resize_to_w and args.resize_to_h:
            image.resize((args.resize_to_w, args.resize_to_h))
        if args.downsample_channels:
            image.downsample_channels(args.downsample_channels)
            if args.shift_channels_start:
                shifted, _, _ = shift_remap_tensor(image.to_tensor(), args.shift_channels_start)
                image = ImagePipeline(shifted, self.image_color_space)
        if quality := args.enable_jpeg_stream_with_quality:
            return image.to_jpeg_buffer(quality, args.jpeg_in_rgb_color_space).to_tensor()
        return image.to_tensor().flatten()

    def get_sample_raw(self, from_idx: int) -> dict[str, Any]:
        """The question ``from_idx`` of all, as the dataset's file holds it.

        Raises:
            ValueError: The test part has no answers.
        """
        if self.mode is ModelMode.TEST:
            raise ValueError("mode: the test part of CLEVR has no answers")
        return self.entries[from_idx]

    def iter_images(
        self, shuffle: bool = False, max_items: int | None = None
    ) -> Iterator[torch.Tensor]:
        """Every image once, unprocessed, uint8 ``(3, H, W)``.

        Args:
            shuffle: Whether in an order drawn by ``random``.
            max_items: At most so many.
        """
        names = os.listdir(self.images_root)
        if shuffle:
            random.shuffle(names)
        for name in names[:max_items]:
            yield self._image(name).to_tensor()

    def iter(
        self, shuffle: bool = False, max_items: int | None = None, raw: bool = False
    ) -> Iterator[tuple[int, Any]]:
        """Every question of this part, of all workers, with its number.

        Args:
            shuffle: Whether in an order drawn by ``random``.
            max_items: At most so many.
            raw: Yield what ``get_sample_raw`` gives, rather than question, answer and image.
        """
        order = list(range(len(self.entries)))
        if shuffle:
            random.shuffle(order)
        for index in order[:max_items]:
            entry = self.get_sample_raw(index)
            image = None if raw else self._image(entry["image_filename"])
            yield index, entry if raw else (entry["question"], entry["answer"], image)

    def get_sample_with_parts(
        self, from_idx: int
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]]:
        """A sample and what it is made of.

        Returns:
            Ids and loss mask, ``(seq_len,)``; and the ids of question, image and answer with their
            special tokens, and how many ids are padding.
        """
        entry = self.get_sample_raw(from_idx)
        answer_text = entry["answer"]
        if self.args.answer_categorical:
            if answer_text not in self.ANSWER_CLASS_MAP:
                raise ValueError(f"answer_categorical: {answer_text!r} is no category")
            answer_text = self.ANSWER_CLASS_MAP[answer_text]
        image_bytes = self.process_and_flatten_img(self._image(entry["image_filename"]))

        question = self._text(entry["question"])
        image = self.tokenize(image_bytes).with_som_image().with_eom().to_long_tensor()
        answer = self._text(answer_text)

        parts = [question, image, question, answer]
        length = sum(len(part) for part in parts)
        if length > self.seq_len:
            raise ValueError(
                f"seq_len: sample {from_idx} has {length} ids, which do not fit into {self.seq_len}"
            )
        mask = target_loss_mask(zip(parts, self.args.qiqa_loss_mask, strict=True))
        sizes = (question, image, answer, self.seq_len - length)
        return self._padded(torch.cat(parts)), self._padded(mask), sizes

    def get_sample(self, from_idx: int) -> BatchWithLossMask:
        """The ids of question ``from_idx`` and their loss mask."""
        ids, loss_mask, _ = self.get_sample_with_parts(from_idx)
        return ids, loss_mask

    def _image(self, name: str) -> ImagePipeline:
        return ImagePipeline(self.images_root / name, self.image_color_space)

    def _text(self, text: str) -> torch.Tensor:
        return self.tokenize(Bytes.str_to_tensor(text)).with_som_text().with_eom().to_long_tensor()

    def _padded(self, row: torch.Tensor) -> torch.Tensor:
        """Integers ``(seq_len,)``; also of the mask, where padded targets have no loss anyway."""
        return self.tokenize(row).pad_right_to(self.seq_len).to_long_tensor()


def _read_questions(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf8") as file:
            return json.load(file)["questions"]
    except FileNotFoundError:
        raise FileNotFoundError(f"data_dir: no file {str(path)!r}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data_dir: {str(path)!r} holds no CLEVR questions: {error!r}") from error
