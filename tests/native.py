"""What tests of compiled code need. `tests/ops/test_native.py` fails where it could be had."""

import pytest
import torch

from mblm.ops import _native

needs_native = pytest.mark.skipif(not _native.is_loaded(), reason="nothing is compiled")

KIND = torch.ops.mblm.device_kind() if _native.is_loaded() else ""
"""Where the kernels of a GPU run: ``cuda``, emulated on the ``cpu``, or nowhere."""
IS_EMULATED = KIND == "cpu"
GPU_KERNELS = [
    pytest.mark.skipif(
        not (IS_EMULATED or (KIND == "cuda" and torch.cuda.is_available())),
        reason="neither a GPU nor kernels compiled to be emulated",
    ),
    *([] if IS_EMULATED else [pytest.mark.gpu]),
]
