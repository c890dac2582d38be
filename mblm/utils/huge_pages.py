"""Memory for weights in huge pages: a core looks up 2 MiB at once, not 4 KiB."""

import mmap
from contextlib import suppress

import torch
from torch import Tensor

_PAGE = 2 << 20
# What is mapped at once. Memory that nothing is written to takes no room.
_CHUNK = 64 << 20
# Smaller tensors lie in few pages of any size.
_FEWEST = 256 << 10
_ALIGNMENT = 64


class HugePages:
    """Keeps tensors one behind the other.

    Where a system has no huge pages, or none to give, its pages are the usual ones.
    """

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8, device="cpu")

    def keep(self, tensor: Tensor) -> Tensor:
        """A contiguous copy of a tensor on a CPU; itself, if small, elsewhere, or without room."""
        size = tensor.numel() * tensor.element_size()
        if size < _FEWEST or tensor.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
            return tensor
        taken = -(-size // _ALIGNMENT) * _ALIGNMENT
        if taken > self._free.numel():
            try:
                self._free = _map(max(taken, _CHUNK))
            except OSError:  # there is a limit to addresses: `ulimit -v`
                return tensor
        place, self._free = self._free[:size], self._free[taken:]
        return place.view(tensor.dtype).view(tensor.shape).copy_(tensor)


def _map(size: int) -> Tensor:
    """So many bytes from the beginning of a page on; they are unmapped with the last view."""
    memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # of a system without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    pages = torch.frombuffer(memory, dtype=torch.uint8)
    begin = -pages.data_ptr() % _PAGE
    return pages[begin : begin + size]
