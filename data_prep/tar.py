"""Writing one shard: a POSIX tar that stock `webdataset` reads and its sidecar index,."""

from __future__ import annotations

import hashlib
import io
import tarfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from data_prep.files import publish, temporary_name
from data_prep.index import INDEX_HEADER, IndexLayout, index_path


class OpenShard:
    """One tar and its index while they are written. Reproducible byte for byte: no times, owners or hosts."""

    def __init__(self, path: Path, layout: IndexLayout, token_bytes: int) -> None:
        self.path, self.layout, self.token_bytes = path, layout, token_bytes
        self._rows: list[tuple[int, ...]] = []
        self._offset = 0
        self._hash = hashlib.sha256()
        self._file: IO[bytes] = temporary_name(path).open("wb")

    @property
    def blocks(self) -> int:
        """Blocks written so far."""
        return len(self._rows)

    def add_row(self, row: dict[str, int]) -> None:
        """End a block: its row of the index, by column."""
        self._rows.append(tuple(row[name] for name in self.layout.row.names or ()))

    def add_array(self, name: str, array: npt.NDArray[Any]) -> int:
        """Write an array as an npy member, version 1.0. Returns the offset of its items in the tar."""
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, array, version=(1, 0), allow_pickle=False)
        content = buffer.getvalue()
        return self.add_member(name, content) + len(content) - array.nbytes

    def add_member(self, name: str, content: bytes) -> int:
        """Write one member and return the offset of its content in the tar."""
        info = tarfile.TarInfo(name)
        info.size, info.mode = len(content), 0o644
        header = info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")
        start = self._offset + len(header)
        self._write(header + content + bytes(-len(content) % tarfile.BLOCKSIZE))
        return start

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._hash.update(content)
        self._offset += len(content)

    def close(self) -> tuple[int, bytes, int]:
        """Publish the tar and its index. Returns the tar's bytes and SHA-256 and the number of items in it."""
        end = self._offset + 2 * tarfile.BLOCKSIZE
        self._write(bytes(2 * tarfile.BLOCKSIZE + -end % tarfile.RECORDSIZE))
        digest = self._hash.digest()
        rows = np.array(self._rows, self.layout.row)
        header = np.zeros((), INDEX_HEADER)
        header["magic"], header["blocks"], header["token_bytes"] = self.layout.magic, len(rows), self.token_bytes
        header["tar_bytes"], header["tar_sha256"] = self._offset, np.frombuffer(digest, "u1")
        header["rows_sha256"] = np.frombuffer(hashlib.sha256(rows.tobytes()).digest(), "u1")
        index = index_path(self.path)
        with temporary_name(index).open("wb") as file:
            file.write(header.tobytes() + rows.tobytes())
            publish(file, index)
        publish(self._file, self.path)
        return self._offset, digest, int(rows[self.layout.items].sum())

    def abandon(self) -> None:
        """Remove the unfinished tar."""
        self._file.close()
        temporary_name(self.path).unlink(missing_ok=True)
