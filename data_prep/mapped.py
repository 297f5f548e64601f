"""What readers of a shard share: the mapped tar, its checked index, provenance."""

from __future__ import annotations

import json
import mmap
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from data_prep.index import IndexLayout, index_path, read_index
from pretrain.errors import DataCorruption


class MappedShard:
    """Base of the readers of one shard: views of the mapped file, nothing parsed and nothing copied.

    Opening checks the index (its own hash, the tar's size), never the content of the tar: that is `verify_shard`.

    Raises:
        DataCorruption: where the tar or its index is missing, cut short or not a pair.
    """

    layout: ClassVar[IndexLayout]

    def __init__(self, tar_path: Path, *, random_access: bool = True) -> None:
        self.path = tar_path
        header, self._rows = read_index(index_path(tar_path), self.layout)
        self._token_dtype = np.dtype(f"<u{int(header['token_bytes'])}")
        try:
            with tar_path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise DataCorruption(f"{tar_path}: shard cannot be read ({error})") from None
        if len(self._map) != int(header["tar_bytes"]):
            raise DataCorruption(f"{tar_path}: {len(self._map)} bytes, its index expects {int(header['tar_bytes'])}")
        if random_access and hasattr(mmap, "MADV_RANDOM"):
            self._map.madvise(mmap.MADV_RANDOM)

    @property
    def n_blocks(self) -> int:
        """Blocks in this shard."""
        return len(self._rows)

    @property
    def rows(self) -> npt.NDArray[Any]:
        """The index: [n_blocks] rows of the layout."""
        return self._rows

    @property
    def data(self) -> mmap.mmap:
        """The mapped tar, which `rows` points into. For readers that gather many samples at once."""
        return self._map

    def provenance(self, block: int) -> list[dict[str, Any]]:
        """Where each document or pair of a block came from."""
        start, size = int(self._rows[block]["prov_offset"]), int(self._rows[block]["prov_bytes"])
        return [json.loads(line) for line in self._map[start:start + size].splitlines()]
