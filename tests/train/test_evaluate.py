"""Bits per byte of files: the sum is that of the model's loss, in windows of bounded memory."""

import io
import math
import os
import sys
import threading
from pathlib import Path

import pytest
import torch

from mblm import MBLM
from mblm.model.tiled_pass import INFERENCE_TILE
from mblm.train.evaluate import Score, evaluate
from tests.models import mamba, model, transformer
from tests.ops.largest_tensor import LargestTensor

PADDING = 256


def bytes_model(**fields: object) -> MBLM:
    defaults: dict[str, object] = {"seq_lens": [8, 4], "num_tokens": 257, "pad_token_id": PADDING}
    return model(transformer(), **{**defaults, **fields}).eval()


def write(path: Path, count: int, seed: int = 0) -> Path:
    generator = torch.Generator().manual_seed(seed)
    path.write_bytes(bytes(torch.randint(0, 256, (count,), generator=generator).tolist()))
    return path


@pytest.mark.parametrize("count", [1, 31, 32, 33, 64, 100, 165])
@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_a_file_is_scored_window_by_window(tmp_path: Path, count: int, batch_size: int) -> None:
    net = bytes_model()
    file = write(tmp_path / "f", count)
    ids = torch.tensor(list(file.read_bytes()))
    done: list[int] = []
    (score,) = evaluate(net, [file], batch_size=batch_size, on_progress=done.append)
    with torch.inference_mode():
        nats = sum(net(window[None]).item() * len(window) for window in ids.split(32))
    assert score.num_bytes == sum(done) == count
    assert score.nats == pytest.approx(nats, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nats / count / math.log(2), rel=1e-5)


def test_files_are_scored_one_by_one(tmp_path: Path) -> None:
    net = bytes_model()
    files = [write(tmp_path / str(n), 20 * n, seed=n) for n in range(3)]
    together = evaluate(net, files)
    assert together == [evaluate(net, [file])[0] for file in files]
    assert together[0] == Score(0, 0.0) and together[0].bits_per_byte is None


def test_an_untrained_model_needs_its_whole_vocabulary(tmp_path: Path) -> None:
    net = bytes_model()
    torch.nn.init.zeros_(net.to_logits.weight)
    torch.nn.init.zeros_(net.to_logits.bias)
    (score,) = evaluate(net, [write(tmp_path / "f", 100)])
    assert score.bits_per_byte == pytest.approx(math.log2(257))


def test_bytes_equal_to_the_padding_do_not_count(tmp_path: Path) -> None:
    net = bytes_model(num_tokens=256, pad_token_id=0)
    (tmp_path / "f").write_bytes(b"ab\0cd\0\0")
    (score,) = evaluate(net, [tmp_path / "f"])
    ids = torch.tensor([list(b"ab\0cd\0\0")])
    assert score.num_bytes == 4
    assert score.nats == pytest.approx(4 * net(ids).item(), rel=1e-5)


def test_windows_may_be_longer_than_the_context_where_positions_allow(tmp_path: Path) -> None:
    free = model(mamba(), transformer(), seq_lens=[8, 4], num_tokens=257, pad_token_id=PADDING)
    file = write(tmp_path / "f", 200)
    (score,) = evaluate(free.eval(), [file], length=100)
    with torch.inference_mode():
        nats = [
            100 * free(torch.tensor([list(part)])).item()
            for part in (file.read_bytes()[:100], file.read_bytes()[100:])
        ]
    assert score.nats == pytest.approx(sum(nats), rel=1e-5)
    with pytest.raises(ValueError, match="length: 33 exceeds the model's context of 32"):
        evaluate(bytes_model(), [file], length=33)


@pytest.mark.parametrize("arguments", [{"length": 0}, {"batch_size": 0}, {"length": -1}])
def test_refuses_sizes_below_one(tmp_path: Path, arguments: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        evaluate(bytes_model(), [write(tmp_path / "f", 5)], **arguments)


def test_refuses_missing_files_before_any_is_scored(tmp_path: Path) -> None:
    done: list[int] = []
    files = [write(tmp_path / "f", 50), tmp_path / "absent"]
    with pytest.raises(FileNotFoundError):
        evaluate(bytes_model(), files, on_progress=done.append)
    assert not done
    with pytest.raises(ValueError, match="at least one file"):
        evaluate(bytes_model(), [])


def test_refuses_bytes_outside_the_vocabulary(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"a\xff")
    net = bytes_model(num_tokens=128, pad_token_id=127)
    with pytest.raises(ValueError, match="token id 255 at position"):
        evaluate(net, [tmp_path / "f"])


def test_a_file_larger_than_memory_is_not_read_as_a_whole(tmp_path: Path) -> None:
    with (tmp_path / "f").open("wb") as file:
        file.truncate(2**40)

    def stop(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluate(bytes_model(), [tmp_path / "f"], on_progress=stop)


def test_a_long_window_is_looked_at_in_tiles(tmp_path: Path) -> None:
    net = model(mamba(), transformer(pos_emb_type=None), seq_lens=[64, 64], num_tokens=257).eval()
    length = 5 * INFERENCE_TILE
    file = write(tmp_path / "f", length)
    with LargestTensor() as largest:
        (score,) = evaluate(net, [file], length=length)
    assert largest.entries < length * 257 / 4, "no logits of a whole window"
    with torch.inference_mode():
        ids = torch.tensor([list(file.read_bytes())])
        whole = net._attend(net._tokens_of_ids(ids))
        logits = net.to_logits(whole)[:, 1:].flatten(0, 1)[: length - 1]
        nats = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
    assert score.nats == pytest.approx(float(nats), rel=1e-3)


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
    scores = evaluate(net, [pipe, file], batch_size=2)
    thread.join()
    assert scores[0] == scores[1] and scores[0].num_bytes == 100


def test_standard_input_is_a_dash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "f", 50)
    with file.open("rb") as stream:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(stream))
        scores = evaluate(bytes_model(), [Path("-"), Path("-"), file])
        assert not stream.closed
    assert scores == [scores[2], Score(), scores[2]]


def test_a_closed_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(OSError, match="standard input is closed"):
        evaluate(bytes_model(), [Path("-")])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_files_of_which_the_system_tells_no_size() -> None:
    version = Path("/proc/version")
    assert version.stat().st_size == 0
    (score,) = evaluate(bytes_model(), [version])
    assert score.num_bytes == len(version.read_bytes())


def test_a_file_that_is_cut_short_is_scored_as_far_as_it_goes(tmp_path: Path) -> None:
    file = write(tmp_path / "f", 3 * 2**18)  # more than is read ahead
    cut = 2**18 // 32 * 32

    def shorten(_: int) -> None:
        os.truncate(file, cut)

    net = bytes_model(seq_lens=[64, 64])
    (score,) = evaluate(net, [file], length=4096, batch_size=16, on_progress=shorten)
    assert score.num_bytes == cut


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        evaluate(bytes_model(), [tmp_path])
