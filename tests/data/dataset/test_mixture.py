"""A mixture draws every sample by seed and place alone, and of each source by its weight."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mblm.data.dataset.byte_files import ByteFiles, ByteFilesArgs
from mblm.data.dataset.mixture import Mixture
from mblm.data.pack import pack
from mblm.data.types import ModelMode
from tests.data.entry import entry_config

TRAIN, VALID, TEST = ModelMode


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Letters in one file, digits in the files of a folder."""
    (tmp_path / "letters").write_bytes(b"abcdefghij" * 100)
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "0").write_bytes(b"0123" * 50)
    (tmp_path / "digits" / "1").write_bytes(b"4567" * 50)
    return tmp_path


SOURCES = {"letters": 0.75, "digits": 0.25}


def mixture(
    folder: Path, mode: ModelMode = TRAIN, worker: int = 0, workers: int = 1, **arguments: Any
) -> Any:
    seed = arguments.pop("seed", 3)
    args = {"sources": SOURCES, **arguments}
    config = entry_config(folder, args, {"seed": seed}, input_seq_len=5, num_tokens=257)
    return ByteFiles.from_train_entry_config(config, mode, worker, workers)


def texts(data: Any) -> list[bytes]:
    return [bytes(data[index][0].tolist()) for index in range(len(data))]


def test_samples_are_of_sources_as_often_as_their_weights_say(folder: Path) -> None:
    data = mixture(folder)
    drawn = Counter(data.draw(place)[0] for place in range(4000))
    assert abs(drawn["letters"] / 4000 - 0.75) < 0.03
    letters = sum(text.isalpha() for text in texts(data))
    assert letters + sum(text.isdigit() for text in texts(data)) == len(data) == 252


def test_samples_start_anywhere_that_a_whole_one_does(folder: Path) -> None:
    data = mixture(folder)
    starts = {data.draw(place) for place in range(20_000)}
    digits = {start for name, start in starts if name == "digits"}
    assert digits == set(range(360 - 4)), "of 400 bytes nine tenths are to train on"
    assert all(len(text) == 5 for text in texts(data))


def test_a_sample_depends_on_seed_and_place_alone(folder: Path) -> None:
    first, again = mixture(folder), mixture(folder)
    order = list(reversed(range(len(again))))
    assert [first[index][0].tolist() for index in order] == [
        again[index][0].tolist() for index in range(len(again))
    ][::-1]
    assert texts(first) != texts(mixture(folder, seed=4))
    assert texts(mixture(folder, seed=None)) == texts(mixture(folder, seed=0))


def test_the_order_of_the_sources_does_not_matter(folder: Path) -> None:
    data, other = mixture(folder), mixture(folder, sources=dict(reversed(SOURCES.items())))
    assert texts(data) == texts(other)
    assert data.lineage() == other.lineage()


def test_epochs_and_workers_draw_other_samples(folder: Path) -> None:
    places: list[int] = []
    for worker in range(2):
        data = mixture(folder, worker=worker, workers=2)
        data.draw = lambda place: places.append(place) or ("letters", 0)
        for epoch in range(5):
            texts(data.offset_to(epoch))
    assert len(places) == len(set(places)) > 1000


def test_every_source_is_cut_into_parts_by_itself(folder: Path) -> None:
    for mode, size in ((TRAIN, 900), (VALID, 50), (TEST, 50)):
        data = mixture(folder, mode)
        assert data.parts["letters"]._data_size == size
    assert mixture(folder, TEST, test_fraction=0) is None


def test_its_lineage_names_sources_and_files(folder: Path) -> None:
    assert mixture(folder).lineage() == [
        ("digits: 0", 200),
        ("digits: 1", 200),
        ("letters: letters", 1000),
    ]


def test_sources_may_start_at_documents(folder: Path) -> None:
    data = mixture(folder, sample_starts="documents", seed=1)
    digits = [text for text in texts(data) if text.isdigit()]
    starts = {b"01230", b"12301", b"23012", b"30123", b"45674", b"56745", b"67456", b"74567"}
    assert len(digits) > 40 and set(digits) == starts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sources": {}}, "sources\n.*at least 1 item"),
        ({"sources": {"letters": 0.5, "digits": 0.4}}, "sources: .* sum to 1, got 0.9"),
        ({"sources": {"letters": 1.5, "digits": -0.5}}, "above 0, got -0.5 for 'digits'"),
        ({"sources": {"letters": 1, "digits": 0}}, "above 0, got 0.0 for 'digits'"),
        ({"sources": {"letters": float("nan")}}, "above 0, got nan for 'letters'"),
        ({"sources": {"": 1}}, "sources(.|\n)*at least 1 character"),
        ({"sources": {"letters": True}}, "expected a number, no truth value"),
        ({"sources": ["letters"]}, "sources\n.*valid dictionary"),
        ({"files": ["letters"]}, "give sources or files, not both"),
        ({"sources": {"lettres": 1.0}}, "sources: 'lettres': data_dir .*: no file or folder"),
        ({"sources": {"letters": 0.5, "./letters": 0.5}}, "'letters' and './letters' are the same"),
        ({"sources": {"nothing": 1.0}}, "sources: 'nothing': files: no file in"),
        ({"sources": {"empty": 1.0}}, r"sources: 'empty': .*data_size: 0 is too small"),
        ({"sources": {"output": 1.0}}, "sources: 'output': io.output_dir: expected another"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_unfit_sources_are_refused_by_name(
    folder: Path, arguments: dict[str, Any], message: str
) -> None:
    (folder / "nothing").mkdir()
    (folder / "output").mkdir()
    (folder / "empty").touch()
    with pytest.raises(ValueError, match=message):
        mixture(folder, **arguments)


def test_the_class_alone_takes_no_sources(folder: Path) -> None:
    args = ByteFilesArgs(sources=SOURCES)
    with pytest.raises(ValueError, match="sources: expected none, make a Mixture"):
        ByteFiles(folder, TRAIN, args, seq_len=5, worker_id=0, num_workers=1)


def test_any_datasets_can_be_mixed(folder: Path) -> None:
    alone = {"seq_len": 4, "worker_id": 0, "num_workers": 1}
    parts = {str(at): ByteFiles(folder / "digits" / str(at), TRAIN, **alone) for at in range(2)}
    data = Mixture(parts, {"0": 0.5, "1": 0.5}, seed=1, **alone)
    assert {bytes(sorted(text)) for text in texts(data)} == {b"0123", b"4567"}
    for weights, message in (
        ({"0": 1.0}, r"weights: expected one for each of \['0', '1'\], got \['0'\]"),
        ({"0": 0.5, "1": 0.4}, "sum to 1, got 0.9"),
    ):
        with pytest.raises(ValueError, match=message):
            Mixture(parts, weights, seed=1, **alone)
    with pytest.raises(ValueError, match="parts: expected samples of 5 as seq_len says, '0' has"):
        Mixture(parts, {"0": 0.5, "1": 0.5}, seed=1, **{**alone, "seq_len": 5})


def test_there_is_a_test_where_all_sources_have_one(folder: Path, tmp_path: Path) -> None:
    pack([str(folder / "digits")], tmp_path / "packed", valid=0.5)
    assert mixture(folder, TEST, sources={"letters": 0.5, "digits": 0.5}) is not None
    assert mixture(folder, TEST, sources={"letters": 0.5, "packed": 0.5}) is None
    data = mixture(folder, VALID, sources={"letters": 0.5, "packed": 0.5}, valid_fraction=0.2)
    assert {name: part._data_size for name, part in data.parts.items()} == {
        "letters": 200,  # a fifth
        "packed": 200,  # as it was packed
    }
