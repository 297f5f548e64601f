"""Texts to vectors to figures: independent of batches and ranks, against planted answers."""

from __future__ import annotations

import json
import math
import random
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from evaluation.bm25 import bm25_search, words
from evaluation.embedding import Cut, Ranking, collapse, retention, retrieval, sts
from evaluation.embedding_data import ScoredPairs, read_beir, read_scored_pairs
from evaluation.vectors import Alone, Rows, encode, pad, shorten
from pretrain.engine.evaluator import Metric
from pretrain.errors import UserError
from pretrain.metrics.collapse import effective_rank, mean_cosine
from pretrain.models.base import EncoderOutput


class Bag(nn.Module):
    """Mean of token vectors, in two heads."""

    def __init__(self, vocab: int = 50, width: int = 8) -> None:
        super().__init__()
        self.table = nn.Embedding(vocab, width)
        nn.init.normal_(self.table.weight, generator=torch.Generator().manual_seed(0))

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor,
                controls: Mapping[str, float] | None = None) -> EncoderOutput:
        weights = attention_mask.float()[..., None]
        mean = (self.table(input_ids) * weights).sum(1) / weights.sum(1)
        return EncoderOutput(heads={"mean": mean, "half": mean[:, :4]}, default="mean")


@pytest.fixture(scope="module")
def bag() -> Bag:
    return Bag()


