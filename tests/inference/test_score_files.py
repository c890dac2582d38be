"""Bits per byte of files: as of their bytes in memory, read in bounded memory."""

import math
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from mblm import MBLM
from mblm.inference.score_files import FileScore, score_files
from mblm.model.tiles import INFERENCE_TILE
from tests.models import mamba, model, transformer
from tests.ops.modes import LargestTensor

PADDING = 256


def bytes_model(**fields: object) -> MBLM:
    defaults: dict[str, object] = {"seq_lens": [8, 4], "num_tokens": 257, "pad_token_id": PADDING}
    return model(transformer(), **{**defaults, **fields}).eval()


def endless_model() -> MBLM:
    blocks = mamba(), transformer()
    return model(*blocks, seq_lens=[8, 4], num_tokens=257, pad_token_id=PADDING).eval()


def write(path: Path, count: int, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    path.write_bytes(bytes(torch.randint(0, 256, (count,), generator=generator).tolist()))
    return path


@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 100, 165])
@pytest.mark.parametrize("batch_bytes", [1, 64, 1 << 16])
@pytest.mark.parametrize("kind", ["transformer", "mamba"])
def test_a_file_is_scored_as_its_bytes_are(
    tmp_path: Path, count: int, batch_bytes: int, kind: str
) -> None:
    net = bytes_model() if kind == "transformer" else endless_model()
    file = write(tmp_path / "f", count)
    done: list[int] = []
    (of_file,) = score_files(net, [file], batch_bytes=batch_bytes, on_progress=done.append)
    assert of_file.num_bytes == sum(done) == count
    assert of_file.bits == pytest.approx(net.score(file.read_bytes()).bits, rel=1e-5)


def test_files_are_scored_one_by_one(tmp_path: Path) -> None:
    net = bytes_model()
    files = [write(tmp_path / str(n), 20 * n, seed=n) for n in range(3)]
    together = score_files(net, files)
    assert together == [score_files(net, [file])[0] for file in files]
    assert together[0] == FileScore(0, 0.0) and math.isnan(together[0].bits_per_byte)


def test_a_file_is_a_path_or_its_text_in_a_list(tmp_path: Path) -> None:
    net = bytes_model()
    file = write(tmp_path / "f", 20)
    assert score_files(net, [str(file)]) == score_files(net, [file])
    for one in (file, str(file)):
        with pytest.raises(TypeError, match="files: expected a list of files, got"):
            score_files(net, one)  # type: ignore[arg-type]


def test_bytes_equal_to_the_padding_do_not_count(tmp_path: Path) -> None:
    net = bytes_model(num_tokens=256, pad_token_id=0)
    data = b"ab\0cd\0\0"
    (tmp_path / "f").write_bytes(data)
    (of_file,) = score_files(net, [tmp_path / "f"])
    counted = net.score(data).log_probs[[byte != 0 for byte in data]]
    assert of_file.num_bytes == 4
    assert of_file.bits == pytest.approx(-float(counted.sum()) / math.log(2), rel=1e-5)


def test_a_length_and_a_stride_are_those_of_score(tmp_path: Path) -> None:
    file = write(tmp_path / "f", 200)
    for net in (bytes_model(), endless_model()):
        for sizes in ({"stride": 3}, {"length": 20}, {"length": 20, "stride": 20}):
            (of_file,) = score_files(net, [file], **sizes)
            alone = net.score(file.read_bytes(), **sizes)
            assert of_file.bits == pytest.approx(alone.bits, rel=1e-5)


def test_refuses_missing_files_before_any_is_scored(tmp_path: Path) -> None:
    done: list[int] = []
    files = [write(tmp_path / "f", 50), tmp_path / "absent"]
    with pytest.raises(FileNotFoundError):
        score_files(bytes_model(), files, on_progress=done.append)
    assert not done
    with pytest.raises(ValueError, match="at least one file"):
        score_files(bytes_model(), [])


def test_refuses_bytes_outside_the_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"a\xff")
    net = bytes_model(num_tokens=128, pad_token_id=127)
    with pytest.raises(ValueError, match="f: token id 255 at position"):
        score_files(net, [tmp_path / "f"])


def test_a_file_larger_than_memory_is_not_read_as_a_whole(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.truncate(2**40)

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_files(bytes_model(), [tmp_path / "f"], on_progress=stop)


def test_an_error_names_a_file_only_if_it_is_the_file_s(tmp_path: Path) -> None:
    def fail(_: int) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError) as caught:
        score_files(bytes_model(), [write(tmp_path / "f", 100)], on_progress=fail)
    assert caught.value.filename is None


@pytest.mark.parametrize("length", [None, 5 * INFERENCE_TILE], ids=["endless", "one window"])
def test_a_long_file_is_looked_at_in_tiles(tmp_path: Path, length: int | None) -> None:
    net = model(mamba(), transformer(pos_emb_type=None), seq_lens=[64, 64], num_tokens=257).eval()
    count = 5 * INFERENCE_TILE
    file = write(tmp_path / "f", count)
    with LargestTensor() as largest:
        (of_file,) = score_files(net, [file], length=length, batch_bytes=INFERENCE_TILE)
    assert largest.entries < count * 257 / 4, "no logits of a whole window"
    with torch.inference_mode():
        ids = torch.tensor([list(file.read_bytes())])
        whole = net._attend(net._tokens_of_ids(ids))
        logits = net.to_logits(whole)[:, 1:].flatten(0, 1)[: count - 1]
        nats = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    assert of_file.bits == pytest.approx(float(nats) / math.log(2), rel=1e-3)


def test_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    net = bytes_model()
    file = write(tmp_path / "f", 100)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    def fill() -> None:
        with pipe.open("wb", buffering=0) as writer:  # in pieces that fit no window
            for start in range(0, 100, 7):
                writer.write(file.read_bytes()[start : start + 7])

    thread = threading.Thread(target=fill)
    thread.start()
    scores = score_files(net, [pipe, file], batch_bytes=64)
    thread.join()
    assert scores[0] == scores[1] and scores[0].num_bytes == 100


def test_a_closed_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(OSError, match="standard input is closed"):
        score_files(bytes_model(), [Path("-")])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_files_of_which_the_system_tells_no_size() -> None:
    version = Path("/proc/version")
    assert version.stat().st_size == 0
    (of_file,) = score_files(bytes_model(), [version])
    assert of_file.num_bytes == len(version.read_bytes())


def test_a_file_that_is_cut_short_is_scored_as_far_as_it_goes(tmp_path: Path) -> None:
    file = write(tmp_path / "f", 3 * 2**18)  # more than is read ahead
    cut = 2**18

    def shorten(_: int) -> None:
        os.truncate(file, cut)

    net = bytes_model(seq_lens=[64, 64])
    (of_file,) = score_files(net, [file], length=4096, batch_bytes=2**16, on_progress=shorten)
    assert of_file.num_bytes == cut


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        score_files(bytes_model(), [tmp_path])
