"""How much of one set of shards stands in another: leakage of evaluation data into training data, measured.

Items are the documents of the evaluation side (of pairs: the texts). Training documents stream past the index of their
n-grams, shard by shard on any number of processes; counts are added, so neither the order of shards nor workers show.

Level `word` compares normalised words of the decoded text and works between tokenizers. Level `token` compares ids,
needs one tokenizer on both sides, and is several times as fast; it misses copies that differ in case or punctuation,
and at their ends those whose first token is another one in the middle of a text.

n-grams in many documents are boilerplate and count for nothing, but an item that stands whole in one document always
counts: a header that it shares with the training side does not excuse a copy.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from data_prep.crew import Advance, Stage, run_stage
from data_prep.decontaminate import is_contaminated
from data_prep.manifest import TOKENIZER, Manifest, Split
from data_prep.ngrams import GramCounts, NgramIndex, Overlap, WholeItems
from data_prep.pairs import shard_pairs
from data_prep.stats import shard_documents
from data_prep.tokenizer import load_tokenizer
from data_prep.words import I64, U64, excerpt, mix, word_hashes
from pretrain.errors import UserError

Level = Literal["word", "token"]
Counts = tuple[npt.NDArray[np.uint32], npt.NDArray[np.bool_], int]
"""Of training shards: ([g] documents by n-gram, [items] whether an item stands whole in one, documents)."""
BATCH_TOKENS = 1 << 18
EXCERPT_WORDS = 40


@dataclass(frozen=True, slots=True)
class Side:
    """One set of shards of an audit."""

    folder: Path
    split: str

    @property
    def name(self) -> str:
        """As people write it."""
        return f"{self.folder}:{self.split}"


@dataclass(frozen=True, slots=True)
class Finding:
    """An evaluation item of which the training side holds something."""

    overlap: Overlap
    provenance: dict[str, Any]
    excerpt: str
    """The longest stretch, decoded."""


@dataclass(frozen=True, slots=True)
class Audit:
    """What an audit measured."""

    level: Level
    items: int
    contaminated: int
    """Items covered to `coverage` or in a stretch of `run`, and those in `whole`."""
    suspicious: int
    """Other items with any n-gram that counts."""
    boilerplate_ngrams: int
    boilerplate_items: int
    """Other items that nothing but boilerplate touches."""
    whole: int
    """Contaminated items that count only because they stand whole in a document: without that, they are boilerplate."""
    mean_coverage: float
    """Share of all evaluation words inside of matched n-grams."""
    worst: list[Finding]
    train_documents: int
    train_fingerprint: str
    evaluation_fingerprint: str

    @property
    def fraction(self) -> float:
        """Contaminated share of the items."""
        return self.contaminated / max(1, self.items)

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson interval of `fraction`, for evaluation items as a sample."""
        n, p = max(1, self.items), self.fraction
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
        return max(0.0, middle - half), min(1.0, middle + half)


def audit(train: Side, evaluation: Side, *, level: Level | None = None, ngram: int = 13, coverage: float = 0.5,
          run: int = 50, boilerplate: int = 10, workers: int = 1, worst: int = 5,
          advance: Advance = lambda _: None) -> Audit:
    """Measure how much of `evaluation` stands in `train`. `level` None: words where both sides have a tokenizer.

    `advance` is told of training tokens done.

    Raises:
        UserError: no such dataset or split, an empty evaluation split, a level that the datasets do not allow.
        DataCorruption: shards that cannot be read.
    """
    theirs, ours = Manifest.load(train.folder), Manifest.load(evaluation.folder)
    level = _level(theirs, ours, level)
    split, shards = ours.split(evaluation.split), theirs.split(train.split).n_shards
    if not split.docs:
        raise UserError(f"{evaluation.name}: holds nothing to look for")
    with tempfile.TemporaryDirectory(prefix="audit-") as folder:
        index = NgramIndex.build(ngram, (
            batch for shard in range(split.n_shards) for batch in _batches(ours, split, shard, level)))
        index.save(Path(folder) / "index")
        counts, whole, documents = GramCounts(index), WholeItems(index), 0
        make = functools.partial(_make_probe, train, Path(folder) / "index", level)
        for found, copied, number in run_stage(make, range(shards), max(1, min(workers, shards)), advance):
            counts.counts += found
            whole.found |= copied
            documents += number
    overlaps = index.overlaps(counts.matched(boilerplate))
    bad = {o.item for o in overlaps if is_contaminated(o, coverage, run)}
    excused = set(np.flatnonzero(whole.found).tolist()) - bad
    bad |= excused
    overlaps = [o for o in overlaps if o.item not in excused] + [
        Overlap(item, 1.0, int(index.lengths[item]), 0) for item in sorted(excused)]
    order = sorted(overlaps, key=lambda o: (o.item not in bad, -o.coverage, -o.run, o.item))[:worst]
    common = counts.common(boilerplate)
    covered = sum(o.coverage * int(index.lengths[o.item]) for o in overlaps)
    return Audit(
        level=level, items=index.n_items, contaminated=len(bad), suspicious=len(overlaps) - len(bad),
        boilerplate_ngrams=int(np.count_nonzero(common)),
        boilerplate_items=len({o.item for o in index.overlaps(common)} - {o.item for o in overlaps}),
        whole=len(excused), mean_coverage=covered / max(1, int(index.lengths.sum())),
        worst=_findings(ours, split, level, order),
        train_documents=documents, train_fingerprint=theirs.fingerprint, evaluation_fingerprint=ours.fingerprint)


