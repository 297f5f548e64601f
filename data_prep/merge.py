"""Several prepared datasets as one: the same tokenizer, the same blocks, copies kept once, no query in two splits."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.corpus import DUPLICATE, KEPT, PASSAGE_ELSEWHERE, QUERY_ELSEWHERE, VERDICTS, disk_array
from data_prep.external import Grouper
from data_prep.manifest import TOKENIZER, Manifest, SplitRecord, write_manifest
from data_prep.pairs import PairReader, PairWriter, TokenPair, stored_pairs
from data_prep.shards import CONTINUES, DOC_FLAGS, DOC_HASH, ShardReader, ShardWriter
from data_prep.stats import StoredDocument, stored_documents
from data_prep.summary import write_summary
from data_prep.tally import Tally
from data_prep.tokenizer import TOKEN_BYTES, TOKENIZER_CONFIG
from data_prep.words import U64, mix
from data_prep.workfolder import WORK, is_finished, open_work, publish_dataset
from pretrain.errors import UserError

_SORT_BYTES = 256 << 20
Marks = dict[tuple[int, str], npt.NDArray[np.uint8]]
"""By dataset and split, [documents] a verdict each."""


def merge_datasets(out: Path, folders: list[Path]) -> Manifest:
    """Write the datasets of `folders`, in this order, as one dataset.

    Splits of one name are joined. A document that stands in an earlier dataset, in whatever split, is dropped: by the
    64-bit hash of its text, of pairs by the ids of query and positive. As preparation does it, a pair is dropped whose
    query, or mined passage, came first in another split. Of datasets made from parts of a list of sources
    with one given tokenizer, without steps across documents but exact copies, the result has the very shards that the
    whole list gives.

    Raises:
        UserError: datasets that do not go together, or an `out` that is in use.
        DataCorruption: one that has faults.
    """
    out = out.resolve()
    manifests = [Manifest.load(folder) for folder in folders]
    _require_alike(manifests)
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out}: exists; give another folder, or remove it")
    recipe = {"merged": [manifest.fingerprint for manifest in manifests],
              "sources": [source for manifest in manifests for source in _sources(manifest)]}
    with open_work(out, recipe, {}, shared=False) as folder:
        if not is_finished(folder):
            _write(folder, manifests, recipe)
        publish_dataset(folder, out)
    return Manifest.load(out)


def _require_alike(manifests: list[Manifest]) -> None:
    first = manifests[0]
    for other in manifests[1:]:
        for name in ("kind", "tokenizer_sha256", "dtype", "block_tokens", "pairs", "eos_id"):
            mine, theirs = getattr(first, name), getattr(other, name)
            if mine != theirs:
                raise UserError(f"{first.folder} and {other.folder} cannot be merged: {name} is {mine} and {theirs}; "
                                "prepare both with one tokenizer.path and the same blocks")
    mined = {made.provenance.get("split_rule", ""): made.folder for made in manifests if _is_mined(made)}
    if len(mined) > 1:
        raise UserError(f"{' and '.join(map(str, mined.values()))} cannot be merged: their splits are drawn by other "
                        "rules, which would divide packages; prepare them with one seed and the same splits")


def _is_mined(manifest: Manifest) -> bool:
    return any(source.get("kind") == "python_pairs" for source in _sources(manifest))


def _sources(manifest: Manifest) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = manifest.provenance.get("config", {}).get("sources", [])
    return found


def _write(folder: Path, manifests: list[Manifest], recipe: dict[str, Any]) -> None:
    first = manifests[0]
    for name in (TOKENIZER, TOKENIZER_CONFIG, TOKEN_BYTES):
        if (first.folder / name).exists():
            shutil.copyfile(first.folder / name, folder / name)
    total = sum(split.docs for manifest in manifests for split in manifest.splits.values())
    flags = disk_array(folder / WORK, "merged", np.uint8, total)
    dropped = _copies(folder / WORK, manifests, flags)
    if first.kind == "pairs":
        for side in ("q", "p") if any(map(_is_mined, manifests)) else ("q",):  # each side reads all pairs
            _mark_elsewhere(folder / WORK, manifests, flags, dropped, side)
    tally = Tally()
    records = {split: _write_split(folder, split, manifests, dropped, tally)
               for split in dict.fromkeys(name for manifest in manifests for name in manifest.splits)}
    merged = first.model_copy(update={"splits": records, "provenance": {
        "config": recipe, "paths": {str(i): str(m.folder.absolute()) for i, m in enumerate(manifests)},
        "counts": tally.counts, "split_rule": first.provenance.get("split_rule", "")}})
    write_summary(folder, merged)
    write_manifest(folder, merged)


def _write_split(folder: Path, split: str, manifests: list[Manifest], verdicts: Marks, tally: Tally) -> SplitRecord:
    """Join the documents or pairs of one split."""
    first, dtype = manifests[0], np.dtype(manifests[0].dtype)
    per_shard = first.provenance.get("config", {}).get("blocks_per_shard")
    writer: ShardWriter | PairWriter
    if first.pairs is None:
        writer = ShardWriter(folder, split, dtype=dtype, block_tokens=first.block_tokens, blocks_per_shard=per_shard)
    else:
        writer = PairWriter(folder, split, dtype=dtype, block_pairs=first.pairs.block_pairs, blocks_per_shard=per_shard)
    writer.resume()
    sources = 0
    with writer:
        for number, manifest in enumerate(manifests):
            found = verdicts.get((number, split), np.zeros(0, np.uint8))
            for item, verdict in zip(_items(manifest, split), found, strict=True):
                where = item.provenance
                assert isinstance(where, dict)  # as it is read
                size = item.utf8_bytes if isinstance(item, StoredDocument) else int(where.get("bytes", 0))
                tally.add(where.get("source", "unknown"), VERDICTS[verdict], size)
                if verdict != KEPT:
                    continue
                if isinstance(writer, ShardWriter) and isinstance(item, StoredDocument):
                    writer.push(item.tokens, utf8_bytes=size, source=sources + item.source, doc_hash=item.doc_hash,
                                provenance=where)
                elif isinstance(writer, PairWriter) and isinstance(item, TokenPair):
                    writer.push(item, size)
            sources += len(_sources(manifest))
    assert writer.record is not None  # it is closed
    return writer.record


def _items(manifest: Manifest, split: str) -> Iterator[StoredDocument | TokenPair]:
    if split not in manifest.splits:
        return
    found = manifest.split(split)
    yield from stored_documents(found) if manifest.kind == "documents" else stored_pairs(found)


def _copies(work: Path, manifests: list[Manifest], flags: npt.NDArray[np.uint8]) -> Marks:
    """Mark in `flags` what stands in an earlier dataset; the documents of one dataset all stay. Returns views."""
    places: Marks = {}
    position = 0
    with Grouper(work, "merged", len(flags), _SORT_BYTES) as grouper:
        for number, manifest in enumerate(manifests):
            for name in manifest.splits:
                start = position
                for hashes in _hashes(manifest, name):
                    grouper.add(hashes, 0, np.arange(position, position + len(hashes)), number)
                    position += len(hashes)
                places[number, name] = flags[start:position]
        for records, bounds in grouper.groups():
            first = np.repeat(records["value"][bounds[:-1]], np.diff(bounds))
            flags[records["position"][records["value"] != first]] = DUPLICATE
    return places


def _mark_elsewhere(work: Path, manifests: list[Manifest], flags: npt.NDArray[np.uint8], marks: Marks,
                    side: str) -> None:
    """Mark pairs, kept so far, with a text of a side that came first in another split of another dataset.

    Side "q" are the queries of all pairs, "p" the passages of mined ones. Texts are compared by their tokens.
    """
    splits = [*dict.fromkeys(name for _, name in marks)]
    start = 0
    with Grouper(work, f"homes-{side}", len(flags), _SORT_BYTES) as grouper:
        for (number, name), own in marks.items():
            digests = _digests(manifests[number], name, side, own == KEPT)
            for at, digest in digests:
                high, low = np.frombuffer(digest, "<u8").reshape(2, 1)
                grouper.add(high, low, np.array([start + at]), number * len(splits) + splits.index(name))
            start += len(own)
        for records, bounds in grouper.groups():
            dataset, split = np.divmod(records["value"], len(splits))
            first = np.repeat(bounds[:-1], np.diff(bounds))
            others = (dataset != dataset[first]) & (split != split[first])
            flags[records["position"][others]] = QUERY_ELSEWHERE if side == "q" else PASSAGE_ELSEWHERE


def _digests(manifest: Manifest, name: str, side: str, wanted: npt.NDArray[np.bool_]) -> Iterator[tuple[int, bytes]]:
    """(number, 16-byte hash of the tokens of a side) of the wanted pairs of a split; see `_mark_elsewhere`."""
    for at, pair in enumerate(stored_pairs(manifest.split(name))):
        assert isinstance(pair.provenance, dict)  # as it is read
        if wanted[at] and (side == "q" or "function" in pair.provenance):
            text = pair.query if side == "q" else pair.positive
            yield at, hashlib.blake2b(text.tobytes(), digest_size=16).digest()


def _hashes(manifest: Manifest, name: str) -> Iterator[U64]:
    """What copies are known by, shard by shard in the order of the split."""
    split = manifest.split(name)
    for shard in range(split.n_shards):
        if manifest.kind == "documents":
            reader = ShardReader(split.tar_path(shard))
            for block in range(reader.n_blocks):
                rows = reader.docs(block)
                yield rows[rows[:, DOC_FLAGS] & CONTINUES == 0, DOC_HASH].view(np.uint64)
        else:
            pairs = PairReader(split.tar_path(shard))
            for block in range(pairs.n_blocks):
                ids = pairs.block(block).ids
                yield mix(ids[:, 0]) ^ mix(mix(ids[:, 1]))

