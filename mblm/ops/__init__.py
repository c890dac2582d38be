"""The package's operators, one file each: schema, reference, gradient.

Native kernels refuse bad input by the name of the argument, with a TypeError or a ValueError. Where
none are compiled, the references in PyTorch refuse shapes and dtypes that do not fit.
"""

from mblm.ops import _native

_native.load()
