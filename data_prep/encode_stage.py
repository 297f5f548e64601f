"""Last stage but one: the kept items of a unit as tokens, in a unit of the same number."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from data_prep.corpus import KEPT, Corpus
from data_prep.texts import unit_texts
from data_prep.tokenizer import encode
from data_prep.unit import Unit, write_unit
from pretrain.errors import PretrainError

BLOCK_ITEMS = 512
"""Items encoded in one call, so that the library's own objects of a whole unit never live at once."""


@dataclass(frozen=True, slots=True)
class Encoder:
    """What encoding needs. Made once in each process."""

    corpus: Corpus
    folder: Path
    """Where the units of tokens go."""
    tokenizer: Tokenizer
    eos: int | None
    """Ends each text; None for pairs."""
    dtype: np.dtype[Any]
    exact: bool
    """Whether decoding must give back every text."""
    check_below: int
    """Items whose rank is below this are decoded again."""

    def encode(self, number: int, advance: Callable[[int], None]) -> None:
        """Encode a unit, or do nothing where that is done. `advance` is told of bytes of text."""
        source, verdict = Unit(self.corpus.units[number]), self.corpus.verdict(number)
        kept = np.flatnonzero(verdict == KEPT)
        target = self.folder / self.corpus.units[number].name
        if not target.exists():
            self._write(source, kept, target)
        advance(int(source["size"][kept].sum()))

    def _write(self, source: Unit, kept: npt.NDArray[np.int64], target: Path) -> None:
        tokens: list[Any] = []
        lengths: list[Any] = []
        check = Check(_unknown_id(self.tokenizer))
        for at, items in unit_texts(source.path, kept, BLOCK_ITEMS):
            texts = [text.decode() for texts in items for text in texts]
            ids, counts = encode(self.tokenizer, texts, self.eos)
            tokens.append(ids.astype(self.dtype))
            lengths.append(counts)
            ranks = source["rank"][kept[at:at + len(items)]]
            chosen = np.repeat(ranks < np.uint64(min(self.check_below, (1 << 64) - 1)), [len(i) for i in items])
            self._check(check, texts, ids, counts, chosen, source)
        text_starts = np.concatenate([[0], np.cumsum(source["n_texts"])])
        arrays = {"tokens": np.concatenate([np.zeros(0, self.dtype), *tokens]),
                  "lengths": np.concatenate([np.zeros(0, np.int64), *lengths])}
        arrays |= {name: source[name][kept] for name in ("split", "size", "n_texts", "digest")}
        if "ids" in source:
            texts_kept = np.concatenate([np.zeros(0, np.int64), *(
                np.arange(text_starts[item], text_starts[item + 1]) for item in kept.tolist())])
            arrays |= {name: source[name][texts_kept] for name in ("ids", "scores")}
        lines = source.blob("provenance").split(b"\n")
        write_unit(target, arrays, {"provenance": b"".join(lines[item] + b"\n" for item in kept.tolist())},
                   {"source": source.meta["source"], "check": check.state()})

    def _check(self, check: Check, texts: list[str], ids: npt.NDArray[Any], counts: npt.NDArray[np.int64],
               chosen: npt.NDArray[np.bool_], source: Unit) -> None:
        """Decode the chosen texts again. Raises PretrainError where one is lost that must not be."""
        if check.unknown_id is not None:
            check.unknown += int(np.count_nonzero(ids == check.unknown_id))
        ends = np.cumsum(counts)
        for text in np.flatnonzero(chosen).tolist():
            end = int(ends[text]) - (self.eos is not None)
            again = self.tokenizer.decode(ids[int(ends[text]) - int(counts[text]):end].tolist(),
                                          skip_special_tokens=False)
            check.texts += 1
            check.exact += again == texts[text]
            if self.exact and again != texts[text]:
                raise PretrainError(f"{source.path.name}: the tokenizer does not give back a text it encoded: "
                                    f"{texts[text][:60]!r} became {again[:60]!r}")


@dataclass(slots=True)
class Check:
    """What decoding again found."""

    unknown_id: int | None
    texts: int = 0
    exact: int = 0
    unknown: int = 0
    """Unknown tokens in everything that was encoded."""

    def state(self) -> dict[str, int]:
        """Plain values."""
        return {"texts": self.texts, "exact": self.exact, "unknown_tokens": self.unknown}


def _unknown_id(tokenizer: Tokenizer) -> int | None:
    model = json.loads(tokenizer.to_str())["model"]
    if isinstance(model.get("unk_id"), int):
        return int(model["unk_id"])
    token = model.get("unk_token")
    found: int | None = None if token is None else tokenizer.token_to_id(token)
    return found


def encoded_units(corpus: Corpus, folder: Path) -> Iterator[Unit]:
    """The units of tokens of all units, in order."""
    for path in corpus.units:
        yield Unit(folder / path.name)
