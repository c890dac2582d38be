"""Print what a build needs to know of the installed torch, as JSON."""

import json
import sys
from pathlib import Path

import torch

json.dump(
    {
        "root": str(Path(torch.__file__).parent),
        "version": str(torch.__version__),
        "cxx11_abi": int(torch._C._GLIBCXX_USE_CXX11_ABI),
        "cuda": torch.version.cuda or "",
        "python": sys.implementation.cache_tag,
    },
    sys.stdout,
)
