"""CLEVR: question, image, question and answer in one row, with special tokens and a loss mask."""

import json
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mblm.data.dataset.clevr import Clevr, ClevrOptionalArgs
from mblm.data.types import ModelMode
from tests.data.entry import entry_config

EOM, TEXT, IMAGE, PAD = 257, 258, 259, 256
SPECIAL = {"eom_token_id": EOM, "som_text_token_id": TEXT, "som_image_token_id": IMAGE}
HEIGHT, WIDTH = 4, 6


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three questions about two images, the validation part."""
    (tmp_path / "questions").mkdir()
    (tmp_path / "images" / "val").mkdir(parents=True)
    generator = np.random.default_rng(0)
    for name in ("0.png", "1.png"):
        pixels = generator.integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / "val" / name)
    questions = [
        {"question": "Is it?", "answer": "yes", "image_filename": "0.png"},
        {"question": "How many?", "answer": "10", "image_filename": "1.png"},
        {"question": "What?", "answer": "sphere", "image_filename": "1.png"},
    ]
    write_questions(tmp_path, json.dumps({"info": {}, "questions": questions}))
    return tmp_path


def write_questions(folder: Path, text: str) -> None:
    (folder / "questions" / "CLEVR_val_questions.json").write_text(text)


def arguments(**changed: Any) -> ClevrOptionalArgs:
    return ClevrOptionalArgs.model_validate(
        {"target_mode": "a", "qiqa_loss_mask": (1, 2, 0, 3), **changed}
    )


def clevr(folder: Path, seq_len: int = 200, **changed: Any) -> Clevr:
    return Clevr(
        folder,
        ModelMode.VALID,
        pad_token_id=PAD,
        optional_args=arguments(**changed),
        seq_len=seq_len,
        worker_id=0,
        num_workers=1,
    )


def pixels_of(folder: Path, name: str) -> torch.Tensor:
    """The planes of an image, without its alpha channel: ``(3, H, W)``."""
    with Image.open(folder / "images" / "val" / name) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def test_a_sample_is_question_image_question_answer_and_padding(folder: Path) -> None:
    ids, mask = clevr(folder)[0]
    image = pixels_of(folder, "0.png").flatten().tolist()
    row = [*b"Is it?", *image, *b"Is it?", *b"yes"]
    assert ids.tolist() == row + [PAD] * (200 - len(row))
    weights = [1] * 6 + [2] * len(image) + [0] * 6 + [3] * 3
    assert mask[: len(row)].tolist() == weights
    assert (ids.dtype, mask.dtype, len(mask)) == (torch.int64, torch.int64, 200)


def test_special_tokens_stand_around_every_part(folder: Path) -> None:
    ids, mask, (question, image, answer, padding) = clevr(folder, **SPECIAL).get_sample_with_parts(
        1
    )
    assert question.tolist() == [TEXT, *b"How many?", EOM]
    assert image.tolist() == [IMAGE, *pixels_of(folder, "1.png").flatten().tolist(), EOM]
    assert answer.tolist() == [TEXT, *b"10", EOM]
    length = 2 * len(question) + len(image) + len(answer)
    assert padding == 200 - length
    assert torch.equal(ids[:length], torch.cat([question, image, question, answer]))
    assert mask[length - len(answer) : length].tolist() == [3] * len(answer), "special ones, too"


def test_answers_can_be_categories(folder: Path) -> None:
    data = clevr(folder, answer_categorical=True)
    answers = [data.get_sample_with_parts(index)[2][2].tolist() for index in range(3)]
    assert answers == [[*b"R"], [*b"A"], [*b"P"]]


def test_an_answer_without_a_category_is_refused(folder: Path) -> None:
    data = clevr(folder, answer_categorical=True)
    data.entries[0]["answer"] = "perhaps"
    with pytest.raises(ValueError, match="answer_categorical: 'perhaps' is no category"):
        data[0]


def test_the_categories_are_letters_in_order() -> None:
    names = list(Clevr.ANSWER_CLASS_MAP)
    assert len(names) == 28
    assert "".join(Clevr.ANSWER_CLASS_MAP.values()) == "0123456789ABCDEFGHIJKLMNOPQR"
    assert names[10:] == ["10", *sorted(names[11:])]


def test_images_are_cropped_resized_and_reduced(folder: Path) -> None:
    data = clevr(folder, crop_h_perc=0.25, crop_w_perc=0.17, resize_to_h=3, resize_to_w=5)
    assert len(data.get_sample_with_parts(0)[2][1]) == 3 * 3 * 5
    cropped = clevr(folder, crop_h_perc=0.25, crop_w_perc=0.17).get_sample_with_parts(0)[2][1]
    assert torch.equal(cropped, pixels_of(folder, "0.png")[:, 1:3, 1:5].flatten().long())
    reduced = clevr(folder, downsample_channels=2).get_sample_with_parts(0)[2][1]
    assert set(reduced.tolist()) == {63, 191}
    shifted = clevr(folder, downsample_channels=2, shift_channels_start=10)
    assert set(shifted.get_sample_with_parts(0)[2][1].tolist()) == {10, 11}


@pytest.mark.parametrize("rgb", [True, False])
def test_an_image_can_be_a_jpeg_file(folder: Path, rgb: bool) -> None:
    data = clevr(
        folder,
        9000,
        enable_jpeg_stream_with_quality=95,
        jpeg_in_rgb_color_space=rgb,
        resize_to_h=64,
        resize_to_w=64,
    )
    ids = data.get_sample_with_parts(0)[2][1]
    with Image.open(BytesIO(bytes(ids.tolist()))) as image:
        assert (image.format, image.size) == ("JPEG", (64, 64))
        assert [component[0] for component in image.layer] == ([82, 71, 66] if rgb else [1, 2, 3])


def test_workers_share_the_questions(folder: Path) -> None:
    args = {"target_mode": "qiqa", "qiqa_loss_mask": [1, 1, 1, 1]}
    config = entry_config(folder, args, input_seq_len=100, pad_token_id=PAD)
    data = [Clevr.from_train_entry_config(config, ModelMode.VALID, w, 3) for w in range(3)]
    assert [len(part) for part in data] == [1, 1, 1]
    assert [bytes(part[0][0][:5].tolist()) for part in data] == [b"Is it", b"How m", b"What?"]
    assert not Clevr.supports_test_mode()


def test_questions_and_images_can_be_walked_through(folder: Path) -> None:
    data = clevr(folder)
    assert list(data.iter(raw=True)) == list(enumerate(data.entries))
    assert sorted(number for number, _ in data.iter(shuffle=True, raw=True)) == [0, 1, 2]
    number, (question, answer, image) = list(data.iter(max_items=2))[1]
    assert (number, question, answer) == (1, "How many?", "10")
    assert torch.equal(image.to_tensor(), pixels_of(folder, "1.png"))
    assert [tuple(image.shape) for image in data.iter_images()] == [(3, HEIGHT, WIDTH)] * 2
    assert len(list(data.iter_images(shuffle=True, max_items=1))) == 1


def test_fractions_of_weights_are_warned_of(folder: Path) -> None:
    with pytest.warns(UserWarning, match=r"qiqa_loss_mask: .* lose their fractions"):
        data = clevr(folder, qiqa_loss_mask=(0.5, 1.5, 0, 1))
    assert data[0][1][:7].tolist() == [0] * 6 + [1]


def test_a_sample_that_is_too_long_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"seq_len: sample 1 has 92 ids, .* into 91"):
        clevr(folder, seq_len=91)[1]
    assert len(clevr(folder, seq_len=92)[1][0]) == 92


def test_missing_and_damaged_files_are_named(folder: Path) -> None:
    data = clevr(folder)
    image = folder / "images" / "val" / "0.png"
    image.write_bytes(image.read_bytes()[:-40])
    with pytest.raises(OSError, match=r"image: '.*0\.png' cannot be read"):
        data[0]
    image.unlink()
    with pytest.raises(FileNotFoundError, match=r"0\.png"):
        data[0]
    for text in ("{", "[]", "{}", '{"questions'):
        write_questions(folder, text)
        with pytest.raises(
            ValueError, match=r"CLEVR_val_questions\.json' holds no CLEVR questions"
        ):
            clevr(folder)
    with pytest.raises(FileNotFoundError, match=r"data_dir: no file '.*CLEVR_val_questions\.json'"):
        clevr(folder / "nothing")


def test_the_test_part_has_no_samples(folder: Path) -> None:
    path = folder / "questions" / "CLEVR_test_questions.json"
    path.write_text('{"questions": [{"question": "Is it?", "image_filename": "0.png"}]}')
    data = Clevr(folder, ModelMode.TEST, PAD, arguments(), seq_len=9, worker_id=0, num_workers=1)
    with pytest.raises(ValueError, match="mode: the test part of CLEVR has no answers"):
        data[0]


def test_its_lineage_is_the_file_of_questions(folder: Path) -> None:
    ((name, size),) = clevr(folder).lineage()
    assert (folder / "questions" / name).stat().st_size == size
