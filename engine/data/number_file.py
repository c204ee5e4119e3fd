"""A file of numbers of one width, read by position.

A mapping would be as fast, and end the process by SIGBUS where the file is cut while it is read, or its disk fails.
"""

import os
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.errors import DataError, problem
from engine.files import READ_BYTES

RESTORE = "Restore it from a copy, or prepare the store again."


class NumberFile:
    """An open file of a token store; any thread may read it."""

    def __init__(self, path: Path, dtype: np.dtype[Any], length: int) -> None:
        """Open the file, which the manifest says has so many numbers."""
        self.path, self._dtype, self._length = path, dtype, length
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, begin: int, out: npt.NDArray[Any]) -> None:
        """Fill `out` with the numbers from index `begin` on; raises DataError where the file doesn't have them."""
        left, at = out.view(np.uint8).data, begin * self._dtype.itemsize
        while left:
            try:
                count = os.preadv(self._descriptor, [left], at)
            except OSError as error:
                raise DataError(problem(str(self.path), "", "can't be read", error.strerror or "", RESTORE)) from error
            if not count:
                has, should = os.fstat(self._descriptor).st_size, self._length * self._dtype.itemsize
                what = f"has {has} bytes, the manifest says {should}"
                raise DataError(problem(str(self.path), "", what, "it was cut while it was read", RESTORE))
            left, at = left[count:], at + count

    def rot(self) -> None:
        """Put the largest numbers there are in place of the file's, for this process only: in a file of that size."""
        with tempfile.TemporaryFile() as rotten:
            left = self._length * self._dtype.itemsize
            while left:
                left -= rotten.write(b"\xff" * min(left, READ_BYTES))
            rotten.flush()
            os.dup2(rotten.fileno(), self._descriptor, inheritable=False)