def rows(n: int, seed: int = 0) -> list[list[int]]:
    """Rows of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 50, (int(torch.randint(1, 30, (), generator=generator)),), generator=generator).tolist()
            for _ in range(n)]


def test_vectors_do_not_depend_on_the_batch(bag: Bag) -> None:
    texts = rows(37)
    view = Alone(bag, torch.device("cpu"))
    alone = torch.cat([encode(view, [row], pad_id=0)["mean"] for row in texts])
    for size in (1, 5, 64):
        assert torch.allclose(encode(view, texts, pad_id=0, batch_size=size)["mean"], alone, atol=1e-6)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_share_the_work_and_all_have_all_vectors(bag: Bag, world: int) -> None:
    """Ranks as threads: each runs equally many forwards, a rank without a batch too."""
    texts = rows(11)
    forwards = [0] * world
    barrier, parts, found = threading.Barrier(world, timeout=20), {}, {}

    class Rank(Alone):
        def forward(self, *, controls: Mapping[str, float] | None = None, **inputs: Any) -> Any:
            forwards[self.rank] += 1
            return super().forward(**inputs)

        def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
            parts[self.rank] = tensor
            barrier.wait()
            total = torch.stack([parts[rank] for rank in range(world)]).sum(0)
            barrier.wait()
            return total

    def run(rank: int) -> None:
        found[rank] = encode(Rank(bag, torch.device("cpu"), rank, world), texts, pad_id=0, batch_size=2,
                             heads=["mean", "half"])
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    expected = encode(Alone(bag, torch.device("cpu")), texts, pad_id=0)["mean"]
    assert len(set(forwards)) == 1
    for rank in range(world):
        assert torch.allclose(found[rank]["mean"], expected, atol=1e-6)
        assert torch.allclose(found[rank]["half"], expected[:, :4], atol=1e-6)


def test_a_head_that_is_not_there_is_told_with_those_that_are(bag: Bag) -> None:
    with pytest.raises(UserError, match=r'head "men": .*"mean".*half, mean'):
        encode(Alone(bag, torch.device("cpu")), [[1]], pad_id=0, heads=["men"])


def test_short_vectors_have_length_one_and_too_many_coordinates_are_refused() -> None:
    vectors = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(shorten(vectors, 3).norm(dim=1), torch.ones(5))
    assert torch.allclose(shorten(vectors, 3) * vectors[:, :3].norm(dim=1)[:, None], vectors[:, :3], atol=1e-6)
    with pytest.raises(UserError, match="8 coordinates"):
        shorten(vectors, 9)


def test_padding_is_masked_and_a_multiple_of_eight() -> None:
    ids, mask = pad([[1, 2, 3], [4] * 9], 7)
    assert ids.shape == mask.shape == (2, 16)
    assert mask.sum(1).tolist() == [3, 9]
    assert ids[0].tolist() == [1, 2, 3] + [7] * 13


def one_hot(texts: Rows, heads: Sequence[str] | None) -> dict[str, torch.Tensor]:
    """Bags of tokens as vectors: what is alike can be told by hand."""
    found = torch.zeros(len(texts), 50)
    for i, row in enumerate(texts):
        for token in row:
            found[i, token] += 1
    return {name: found for name in heads or ["bag"]}


def test_sts_of_a_perfect_encoder_is_one() -> None:
    letters = lambda texts: [[ord(c) % 50 for c in text] for text in texts]  # noqa: E731
    pairs = ScoredPairs(["abcd"] * 4, ["abcd", "abce", "abef", "efgh"], [5.0, 4.0, 2.0, 0.0], "planted")
    found = sts(one_hot, letters, pairs, (Cut(), Cut("other", 30)))
    assert found["sts/bag/spearman"].value == pytest.approx(1.0)
    assert set(found) == {f"sts/{name}/{figure}" for name in ("bag", "other:30") for figure in ("spearman", "pearson")}


def test_retrieval_finds_what_was_planted_and_only_that() -> None:
    passages = [[i, i + 1, i + 2] for i in range(40)]
    queries = [[i + 1] for i in range(40)]  # in passages i - 1, i and i + 1, which score alike
    exact = retrieval(one_hot, passages, passages, [{i: 1.0} for i in range(40)])
    assert exact["retrieval/bag/recall@1"].value == 1.0
    assert exact["retrieval/bag/ndcg@10"].n == 40
    shared = retrieval(one_hot, queries, passages, [{i: 1.0} for i in range(40)])
    assert shared["retrieval/bag/recall@5"].value == 1.0
    assert shared["retrieval/bag/recall@1"].value < 0.1
    wrong = retrieval(one_hot, passages, passages, [{(i + 20) % 40: 1.0} for i in range(40)])
    assert wrong["retrieval/bag/recall@1"].value == 0.0


def test_a_prefix_is_told_with_the_share_that_it_keeps() -> None:
    values = {"semantic_768": 0.8, "semantic_512": 0.6, "semantic_768:100": 0.4, "anchor_64": 0.5, "bag": 0.5,
              "bag:9": 0.25, "entity_384:9": 0.1, "flat": 0.0, "flat:2": 0.0}
    found = {f"sts/{name}/{figure}": Metric(value, 7, True) for name, value in values.items()
             for figure in ("spearman", "pearson")}
    kept = retention(found, "spearman")
    assert {name: pytest.approx(metric.value) for name, metric in kept.items()} == {
        "sts/semantic_512/retention": 0.75, "sts/semantic_768:100/retention": 0.5, "sts/bag:9/retention": 0.5}
    passages = [[i, i + 1, i + 2] for i in range(40)]
    shown = retrieval(one_hot, passages, passages, [{i: 1.0} for i in range(40)], (Cut("bag"), Cut("bag", 20)))
    whole, part = (shown[f"retrieval/{name}/recall@10"].value for name in ("bag", "bag:20"))
    assert shown["retrieval/bag:20/retention"].value == pytest.approx(part / whole)
    assert "retrieval/bag/retention" not in shown


def test_collapse_tells_a_constant_encoder() -> None:
    texts = [[i] for i in range(40)]
    constant = lambda given, heads: {"flat": torch.ones(len(given), 8)}  # noqa: E731
    assert collapse(constant, texts, texts)["collapse/flat/mean_cosine"].value == pytest.approx(1.0)
    assert collapse(one_hot, texts, texts)["collapse/bag/mean_cosine"].value == pytest.approx(0.0)
    assert collapse(one_hot, texts, texts)["collapse/bag/effective_rank"].value == pytest.approx(39.0)


def test_bm25_weighs_rare_words_and_cuts_identifiers() -> None:
    assert words("getHTTPResponse_v2 naïve x1") == ["get", "http", "response", "v", "2", "naïve", "x", "1"]
    passages = ["def getHTTPResponse(url): return fetch(url)", "return the value of the url", "the the the value"]
    assert bm25_search(["http response", "value"], passages, 1) == [[0], [2]]
    assert bm25_search(["unknown", "value"], passages, 3) == [[], [2, 1]], "what shares no word is not found"
    assert bm25_search(["value"], ["!!", "??"], 3) == [[]]


def by_definition(query: str, passages: list[str], k1: float, b: float) -> np.ndarray:
    """Scores of the passages by Robertson's formula."""
    split = [words(text) for text in passages]
    mean = sum(map(len, split)) / len(split)
    scores = np.zeros(len(split))
    for word in words(query):
        known = sum(word in text for text in split)
        rarity = math.log(1 + (len(split) - known + 0.5) / (known + 0.5))
        counts = np.array([text.count(word) for text in split])
        lengths = np.array([len(text) for text in split])
        scores += rarity * counts / (counts + k1 * (1 - b + b * lengths / mean))
    return scores


def test_bm25_is_robertson_s_with_k1_1_2_and_b_three_quarters() -> None:
    draw = random.Random(0)
    known = [f"{a}{b}" for a in "bcdfgh" for b in "aeiou"]
    passages = [" ".join(draw.choices(known, k=draw.randrange(3, 60))) for _ in range(60)]
    queries = [" ".join(draw.choices(known, k=4)) for _ in range(20)]
    found = bm25_search(queries, passages, len(passages))
    for (k1, b), right in {(1.2, 0.75): True, (0.9, 0.75): False, (1.2, 0.4): False}.items():
        scores = [by_definition(query, passages, k1, b) for query in queries]
        assert [len(ranked) for ranked in found] == [int((each > 0).sum()) for each in scores]
        rises = max(np.diff(each[ranked]).max() for each, ranked in zip(scores, found, strict=True))
        assert bool(rises < 1e-5) is right, (k1, b, rises)


