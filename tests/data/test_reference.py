"""A program written for the reference release runs here unchanged, and gets the same data."""

import os
import sys
import textwrap
from pathlib import Path
from typing import Any

import torch

from tests.reference import needs_reference, run_program

pytestmark = needs_reference
ROOT = Path(__file__).parents[2]

BEGIN = """
    import random, sys
    from types import SimpleNamespace as Config

    import numpy as np
    import torch

    folder, answers = sys.argv[1], {}
    torch.manual_seed(3)
    random.seed(3)
"""
END = """
    torch.save(answers, sys.argv[2])
"""

BOOKS = """
    import os

    listdir = os.listdir  # the reference takes the file system's order, this package that of names
    os.listdir = lambda *arguments: sorted(listdir(*arguments))

    from mblm.data.dataset.pg19 import PG19
    from mblm.data.dataset.pg19_masked import PG19Masked
    from mblm.data.types import ModelMode

    config = Config(
        io=Config(dataset_dir=folder),
        train=Config(masking_proba=0.3),
        params=Config(
            input_seq_len=100, mask_token_id=257, mblm_config=Config(pad_token_id=256)
        ),
    )
    for mode in ModelMode:
        for worker in range(2):
            for kind in PG19, PG19Masked:
                data = kind.from_train_entry_config(config, mode, worker, 2)
                key = f"{kind.__name__} {mode.value} {worker}"
                for offset in 0, 17:
                    data.offset_to(offset)
                    answers[f"{key} {offset}"] = [data[i] for i in range(len(data))]
                answers[f"{key} names"] = [file.name for file in data.txt_files]
                answers[f"{key} data"] = [len(data.data), data.data.numel(), data.data[3:50]]
                sequences = data.iter_sequences_rand()
                answers[f"{key} random"] = [next(sequences) for _ in range(5)]
                answers[f"{key} shuffled"] = list(data.iter_books(shuffle=True))
                answers[f"{key} book"] = data.book("one.txt")
                answers[f"{key} test"] = data.supports_test_mode()
    alone = PG19Masked(folder, ModelMode.TEST, seq_len=100, worker_id=0, num_workers=1)
    answers["cut off"] = alone.get_sample(len(alone.data) - 30)
    whole = PG19(folder, ModelMode.TEST, 5, False, seq_len=9, worker_id=0, num_workers=1)
    answers["cut off, not masked"] = whole.get_sample(len(whole.data) - 3)
"""

CLEVR = """
    from mblm.data.dataset.clevr import Clevr, ClevrOptionalArgs
    from mblm.data.types import ModelMode

    special = {"eom_token_id": 257, "som_text_token_id": 258, "som_image_token_id": 259}
    small = {"resize_to_h": 20, "resize_to_w": 30}
    cases = {
        "pixels": small,
        "special": {**small, **special},
        "cropped": {**small, "crop_h_perc": 0.1, "crop_w_perc": 0.2},
        "half a crop": {**small, "crop_h_perc": 0.1},
        "binned": {**small, "downsample_channels": 5},
        "shifted": {**small, "downsample_channels": 5, "shift_channels_start": 100},
        "shifted to 0": {**small, "downsample_channels": 5, "shift_channels_start": 0},
        "jpeg": {**special, "enable_jpeg_stream_with_quality": 20},
        "jpeg YCbCr": {
            "enable_jpeg_stream_with_quality": 50, "jpeg_in_rgb_color_space": False, **small
        },
        "jpeg shifted": {
            **small, "downsample_channels": 9, "shift_channels_start": 3,
            "enable_jpeg_stream_with_quality": 95,
        },
        "jpeg 0": {**small, "enable_jpeg_stream_with_quality": 0},
        "categorical": {**small, **special, "answer_categorical": True},
        "fractions": {**small, "qiqa_loss_mask": [0.5, 1.5, 0, 2]},
    }
    for name, arguments in cases.items():
        arguments = {"target_mode": "a", "qiqa_loss_mask": [1, 2, 0, 3], **arguments}
        config = Config(
            io=Config(dataset_dir=folder, dataset_args=arguments),
            params=Config(input_seq_len=30_000, pad_token_id=256),
        )
        data = Clevr.from_train_entry_config(config, ModelMode.VALID, 0, 1)
        answers[name] = [data[0], data.get_sample_with_parts(0)]
    answers["length"] = [len(data), data.supports_test_mode(), data.offset_one().sample_offset]
    answers["images"] = list(data.iter_images(shuffle=True, max_items=4))
    answers["raw"] = list(data.iter(shuffle=True, max_items=2, raw=True)) + [data.get_sample_raw(0)]
    answers["parts"] = [(i, q, a, im.to_tensor()) for i, (q, a, im) in data.iter()]
    answers["constants"] = {
        name: getattr(Clevr, name) for name in dir(Clevr) if name.isupper()
    }
    answers["fields"] = sorted(ClevrOptionalArgs.model_fields)
"""

