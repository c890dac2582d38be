"""The package's operators, one file each: schema, reference, gradient.

Native kernels refuse bad input by the name of the argument, with a TypeError or a ValueError. Where
none are compiled, the references in PyTorch refuse shapes that do not fit, and what PyTorch does.
"""

from mblm.ops import _native

_native.load()