def test_a_query_does_not_find_itself() -> None:
    """As in BEIR, whose sets of duplicates hold the queries among the passages."""
    ranking = Ranking([[0, 1, 2], [1, 0, 2], [2, 1, 0]], [{1: 1.0}, {1: 1.0}, {0: 1.0}])
    assert ranking.without([0, 1, None]).ranked == [[1, 2], [1, 0, 2], [2, 1, 0]]

    def on_an_arc(rows: Rows, heads: Sequence[str] | None) -> dict[str, torch.Tensor]:
        angles = torch.tensor([row[0] ** 2 * 1e-3 for row in rows])  # the one before is nearer than the next
        return {"arc": torch.stack([angles.cos(), angles.sin()], 1)}

    texts = [[i] for i in range(20)]
    before: list[dict[int, float]] = [{i - 1: 1.0} for i in range(1, 20)]
    for own, rank in ((None, 2), (list(range(1, 20)), 1)):
        found = retrieval(on_an_arc, texts[1:], texts, before, own=own)
        assert found["retrieval/arc/mrr@10"].value == 1 / rank


def test_vectors_that_are_no_numbers_are_told_and_not_fatal() -> None:
    vectors = torch.randn(8, 4)
    vectors[3, 2] = float("nan")
    assert math.isnan(effective_rank(vectors)) and math.isnan(mean_cosine(vectors))


@pytest.mark.parametrize(("name", "text"), [
    ("a.csv", '"one, two",three,4.5\nfour,five,0\n'),
    ("b.csv", 'score,sentence1,sentence2\n4.5,"one, two",three\n0,four,five\n'),
    ("c.tsv", "one, two\tthree\t4.5\nfour\tfive\t0\n"),
    ("d.jsonl", '{"sentence1": "one, two", "sentence2": "three", "label": 4.5}\n\n'
                '{"sentence1": "four", "sentence2": "five", "score": 0}\n')])
def test_scored_pairs_of_every_format(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    found = read_scored_pairs(tmp_path / name)
    assert (found.first, found.second, found.scores) == (["one, two", "four"], ["three", "five"], [4.5, 0.0])


def test_scored_pairs_of_tables_of_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"sentence1": ["a", "b"], "sentence2": ["c", "d"], "score": [1.0, 2.0]})
    table.to_parquet(tmp_path / "t.parquet")
    table.save_to_disk(tmp_path / "t")
    for path in (tmp_path / "t.parquet", tmp_path / "t"):
        assert read_scored_pairs(path).scores == [1.0, 2.0]


def test_a_row_without_a_score_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("one,two,1\nthree,four,high\n")
    with pytest.raises(UserError, match=r"a\.csv:2: .*three"):
        read_scored_pairs(tmp_path / "a.csv")
    for wrong in ("one,two,1\nthree,four,nan\n", "one,two,1\nthree,four,inf\n", "one,two,1\nthree,four\n"):
        (tmp_path / "a.csv").write_text(wrong)
        with pytest.raises(UserError, match=r"a\.csv:2: is no row"):
            read_scored_pairs(tmp_path / "a.csv")
    (tmp_path / "a.csv").write_bytes(b"one,two,1\n\xff\xfe,four,2\n")
    with pytest.raises(UserError, match=r"a\.csv: cannot be read"):
        read_scored_pairs(tmp_path / "a.csv")


def test_a_beir_folder_keeps_its_whole_corpus(tmp_path: Path) -> None:
    (tmp_path / "qrels").mkdir()
    lines = [{"_id": f"d{i}", "title": "T", "text": f"text {i}"} for i in range(5)]
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "queries.jsonl").write_text('{"_id": "q1", "text": "first"}\n{"_id": "q2", "text": "second"}\n')
    (tmp_path / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td3\t2\nq2\td4\t0\nq1\td1\t0\n")
    found = read_beir(tmp_path)
    assert (found.queries, found.relevant, len(found.passages)) == (["second"], [{3: 2.0, 4: 0.0}], 5)
    assert found.passages[3] == "T text 3"
    (tmp_path / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td9\t2\n")
    with pytest.raises(UserError, match=r"test\.tsv:2"):
        read_beir(tmp_path)
    (tmp_path / "qrels/test.tsv").write_text("q2\td3\t2\n")
    assert read_beir(tmp_path).relevant == [{3: 2.0}], "without a header no line is lost"
    (tmp_path / "queries.jsonl").write_text('{"_id": "q2", "text": "first"}\n{"_id": "q2", "text": "second"}\n')
    with pytest.raises(UserError, match=r"queries\.jsonl:2: _id 'q2' stands in an earlier line"):
        read_beir(tmp_path)
