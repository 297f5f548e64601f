"""How the sources are cut into pieces that can be read one by one, anywhere: files, or stretches of large ones.

Pieces follow from the sources alone, not from workers or ranks, and everything after is done piece by piece in their
order. A source with a limit is one piece, as is a preset of pairs: what they give depends on what came before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_prep.config import PrepConfig
from data_prep.files import canonical_json, write_atomic
from data_prep.pair_sources import pair_files, pair_folder
from data_prep.reading import FilePart, format_of
from data_prep.rows import open_hub
from data_prep.source_config import (
    PAIR_SOURCES,
    AnySource,
    BeirSource,
    HubDataset,
    PairPresetSource,
)
from data_prep.sources import source_files, source_folder
from pretrain.errors import ConfigError

PIECE_BYTES = 64 << 20
"""Small files are read together up to this size; larger ones of lines or row groups are cut."""
LEAST_PIECE_BYTES = 4 << 20
PIECES = 256
"""As many pieces as a small corpus is cut into, none smaller than the least: enough to keep a machine's cores busy."""
HUB_ROWS = 100_000
"""Rows of a dataset of the `datasets` library in a piece."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What is read in one go."""

    number: int
    source: int
    parts: tuple[FilePart | None, ...]
    """None stands for all of a source without files; one whose path is empty for its rows [start, stop)."""

    @property
    def size(self) -> int:
        """Bytes on the disk, 0 where that is not known."""
        return sum(part.size for part in self.parts if part is not None)


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of all sources, found afresh at each start: they must not have changed since the plan was made."""

    files: tuple[tuple[tuple[str, Path, int, int], ...], ...]
    """Of each source: (name, path, bytes, time of the last change in ns)."""
    evaluation: tuple[tuple[tuple[str, Path, int, int], ...], ...]
    """The same of each evaluation set."""

    @property
    def digest(self) -> str:
        """SHA-256 over names, sizes and times."""
        stated = [[[name, size, time] for name, _, size, time in files] for files in (*self.files, *self.evaluation)]
        return hashlib.sha256(canonical_json(stated)).hexdigest()

    @property
    def file_bytes(self) -> int:
        """Bytes on the disk of the sources that have files."""
        return sum(size for files in self.files for _, _, size, _ in files)

    @property
    def total_bytes(self) -> int | None:
        """Bytes on the disk; None where a source has no files."""
        return self.file_bytes if all(self.files) else None


def list_files(config: PrepConfig) -> Listing:
    """Find the files of all sources and evaluation sets.

    Raises ConfigError for a source without files, or one that would read the dataset about to be made.
    """
    against = [] if config.decontaminate is None else config.decontaminate.against
    return Listing(tuple(_listed(config, source, f"sources.{i}") for i, source in enumerate(config.sources)),
                   tuple(_listed(config, source, f"decontaminate.against.{i}") for i, source in enumerate(against)))


def _listed(config: PrepConfig, source: AnySource, key: str) -> tuple[tuple[str, Path, int, int], ...]:
    out = Path(config.out).resolve()
    files = []
    for name, path in _files(source, key):
        if path.resolve().is_relative_to(out):
            raise ConfigError(key, f"{path} lies inside the dataset folder {out}")
        stat = path.stat()
        files.append((name, path, stat.st_size, stat.st_mtime_ns))
    return tuple(files)


def _files(source: AnySource, key: str) -> list[tuple[str, Path]]:
    return pair_files(source, key) if isinstance(source, PAIR_SOURCES) else source_files(source, key)


def folder_of(source: AnySource) -> Path | None:
    """The folder or file that a source reads; None where it is a dataset of the `datasets` library."""
    return pair_folder(source) if isinstance(source, PAIR_SOURCES) else source_folder(source)


def make_plan(config: PrepConfig, listing: Listing) -> list[Piece]:
    """The pieces of all sources. Large plain files of lines are read once, to find line numbers."""
    found: list[tuple[int, tuple[FilePart | None, ...]]] = []
    piece_bytes = min(PIECE_BYTES, max(LEAST_PIECE_BYTES, listing.file_bytes // PIECES))
    for number, (source, files) in enumerate(zip(config.sources, listing.files, strict=True)):
        hub: HubDataset | None = getattr(source, "dataset", None)
        if hub is not None:
            whole = hub.streaming or _depends_on_order(source)
            found += [(number, (part,)) for part in ([None] if whole else _hub_parts(hub, f"sources.{number}"))]
            continue
        parts = [FilePart(name, path, size) for name, path, size, _ in files]
        if _depends_on_order(source):
            found.append((number, tuple(parts)))
            continue
        cut = (part for whole in parts for part in _cut(whole, piece_bytes))
        found += [(number, piece) for piece in _grouped(cut, piece_bytes)]
    return [Piece(i, number, parts) for i, (number, parts) in enumerate(found)]


def _depends_on_order(source: AnySource) -> bool:
    limited = source.max_documents is not None or source.max_bytes is not None
    return limited or isinstance(source, BeirSource | PairPresetSource)


def _hub_parts(dataset: HubDataset, key: str) -> Iterator[FilePart]:
    rows = len(open_hub(dataset, key))
    for start in range(0, max(1, rows), HUB_ROWS):
        yield FilePart("", Path(), 0, start, min(rows, start + HUB_ROWS))


def _grouped(parts: Iterator[FilePart], piece_bytes: int) -> Iterator[tuple[FilePart, ...]]:
    """Neighbours together up to `piece_bytes`; stretches of a cut file each alone."""
    group: list[FilePart] = []
    for part in parts:
        if group and (part.stop is not None or group[-1].stop is not None
                      or sum(p.size for p in group) + part.size > piece_bytes):
            yield tuple(group)
            group = []
        group.append(part)
    if group:
        yield tuple(group)


def _cut(part: FilePart, piece_bytes: int) -> Iterator[FilePart]:
    """A file in stretches of about `piece_bytes` that can be read by themselves, or whole."""
    if part.size <= piece_bytes or part.path.suffix.lower() not in (".jsonl", ".ndjson", ".json", ".parquet"):
        yield part
    elif format_of(part.path) == ".parquet":
        yield from _row_groups(part, piece_bytes)
    else:
        yield from _lines(part, piece_bytes)


def _lines(part: FilePart, piece_bytes: int) -> Iterator[FilePart]:
    start = lines = offset = newlines = 0
    with part.path.open("rb", buffering=0) as file:
        while block := file.read(min(1 << 20, piece_bytes)):
            if offset + len(block) - start >= piece_bytes and (end := block.rfind(b"\n")) >= 0:
                stop, here = offset + end + 1, newlines + block.count(b"\n", 0, end + 1)
                yield FilePart(part.name, part.path, stop - start, start, stop, lines)
                start, lines = stop, here
            offset, newlines = offset + len(block), newlines + block.count(b"\n")
    if offset > start:
        yield FilePart(part.name, part.path, offset - start, start, offset, lines)


def _row_groups(part: FilePart, piece_bytes: int) -> Iterator[FilePart]:
    import pyarrow
    import pyarrow.parquet
    try:
        metadata = pyarrow.parquet.read_metadata(part.path)
    except (OSError, pyarrow.ArrowException):
        yield part  # reading it sets it aside
        return
    first = rows = size = before = 0
    for group in range(metadata.num_row_groups):
        entry = metadata.row_group(group)
        rows, size = rows + entry.num_rows, size + entry.total_byte_size
        if size >= piece_bytes or group == metadata.num_row_groups - 1:
            share = part.size * (group + 1 - first) // metadata.num_row_groups
            yield FilePart(part.name, part.path, share, first, group + 1, before)
            first, before, size = group + 1, rows, 0


def save_plan(path: Path, pieces: list[Piece]) -> None:
    """Write the pieces, one JSON line each."""
    lines = []
    for piece in pieces:
        parts = [None if part is None else asdict(part) | {"path": str(part.path)} for part in piece.parts]
        lines.append(json.dumps({"source": piece.source, "parts": parts}))
    write_atomic(path, "".join(line + "\n" for line in lines).encode(errors="surrogateescape"))


def load_plan(path: Path) -> list[Piece]:
    """Read the pieces back."""
    def part_of(stated: dict[str, Any] | None) -> FilePart | None:
        return None if stated is None else FilePart(**stated | {"path": Path(stated["path"])})
    lines = path.read_bytes().decode(errors="surrogateescape").splitlines()
    return [Piece(i, row["source"], tuple(map(part_of, row["parts"]))) for i, row in enumerate(map(json.loads, lines))]