UTILS = """
    from mblm.data.utils import (
        Bytes, ColorSpace, FileStream, ImagePipeline, Tokenizer, TokenizerOptions,
        shift_remap_tensor, target_loss_mask,
    )

    colors = torch.randint(0, 256, (3, 25, 31), dtype=torch.uint8)
    for space, image in (ColorSpace.RGB, colors), (ColorSpace.GRAY, colors[0].contiguous()):
        def start(image=image, space=space):
            return ImagePipeline(image, space)

        answers[f"{space} same"] = start().to_tensor()
        answers[f"{space} array"] = torch.from_numpy(start().to_numpy())
        answers[f"{space} image"] = torch.from_numpy(np.array(start().to_image()))
        answers[f"{space} resized"] = start().resize((9, 50)).to_tensor()
        answers[f"{space} cropped"] = start().crop((0.13, 0.31)).to_tensor()
        for bins in 1, 2, 3, 7, 64, 200, 254, 255, 300:
            for mode in "lower", "upper", "mean":
                answers[f"{space} {bins} {mode}"] = (
                    start().downsample_channels(bins, mode).to_tensor()
                )
        for keep_rgb in False, True:
            stream = start().to_jpeg_buffer(40, keep_rgb)
            answers[f"{space} jpeg {keep_rgb}"] = [
                stream.to_tensor().clone(), stream.to_buffer(),
                torch.from_numpy(stream.to_numpy().copy()), stream.to_image().size,
            ]
    array = ImagePipeline(colors.permute(1, 2, 0).numpy(), ColorSpace.GRAY)
    answers["gray of colors"] = array.grayscale().to_tensor()
    answers["Bytes"] = [
        Bytes.str_to_tensor("añb"), Bytes.str_to_tensor("ab", "utf-16"),
        Bytes.tensor_to_str(torch.tensor([97, 98])), Bytes.str_to_bytearray("é"),
        Bytes.str_to_bytes("é", "latin1"), Bytes.bytes_to_str(b"ab"),
        Bytes.byte_list_to_str([97]), Bytes.byte_list_to_str_safe([255], "?"),
        Bytes.byte_list_to_str_safe([256], "?"), Bytes.bytes_to_tensor(b"xyz"),
        Bytes.bytes_to_tensor(bytearray(b"xyz")),
        torch.from_numpy(np.array(Bytes.tensor_to_image(colors))),
    ]
    answers["mask"] = target_loss_mask(
        (torch.zeros(size, dtype=torch.long), weight) for size, weight in [(2, 0.5), (0, 1), (3, 2)]
    )
    answers["shift"] = shift_remap_tensor(torch.randint(0, 50, (4, 5), dtype=torch.uint8), 11)
    for ids in [256, 257, 258, 259], [0, None, None, None]:
        tokenize = Tokenizer(TokenizerOptions(*ids)).pipeline
        for values in torch.arange(5, dtype=torch.uint8), torch.arange(0):
            answers[f"tokens {ids} {len(values)}"] = [
                tokenize(values).with_eom().tensor,
                tokenize(values).with_som_text().with_eom().to_long_tensor(),
                tokenize(values).with_som_image().pad_right_to(9).tensor,
                tokenize(values).with_eom().pad_right_to(3, strict=False).to_long_tensor(),
            ]
"""


def assert_equal(here: Any, there: Any, name: str) -> None:
    assert type(here) is type(there), name
    if isinstance(here, torch.Tensor):
        assert here.dtype == there.dtype, name
        assert torch.equal(here, there), name
    elif isinstance(here, dict):
        assert list(here) == list(there), name
        for key, value in here.items():
            assert_equal(value, there[key], f"{name} / {key}")
    elif isinstance(here, (list, tuple)):
        assert len(here) == len(there), name
        for index, value in enumerate(here):
            assert_equal(value, there[index], f"{name} / {index}")
    else:
        assert here == there, name


def compare(program: str, folder: Path, out: Path) -> None:
    code = "".join(textwrap.dedent(part) for part in (BEGIN, program, END))
    run_program(code, folder, out / "there.pt", folder=out)
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    run_program(code, folder, out / "here.pt", folder=out, python=sys.executable, path=path)
    here, there = torch.load(out / "here.pt"), torch.load(out / "there.pt")
    assert len(here) > 0
    assert_equal(here, there, "answers")


def test_pg19_gives_the_same_samples(tmp_path: Path) -> None:
    for part in ("train", "validation", "test"):
        folder = tmp_path / "pg19" / part
        folder.mkdir(parents=True)
        for name in ("one.txt", "two.txt", "three.txt"):
            (folder / name).write_bytes(f"{part} {name} é\r\n".encode() * (60 + len(name)))
        (folder / "empty.txt").touch()
    compare(BOOKS, tmp_path / "pg19", tmp_path)


def test_clevr_gives_the_same_samples(shared: Path, tmp_path: Path) -> None:
    compare(CLEVR, shared / "corpus" / "clevr", tmp_path)


def test_images_bytes_and_tokens_are_the_same(tmp_path: Path) -> None:
    compare(UTILS, tmp_path, tmp_path)
