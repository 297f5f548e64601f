"""Files of intermediate results: arrays and compressed bytes that are complete or not there.

    8 bytes    magic
    u64        length of the header
    header     JSON {"meta": {...}, "arrays": {name: [dtype, shape, offset]}, "blobs": {name: [offset, stored bytes]}}
    content    arrays as they lie in memory, blobs as one zstd frame with a checksum; offsets count from here

A reader takes what it needs: columns are views of the mapped file.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard

from data_prep.files import publish, temporary_name
from pretrain.errors import DataCorruption

MAGIC = b"prepunit"
ALIGNMENT = 64


def write_unit(path: Path, arrays: Mapping[str, npt.NDArray[Any]], blobs: Mapping[str, bytes],
               meta: dict[str, Any]) -> None:
    """Write a unit. It survives a power cut once this returns, its name once the folder is flushed."""
    compressor = zstandard.ZstdCompressor(level=1, write_checksum=True)
    header: dict[str, Any] = {"meta": meta, "arrays": {}, "blobs": {}}
    pieces: list[bytes] = []
    offset = 0
    for name, array in arrays.items():
        header["arrays"][name] = [array.dtype.str, list(array.shape), offset]
        pieces += [array.tobytes(), bytes(-array.nbytes % ALIGNMENT)]
        offset += array.nbytes + -array.nbytes % ALIGNMENT
    for name, blob in blobs.items():
        packed = compressor.compress(blob)
        header["blobs"][name] = [offset, len(packed)]
        pieces.append(packed)
        offset += len(packed)
    stated = json.dumps(header, separators=(",", ":")).encode()
    stated += b" " * (-(len(MAGIC) + 8 + len(stated)) % ALIGNMENT)
    with temporary_name(path).open("wb") as file:
        file.write(MAGIC + len(stated).to_bytes(8, "little") + stated)
        for piece in pieces:
            file.write(piece)
        publish(file, path)


class Unit:
    """A unit that is read. Raises DataCorruption where the file is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if self._map[:8] != MAGIC:
                raise ValueError("it does not begin as one")
            self._start = 16 + int.from_bytes(self._map[8:16], "little")
            header = json.loads(self._map[16:self._start])
        except (OSError, ValueError) as error:
            raise DataCorruption(f"{path}: no intermediate result ({error}); remove {path.parent} and run again"
                                 ) from None
        self.meta: dict[str, Any] = header["meta"]
        self._arrays, self._blobs = header["arrays"], header["blobs"]

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        """An array, as a read-only view."""
        dtype, shape, offset = self._arrays[name]
        count = int(np.prod(shape))
        return np.frombuffer(self._map, dtype, count, self._start + offset).reshape(shape) if count else np.zeros(
            shape, dtype)

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def blob(self, name: str) -> bytes:
        """Decompressed bytes. Raises DataCorruption where they are not what was written."""
        offset, size = self._blobs[name]
        start = self._start + offset
        try:
            return zstandard.ZstdDecompressor().decompress(self._map[start:start + size])
        except zstandard.ZstdError as error:
            raise DataCorruption(f"{self.path}: {name} is damaged ({error}); remove {self.path.parent} and run again"
                                 ) from None
