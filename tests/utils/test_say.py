"""What is said on a standard error that takes nothing: no exit status and no output change."""

import pytest

from tests import fresh

CODE = """
import os, sys
from mblm.utils.say import say
if sys.argv[1] == "closed":
    sys.stderr = None
elif sys.argv[1] == "closed here":
    sys.stderr = open(os.devnull, "w")
    sys.stderr.close()
elif sys.argv[1] == "left":
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 2)
else:
    os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
say("first")
say("second")
if sys.argv[1].startswith("closed"):
    sys.stderr = sys.__stderr__
print("done")
"""


@pytest.mark.parametrize("where", ["closed", "closed here", "left", "full"])
def test_a_standard_error_that_takes_nothing(where: str) -> None:
    assert fresh.output_of(CODE, where) == "done\n"
