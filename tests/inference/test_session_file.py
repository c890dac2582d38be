"""Session files: what is saved comes back equal; what is damaged, however, is refused."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from mblm import MBLM, Session
from mblm.inference import session_file
from tests.models import LSTMBlock, mamba, model, transformer

Content = tuple[dict[str, str], dict[str, torch.Tensor]]


@pytest.fixture
def m() -> MBLM:
    return model(mamba("mamba1"), transformer(), seq_lens=[6, 4])


@pytest.fixture
def file(m: MBLM, tmp_path: Path) -> Path:
    m.session().feed(torch.tensor([1, 2, 3, 4, 5])).save(tmp_path / "s")
    return tmp_path / "s"


def read(file: Path) -> Content:
    with safe_open(file, "pt") as opened:
        return opened.metadata(), load_file(file)


def write(file: Path, content: Content, *, signed: bool) -> None:
    """``signed``: as `Session.save` would have written it, so that no digest tells."""
    header, tensors = content
    if signed:
        header = {**header, "digest": session_file._digest(header, tensors)}
    save_file(tensors, file, header)


class TestRefuses:
    def test_a_file_that_does_not_exist(self, m: MBLM, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="none"):
            Session.load(tmp_path / "none", m)

    def test_a_folder(self, m: MBLM, tmp_path: Path) -> None:
        with pytest.raises(IsADirectoryError, match=str(tmp_path)):
            Session.load(tmp_path, m)

    def test_something_else(self, m: MBLM, file: Path) -> None:
        save_file({"x": torch.zeros(1)}, file)
        with pytest.raises(ValueError, match="not a saved session, format is none"):
            Session.load(file, m)
        file.write_text("text")
        with pytest.raises(ValueError, match="not a saved session"):
            Session.load(file, m)

    @pytest.mark.parametrize("name", ["mblm-session-3", "mblm-session-4", "mblm-session-6"])
    def test_another_release(self, m: MBLM, file: Path, name: str) -> None:
        header, tensors = read(file)
        write(file, ({**header, "format": name}, tensors), signed=True)
        with pytest.raises(ValueError, match=f"saved by another release, in format {name}"):
            Session.load(file, m)

    @pytest.mark.parametrize("signed", [False, True])
    @pytest.mark.parametrize("drop", ["rows", "weights", "model", "digest"])
    def test_that_lacks_an_entry(self, m: MBLM, file: Path, drop: str, signed: bool) -> None:
        header, tensors = read(file)
        del header[drop]
        if drop == "digest" and signed:
            return
        write(file, (header, tensors), signed=signed)
        with pytest.raises(ValueError, match=str(file)):
            Session.load(file, m)

    @pytest.mark.parametrize(
        "rows",
        [
            "",
            "{",
            "[]",
            "3",
            "null",
            '{"tensor": "none"}',
            "[1, 2]",
            "[{}]",
            "[" * 100_000,
            '[{"length": 5, "taken": 5, "tail": 3}]',
            '[{"length": {"tensor": "0.tail"}, "taken": 5, "tail": {"tensor": "0.tail"}}]',
        ],
        ids=lambda text: text[:20] or "empty",
    )
    def test_rows_that_are_none(self, m: MBLM, file: Path, rows: str) -> None:
        header, tensors = read(file)
        write(file, ({**header, "rows": rows}, tensors), signed=True)
        with pytest.raises(ValueError, match=f"{file}: a damaged session"):
            Session.load(file, m)

    def test_a_byte_that_is_another(self, m: MBLM, file: Path) -> None:
        header, tensors = read(file)
        tensors["0.tail"][0] += 1
        write(file, (header, tensors), signed=False)
        with pytest.raises(ValueError, match="a damaged session: it is not as"):
            Session.load(file, m)

    def test_weights_of_no_known_type(self, m: MBLM, file: Path) -> None:
        header, tensors = read(file)
        write(file, ({**header, "weights": "int4"}, tensors), signed=True)
        with pytest.raises(ValueError, match=r"damaged session .*weights: expected one of"):
            Session.load(file, m)

    def test_a_model_whose_weights_changed(self, m: MBLM, file: Path) -> None:
        with torch.no_grad():
            m.to_logits.bias[0] += 1
        with pytest.raises(ValueError, match="weights have changed"):
            Session.load(file, m)


def test_a_file_survives_a_failed_save(m: MBLM, file: Path, monkeypatch: Any) -> None:
    content = file.read_bytes()

    def fail(*_: Any) -> bytes:
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save", fail)
    with pytest.raises(OSError, match="disk full"):
        m.session().save(file)
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(lambda s: s, id="nothing"),
        pytest.param(lambda s: s.feed([b"\x01", b"\x02"]), id="a byte"),
        pytest.param(lambda s: s.feed([b"\x01" * 20, b"\x02" * 20]), id="a patch's end"),
        pytest.param(lambda s: s.feed([b"\x01" * 40, b""]), id="ragged"),
        pytest.param(lambda s: s.feed([b"\x01" * 3, b"\x02"]).generate(1), id="a byte chosen"),
        pytest.param(lambda s: s.feed([b"\x01" * 3, b"\x02"]).generate(9), id="bytes chosen"),
        pytest.param(lambda s: (s.generate(4), s.logits()), id="logits asked for"),
        pytest.param(lambda s: (s.generate(5), s.fork().feed([b"\x01"] * 2)), id="forked"),
    ],
)
@pytest.mark.parametrize(
    "blocks",
    [
        pytest.param([transformer(), mamba("mamba2")], id="built in"),
        pytest.param([LSTMBlock(with_hook=True), transformer(), LSTMBlock()], id="hosted"),
    ],
)
def test_a_session_is_saved_after_any_step(
    blocks: list[Any], step: Callable[[Session], Any], tmp_path: Path
) -> None:
    m = model(*blocks, seq_lens=[20, 4, 3][: len(blocks)])
    session = Session(m, 2)
    step(session)
    session.save(tmp_path / "s")
    loaded = Session.load(tmp_path / "s", m)
    assert loaded.lengths == session.lengths
    assert torch.equal(loaded.logits(), session.logits())
    assert torch.equal(loaded.generate(13), session.generate(13))
    assert torch.equal(loaded.logits(), session.logits())


@pytest.mark.parametrize(
    ("highest", "dtype"), [(255, torch.uint8), (256, torch.int16), (1 << 15, torch.int32)]
)
def test_bytes_take_no_more_than_they_need_and_those_of_older_files_are_read(
    highest: int, dtype: torch.dtype, tmp_path: Path
) -> None:
    m = model(mamba(), transformer(), seq_lens=[6, 4], num_tokens=40_000)
    session = Session(m).feed([1, highest, 2, 3, 4, 5])
    session.save(file := tmp_path / "s")
    header, tensors = read(file)
    assert tensors["0.tail"].dtype == dtype
    for tail in (dtype, torch.int64):
        content = header, tensors | {"0.tail": tensors["0.tail"].to(tail)}
        write(file, content, signed=True)
        assert torch.equal(Session.load(file, m).generate(13), session.fork().generate(13))


# -- Files that are damaged at random --------------------------------------------------------------


def mutate_bytes(content: bytes, chance: random.Random) -> bytes:
    """A bit or several turned over, a piece cut out or doubled, the end cut off."""
    at, end = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    kind = chance.randrange(4)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + content[end:]
    if kind == 2:
        return content[:end] + content[at:]
    changed = bytearray(content)
    for _ in range(chance.choice([1, 1, 2, 8])):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def mutate_content(content: Content, chance: random.Random) -> Content:
    """A tensor of another dtype, shape or value, missing, doubled; a number in a row changed."""
    header, tensors = dict(content[0]), {name: t.clone() for name, t in content[1].items()}
    name = chance.choice(sorted(tensors))
    tensor = tensors[name]
    kind = chance.randrange(9)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[chance.choice(sorted(tensors))] = tensor.clone()
    elif kind == 2:
        tensors[name] = tensor.to(chance.choice([torch.float64, torch.bfloat16, torch.int64]))
    elif kind == 3:
        tensors[name] = tensor[..., : chance.randrange(max(1, tensor.shape[-1]))].clone()
    elif kind == 4:
        tensors[name] = torch.cat((tensor, tensor))
    elif kind == 5:
        tensors[name] = tensor.transpose(0, -1).contiguous()
    elif kind == 6:
        chosen = torch.tensor(chance.choice([-1, 0, 1, 2**31, 2**62])).to(tensor.dtype)
        tensor.view(-1)[chance.randrange(max(1, tensor.numel())) :][:1] = chosen
    else:
        rows = json.loads(header["rows"])
        row = chance.choice(rows)
        key = chance.choice(sorted(row))
        values = [
            -1,
            0,
            1,
            4,
            5,
            8,
            10**9,
            2**63,
            1.5,
            None,
            "1",
            [],
            row[chance.choice(sorted(row))],
        ]
        if chance.random() < 0.2:
            rows.append(row) if chance.random() < 0.5 else rows.remove(row)
        elif chance.random() < 0.2:
            del row[key]
        else:
            row[key] = chance.choice(values)
        header["rows"] = json.dumps(rows)
    return header, tensors


@pytest.mark.parametrize("times", [60, pytest.param(1300, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "blocks",
    [
        pytest.param([transformer(), transformer()], id="transformers"),
        pytest.param([mamba("mamba1"), mamba("mamba2")], id="mambas"),
        pytest.param([LSTMBlock(), transformer()], id="hosted"),
        pytest.param(
            [transformer(pos_emb_type=None), LSTMBlock(with_hook=True)], id="hosted local"
        ),
    ],
)
def test_a_damaged_file_is_refused_or_gives_an_equal_session(
    blocks: list[Any], times: int, tmp_path: Path
) -> None:
    """Also one that somebody signed: then it may be another session, which works all the same."""
    m = model(*blocks, seq_lens=[20, 4])
    session = Session(m, 2).feed([b"\x01\x02\x03\x04\x05\x06\x07", b"\x03"])
    session.generate(6)
    session.save(tmp_path / "s")
    whole, content = (tmp_path / "s").read_bytes(), read(tmp_path / "s")
    logits, chance = session.logits(), random.Random(1)
    refused = 0
    for turn in range(2 * times):
        signed = turn % 2 == 1
        if turn % 4 == 0:
            (tmp_path / "t").write_bytes(mutate_bytes(whole, chance))
        else:
            write(tmp_path / "t", mutate_content(content, chance), signed=signed)
        try:
            loaded = Session.load(tmp_path / "t", m)
        except ValueError as error:
            assert str(tmp_path / "t") in str(error)
            refused += 1
            continue
        if signed:
            loaded.logits()
            loaded.generate(10)
        else:
            assert torch.equal(loaded.logits(), logits)
    assert refused > times
