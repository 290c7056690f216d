"""Parameters in an .npz file: written whole, the same bytes for the same parameters, and read with distrust.

    save("model.npz", params)
    params = load("model.npz", like=params)

The file is what `numpy.savez` would write, so `numpy.load` reads it: a zip archive with one .npy member per leaf, named
by the leaf's dotted path. `load` also takes what `savez` and `savez_compressed` write, and refuses all that
`numpy.load` would take, allocate or guess at beyond that: the guarantees of safetensors, for npz.
"""

from .reading import MAX_BYTES, Entry, ParameterFileError, ParameterNameError, entries, load
from .writing import save

__all__ = ["MAX_BYTES", "Entry", "ParameterFileError", "ParameterNameError", "entries", "load", "save"]
