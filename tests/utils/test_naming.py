"""Errors of the system name the file that they are about; for arguments see test_request."""

import pytest

from mblm.utils.naming import naming_file


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
