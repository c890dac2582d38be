"""A run goes on with the data that it began with, or says which file is another."""

from pathlib import Path

import pytest

from mblm import __version__
from mblm.train.core.config import Lineage
from mblm.train.core.lineage import check_same_as_before, facts_of, lineage_of

from . import jobs


class Files(jobs.Ids):
    """Data of files."""

    def __init__(self, *files: tuple[str, int]) -> None:
        super().__init__()
        self.files = list(files)

    def lineage(self) -> list[tuple[str, int]]:
        return self.files


def facts(*files: tuple[str, int]) -> dict[str, object]:
    data = lineage_of(Files(*files))
    lineage = Lineage(
        package=__version__, stages=[], seed=0, training_data=data, validation_data=data
    )
    return facts_of(jobs.config(Path("runs")), lineage)


BEFORE = [("in/a.txt", 40), ("b", 60)]


@pytest.mark.parametrize(
    ("now", "message"),
    [
        ([("in/a.txt", 41), ("b", 60)], "training_data.first.in/a.txt: 40 -> 41"),
        ([("in/a.txt", 40)], "training_data.first.b: 60 -> None"),
        ([*BEFORE, ("c", 1)], "training_data.first.c: None -> 1"),
        (BEFORE[::-1], "training_data.digest: "),
    ],
)
def test_other_data_are_refused_by_the_file_that_differs(now, message) -> None:
    with pytest.raises(ValueError, match=f"these have changed:.*{message}"):
        check_same_as_before(facts(*BEFORE), facts(*now), "step_3", exact=True)


def test_other_weights_of_a_mixture_are_refused() -> None:
    weights = [{"io.dataset_args.sources.code": weight} for weight in (0.5, 0.6)]
    before, now = (facts(*BEFORE) | of_run for of_run in weights)
    with pytest.raises(ValueError, match=r"io.dataset_args.sources.code: 0.5 -> 0.6"):
        check_same_as_before(before, now, "step_3", exact=True)


def test_the_same_data_are_not() -> None:
    assert check_same_as_before(facts(*BEFORE), facts(*BEFORE), "step_3", exact=True) == []