def _level(train: Manifest, evaluation: Manifest, wanted: Level | None) -> Level:
    """The level asked for, or the best there is. Raises UserError where it cannot be had."""
    for manifest in (train, evaluation):
        if manifest.tokenizer_sha256 is None and wanted == "word":
            raise UserError(f"{manifest.folder}: has no tokenizer to decode words with; use --level token")
    if train.tokenizer_sha256 != evaluation.tokenizer_sha256 and wanted == "token":
        raise UserError(f"{train.folder} and {evaluation.folder} have other tokenizers: equal ids are different "
                        "tokens; use --level word")
    both = train.tokenizer_sha256 and evaluation.tokenizer_sha256
    if not both and train.tokenizer_sha256 != evaluation.tokenizer_sha256:
        raise UserError(f"{train.folder} and {evaluation.folder}: one has a tokenizer and the other has none; "
                        "their tokens cannot be compared")
    return wanted or ("word" if both else "token")


def _make_probe(side: Side, index: Path, level: Level) -> Stage[Counts]:
    """Counts of one shard of the training side."""
    manifest, loaded = Manifest.read(side.folder), NgramIndex.load(index)
    split = manifest.split(side.split)

    def probe(shard: int, advance: Advance) -> Counts:
        counts, whole, documents = GramCounts(loaded), WholeItems(loaded), 0
        for words, bounds in _batches(manifest, split, shard, level):
            hits = loaded.probe(words, bounds)
            counts.add(hits)
            whole.add(hits)
            documents += len(bounds) - 1
        advance(int(split.table[shard]["tokens"]))
        return counts.counts, whole.found, documents
    return probe


def _batches(manifest: Manifest, split: Split, shard: int, level: Level) -> Iterator[tuple[U64, I64]]:
    """([m] word hashes, [texts + 1] bounds) of the texts that begin in a shard, some at a time."""
    tokenizer = load_tokenizer(manifest.folder / TOKENIZER) if level == "word" else None
    for batch in _grouped(text for text, _ in _texts(manifest, split, shard)):
        if tokenizer is None:
            bounds = np.concatenate([[0], np.cumsum([len(ids) for ids in batch])])
            yield mix(np.concatenate(batch).astype(np.uint64)), bounds
        else:
            yield word_hashes(tokenizer.decode_batch([ids.tolist() for ids in batch], skip_special_tokens=False))


def _texts(manifest: Manifest, split: Split, shard: int) -> Iterator[tuple[npt.NDArray[Any], dict[str, Any]]]:
    """(ids, provenance) of the texts that begin in a shard: documents without their last token, sides of pairs."""
    if manifest.kind == "documents":
        for document in shard_documents(split, shard):
            yield document.tokens[:-1], document.provenance
        return
    for pair in shard_pairs(split, shard):
        assert isinstance(pair.provenance, dict)  # as it is read
        sides = [("query", pair.query), ("positive", pair.positive), *(("negative", ids) for ids in pair.negatives)]
        for side, ids in sides:
            yield ids, pair.provenance | {"side": side}


def _grouped(texts: Iterable[npt.NDArray[Any]]) -> Iterator[list[npt.NDArray[Any]]]:
    batch: list[npt.NDArray[Any]] = []
    size = 0
    for ids in texts:
        batch.append(ids)
        size += len(ids)
        if size >= BATCH_TOKENS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _findings(manifest: Manifest, split: Split, level: Level, overlaps: list[Overlap]) -> list[Finding]:
    """What the items are and what of them was found, in the order of `overlaps`."""
    wanted = {overlap.item: overlap for overlap in overlaps}
    tokenizer = load_tokenizer(manifest.folder / TOKENIZER) if manifest.tokenizer_sha256 else None
    found: dict[int, Finding] = {}
    texts = (text for shard in range(split.n_shards) for text in _texts(manifest, split, shard))
    for number, (ids, where) in enumerate(texts):
        overlap = wanted.get(number)
        if overlap is None:
            continue
        first, length = overlap.first, min(overlap.run, EXCERPT_WORDS)
        if level == "word" and tokenizer is not None:
            shown = excerpt(tokenizer.decode(ids.tolist(), skip_special_tokens=False), first, length)
        else:
            chosen = ids[first:first + length].tolist()
            shown = tokenizer.decode(chosen, skip_special_tokens=False) if tokenizer else " ".join(map(str, chosen))
        found[number] = Finding(overlap, where, shown)
    return [found[overlap.item] for overlap in overlaps]
