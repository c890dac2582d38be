"""The package's operators, one file each: schema, reference, fake function, gradient."""

from mblm.ops import _native

_native.load()
