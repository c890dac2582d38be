"""What tests of compiled code need. `tests/ops/test_native.py` fails where it could be had."""

import pytest

from mblm.ops import _native

needs_native = pytest.mark.skipif(not _native.is_loaded(), reason="nothing is compiled")
