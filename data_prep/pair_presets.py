"""Row rules of well-known sets of pairs.

| preset | rows | pair | rows read |
|---|---|---|---|
| allnli | [anchor, entailment, contradiction] or those columns (anchor, positive, negative) | anchor, entailment; the
  contradiction is a negative | all |
| qqp | question1, question2, label (is_duplicate) | only duplicates (label 1) | 200,000 |
| msmarco | query, passages {is_selected, passage_text} | query, first selected passage of more than 20 characters, cut
  at a word's end to 200 | 100,000 |
| wikianswers | [q1, q2] or anchor, positive | both | until 1,000,000 are accepted |
| snli | premise, hypothesis, label (sentence1, sentence2, gold_label) | only entailment | until 100,000 are accepted |
| msmarco_triplets | query, positive, negative | the first row of each of `queries` queries, drawn and put in order by
  keyed hash; the first `validation_queries` make split val, the others train | all |

In all but the last both sides have more than 10 characters and differ, and the same two texts in either order count as
copies. A row that a rule turns down is counted under the rule's name; one with fields of another kind is a bad row.
A label may be a number or its text: 1, 1.0, "1", "1.0" and true are the same.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from data_prep.pair import Found, Pair, Passage, Rejected
from data_prep.reading import SetAside
from data_prep.rows import Row, Where
from data_prep.source_config import PairPresetSource

MIN_CHARACTERS = 11
PASSAGE_CHARACTERS = 200
MIN_PASSAGE_CHARACTERS = 21
_ENTAILMENT, _NEUTRAL = (0, "entailment"), (1, "neutral")
Texts = tuple[str, str, list[str]]
"""Query, positive, negatives."""


def preset_pairs(source: PairPresetSource, number: int,
                 rows: Iterable[tuple[Where, Row | SetAside]]) -> Iterator[Found]:
    """Pairs of a source by the rules of its preset, in the order of its rows (msmarco_triplets: of the draw)."""
    if source.preset == "msmarco_triplets":
        yield from _drawn(source, number, rows)
        return
    rule, max_rows, max_pairs = _RULES[source.preset]
    max_rows = source.max_rows or max_rows
    count = accepted = 0
    for where, row in rows:
        if count == max_rows or (accepted == max_pairs and source.max_documents is None):
            return
        count += 1
        if isinstance(row, SetAside):
            yield row
            continue
        found = _filtered(rule, row, source.legacy_labels, where)
        if isinstance(found, tuple):
            accepted += 1
            query, positive, negatives = found
            yield Pair(Passage(query), Passage(positive), tuple(map(Passage, negatives)), number, where,
                       unordered=True)
        else:
            yield found


def _filtered(rule: Callable[[Row, bool], Texts | str], row: Row, legacy: bool,
              where: Where) -> Texts | Rejected | SetAside:
    try:
        found = rule(row, legacy)
        if not isinstance(found, str):
            _require_texts([found[0], found[1], *found[2]])
    except (KeyError, TypeError, ValueError) as error:
        return SetAside(where, "bad_row", f"{type(error).__name__}: {error}; it has {', '.join(map(str, row))}")
    if isinstance(found, str):
        return Rejected(found)
    query, positive, negatives = found[0].strip(), found[1].strip(), [text.strip() for text in found[2]]
    if min(len(query), len(positive)) < MIN_CHARACTERS:
        return Rejected("short_side")
    if query == positive:
        return Rejected("equal_sides")
    return query, positive, [text for text in negatives if text]


def _allnli(row: Row, legacy: bool) -> Texts | str:
    anchor, positive, negative = _columns(row, ("0", "1", "2"), ("anchor", "positive", "negative"))
    return anchor, positive, [negative]


def _qqp(row: Row, legacy: bool) -> Texts | str:
    label = _label(row["label"] if "label" in row else row["is_duplicate"])
    if label != 1 and not legacy:
        return "no_duplicate"
    return row["question1"], row["question2"], []


def _msmarco(row: Row, legacy: bool) -> Texts | str:
    passages = row["passages"]
    if not isinstance(passages, dict):
        raise TypeError(f"passages is {type(passages).__name__}, not an object of lists")
    marks, texts = passages["is_selected"], passages["passage_text"]
    if not (isinstance(marks, list) and isinstance(texts, list) and len(marks) == len(texts)):
        raise TypeError("is_selected and passage_text are no lists of one length")
    chosen = [text for mark, text in zip(marks, texts, strict=True) if _label(mark) == 1][:1]
    if not chosen:
        return "no_selected_passage"
    _require_texts(chosen)
    if len(chosen[0].strip()) < MIN_PASSAGE_CHARACTERS:
        return "short_passage"
    return row["query"], cut_at_word(chosen[0].strip(), PASSAGE_CHARACTERS), []


def _wikianswers(row: Row, legacy: bool) -> Texts | str:
    anchor, positive = _columns(row, ("0", "1"), ("anchor", "positive"))
    return anchor, positive, []


def _snli(row: Row, legacy: bool) -> Texts | str:
    label = _label(row["label"] if "label" in row else row["gold_label"])
    if label not in (*_ENTAILMENT, *(_NEUTRAL if legacy else ())):
        return "no_entailment"
    premise, hypothesis = _columns(row, ("premise", "hypothesis"), ("sentence1", "sentence2"))
    return premise, hypothesis, []


_RULES: dict[str, tuple[Callable[[Row, bool], Texts | str], int | None, int | None]] = {
    "allnli": (_allnli, None, None), "qqp": (_qqp, 200_000, None), "msmarco": (_msmarco, 100_000, None),
    "wikianswers": (_wikianswers, None, 1_000_000), "snli": (_snli, None, 100_000)}
"""Preset -> rule, rows read at most, pairs accepted at most."""


def _columns(row: Row, *choices: tuple[str, ...]) -> list[str]:
    """The texts of the first choice of columns that a row has. Raises KeyError, or TypeError for what is no text."""
    names = next((names for names in choices if all(name in row for name in names)), choices[-1])
    values = [row[name] for name in names]
    _require_texts(values)
    return values


def _require_texts(values: list[Any]) -> None:
    """Raise TypeError where a value is no text."""
    other = next((value for value in values if not isinstance(value, str)), "")
    if not isinstance(other, str):
        raise TypeError(f"a field is {type(other).__name__}, not text")


def _label(value: Any) -> Any:
    """A label as a number where it is one: "1", "1.0" and true are 1. Raises TypeError for what is no label."""
    if not isinstance(value, str | int | float) or value != value:
        raise TypeError(f"a label is {'nan' if isinstance(value, float) else type(value).__name__}")
    if not isinstance(value, str):
        return value
    text = value.strip().lower()
    try:
        return {"true": 1, "false": 0}[text] if text in ("true", "false") else float(text)
    except ValueError:
        return text


def cut_at_word(text: str, length: int) -> str:
    """At most `length` characters, ending with a whole word where there is one."""
    if len(text) <= length:
        return text
    cut = text[:length + 1].rsplit(None, 1)
    return (cut[0] if len(cut) == 2 else text[:length]).rstrip()


def _drawn(source: PairPresetSource, number: int, rows: Iterable[tuple[Where, Row | SetAside]]) -> Iterator[Found]:
    """One triplet for each of the queries of smallest keyed hash, in the order of the hashes.

    Memory: the rows that are chosen at any time, at most `queries`.
    """
    key = source.seed.to_bytes(8, "little")
    chosen: dict[int, tuple[Where, Texts]] = {}
    heap: list[int] = []
    for count, (where, row) in enumerate(rows):
        if count == source.max_rows:
            break
        if isinstance(row, SetAside):
            yield row
            continue
        try:
            query, positive, negative = _columns(row, ("query", "positive", "negative"), ("0", "1", "2"))
        except (KeyError, TypeError) as error:
            yield SetAside(where, "bad_row", f"{error}; it has {', '.join(map(str, row))}")
            continue
        if not (query.strip() and positive.strip() and negative.strip()):
            yield SetAside(where, "empty_field", "query, positive or negative is nothing but white space")
            continue
        hashed = hashlib.blake2b(query.strip().encode(errors="surrogatepass"), digest_size=16, key=key)
        rank = int.from_bytes(hashed.digest(), "little")
        if rank in chosen or (len(heap) == source.queries and rank > -heap[0]):
            yield Rejected("not_drawn")
            continue
        heapq.heappush(heap, -rank)
        chosen[rank] = (where, (query, positive, [negative]))
        if len(heap) > source.queries:
            del chosen[-heapq.heappop(heap)]
            yield Rejected("not_drawn")
    for place, rank in enumerate(sorted(chosen)):
        where, (query, positive, negatives) = chosen[rank]
        yield Pair(Passage(query), Passage(positive), tuple(map(Passage, negatives)), number, where,
                   split="val" if place < source.validation_queries else "train")
