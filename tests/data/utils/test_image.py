"""Images from files, arrays and tensors, changed and turned into bytes."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError

from mblm.data.utils import ColorSpace, ImagePipeline

RGB, GRAY = ColorSpace
BYTES = torch.zeros(7, 4, 4, dtype=torch.uint8)


@pytest.fixture
def colors() -> torch.Tensor:
    """A random image of 5 x 7 pixels: (3, 5, 7)."""
    return torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8)


def test_every_way_in_is_the_same_image(colors: torch.Tensor, tmp_path: Path) -> None:
    array = colors.permute(1, 2, 0).numpy()
    file = tmp_path / "image.png"
    Image.fromarray(array).save(file)
    for image in (colors, array, Image.fromarray(array), file, str(file)):
        pipeline = ImagePipeline(image, RGB)
        assert torch.equal(pipeline.to_tensor(), colors)
        assert np.array_equal(pipeline.to_numpy(), array)
        assert pipeline.to_image().size == (7, 5)


def test_gray_images_have_two_dimensions(colors: torch.Tensor) -> None:
    assert torch.equal(ImagePipeline(colors[0], GRAY).to_tensor(), colors[0])
    gray = ImagePipeline(colors, RGB).grayscale()
    assert gray.to_tensor().shape == (5, 7)
    assert torch.equal(gray.grayscale().to_tensor(), gray.to_tensor())


def test_resizing_takes_width_and_height(colors: torch.Tensor) -> None:
    assert ImagePipeline(colors, RGB).resize((9, 2)).to_tensor().shape == (3, 2, 9)


def test_cropping_takes_shares_of_height_and_width(colors: torch.Tensor) -> None:
    cropped = ImagePipeline(colors, RGB).crop((0.2, 0.3)).to_tensor()
    assert torch.equal(cropped, colors[:, 1:4, 2:5])
    assert torch.equal(ImagePipeline(colors, RGB).crop((0, 0)).to_tensor(), colors)


@pytest.mark.parametrize(
    ("mode", "values"), [("lower", [0, 127]), ("mean", [63, 191]), ("upper", [127, 255])]
)
def test_two_bins(mode: Any, values: list[int]) -> None:
    image = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    reduced = ImagePipeline(image, GRAY).downsample_channels(2, mode).to_tensor().flatten()
    assert reduced.tolist() == [values[0]] * 128 + [values[1]] * 128


@settings(deadline=None, max_examples=30)
@given(bins=st.integers(1, 400), mode=st.sampled_from(["lower", "mean", "upper"]))
def test_bins_are_few_in_order_and_near(bins: int, mode: Any) -> None:
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 256)
    reduced = ImagePipeline(values, GRAY).downsample_channels(bins, mode).to_tensor().int()
    assert len(reduced.unique()) == (bins if bins < 255 else 256)
    assert (reduced.diff() >= 0).all()
    assert (reduced - values.int()).abs().max() <= 255 / bins + 1


def test_reducing_works_on_colors_and_copies(colors: torch.Tensor) -> None:
    before = colors.clone()
    reduced = ImagePipeline(colors, RGB).downsample_channels(1).to_tensor()
    assert reduced.shape == colors.shape
    assert reduced.unique().tolist() == [127]
    assert torch.equal(colors, before)


def test_jpeg_quality_is_size(colors: torch.Tensor) -> None:
    sizes = []
    for quality in (0, 50, 95):
        stream = ImagePipeline(colors, RGB).resize((64, 64)).to_jpeg_buffer(quality)
        assert stream.to_image().size == (64, 64)
        sizes.append(len(stream.to_buffer()))
    assert sizes == sorted(set(sizes))


def test_jpeg_of_smooth_images_is_close() -> None:
    ramp = torch.arange(0, 256, 4, dtype=torch.uint8).expand(3, 64, 64)
    stream = ImagePipeline(ramp, RGB).to_jpeg_buffer(95, keep_rgb=True)
    again = ImagePipeline(stream.to_image(), RGB).to_tensor()
    assert (again.int() - ramp.int()).abs().max() <= 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda image: image.crop((-0.1, 0)), "factor_perc_h_w: .* 4 x 4 pixels"),
        (lambda image: image.crop((0, -0.1)), "factor_perc_h_w"),
        (lambda image: image.crop((0.5, 0)), "factor_perc_h_w"),
        (lambda image: image.crop((0, 0.9)), "factor_perc_h_w"),
        (lambda image: image.downsample_channels(0), "max_num_channel_values: .* least 1, got 0"),
        (lambda image: image.downsample_channels(3, "median"), "bin_mode: .* got 'median'"),
        (lambda image: image.to_jpeg_buffer(-1), "quality: expected 0 to 95, got -1"),
        (lambda image: image.to_jpeg_buffer(96), "quality: expected 0 to 95, got 96"),
        (lambda _: ImagePipeline(torch.zeros(3, 4, 4), RGB), "image: .* uint8, got float32"),
        (lambda _: ImagePipeline(np.zeros((4, 4, 3)), RGB), "image: .* uint8, got float64"),
        (lambda _: ImagePipeline(BYTES[0], RGB), r"image: .* \(C, H, W\), got \(4, 4\)"),
        (lambda _: ImagePipeline(BYTES.numpy().T, RGB), r"image: no image .* shape \(4, 4, 7\)"),
        (lambda _: ImagePipeline(BYTES[0, 0].numpy(), RGB), r"image: no image .* shape \(4,\)"),
    ],
)
def test_what_cannot_be_done_is_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        change(ImagePipeline(BYTES[:3], RGB))


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"image: expected a path, .* got BytesIO"):
        ImagePipeline(BytesIO(), RGB)  # type: ignore[arg-type]


def test_files_that_cannot_be_read_are_the_errors_of_the_system_and_of_pillow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing\.png"):
        ImagePipeline(tmp_path / "nothing.png", RGB)
    with pytest.raises(IsADirectoryError):
        ImagePipeline(tmp_path, RGB)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(UnidentifiedImageError, match=r"image: '.*text\.png' cannot be read"):
        ImagePipeline(tmp_path / "text.png", RGB)
    Image.new("RGB", (20, 20)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(OSError, match=r"image: '.*large\.png' cannot be read: .*exceeds limit"):
        ImagePipeline(tmp_path / "large.png", RGB)

    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", denied)
    with pytest.raises(PermissionError, match=r"large\.png"):
        ImagePipeline(tmp_path / "large.png", RGB)


@settings(deadline=None, max_examples=40)
@given(cut=st.integers(0, 400), flipped=st.integers(0, 400), kind=st.sampled_from(["PNG", "JPEG"]))
def test_damaged_files_are_an_image_or_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flipped: int, kind: str
) -> None:
    file = tmp_path_factory.mktemp("images") / "damaged"
    buffer = BytesIO()
    Image.effect_noise((16, 16), 50).save(buffer, kind)
    content = bytearray(buffer.getvalue())
    content[flipped % len(content)] ^= 0x5A
    file.write_bytes(content[: max(len(content) - cut, 0)])
    try:
        assert ImagePipeline(file, GRAY).to_tensor().ndim == 2
    except OSError as error:
        assert "damaged' cannot be read" in str(error)
