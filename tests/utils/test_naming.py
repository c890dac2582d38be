"""Errors call files and arguments what the caller does; for those of requests see test_request."""

import pytest

from mblm.utils.naming import naming, naming_file


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(28, "full"), "[Errno 28] full: 'a'"),
        (OSError(2, "missing", "b"), "[Errno 2] missing: 'b'"),
        (OSError("no number"), "no number"),
    ],
)
def test_an_error_names_a_file(error: OSError, told: str) -> None:
    with pytest.raises(OSError) as caught, naming_file("a"):
        raise error
    assert str(caught.value) == told


def test_an_argument_is_renamed_in_the_error_itself() -> None:
    class OwnError(ValueError):
        place = 3

    def refuse() -> None:
        raise OwnError("prompt: no")

    with pytest.raises(OwnError) as caught, naming(prompt="--prompt"):
        refuse()
    assert str(caught.value) == "--prompt: no"
    assert caught.traceback[-1].name == "refuse"


def test_what_an_argument_is_part_of_is_renamed_too() -> None:
    names = {"seed": "seeds", "prompt": ""}
    for told, called in {
        "seed: expected an integer": "prompts[3]: seeds: expected an integer",
        "prompt: 33 bytes": "prompts[3]: 33 bytes",
        "prompt[7]: expected an integer": "prompts[3][7]: expected an integer",
        "expected seed: 3": "prompts[3]: expected seed: 3",
    }.items():
        with (
            pytest.raises(ValueError) as caught,
            naming(prompts="--prompts", seeds="--seed", seed="--seed"),
            naming("prompts[3]", **names),
        ):
            raise ValueError(told)
        want = called.replace("prompts", "--prompts").replace("seeds", "--seed")
        assert str(caught.value) == want
