"""The configs in docs/data.md are run as they stand, on small files in the places that they name."""

import gzip
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

from data_prep.config import PrepConfig
from data_prep.manifest import Manifest
from data_prep.pipeline import prepare

PAGE = Path(__file__).parents[2] / "docs" / "data.md"
EXAMPLES = dict(re.findall(r"```yaml\n# (\S+)\n(.*?)```", PAGE.read_text(), re.DOTALL))
PROSE = "The boats came back to the harbour that evening, and the men of the village were there to meet them"


@pytest.fixture
def corpora(tmp_path) -> Path:
    root = tmp_path / "corpora"
    for folder in ("books", "web", "crawl", "notes", "held-out", "triplets", "nq/qrels", "packages/p", "nli"):
        (root / folder).mkdir(parents=True)
    for i in range(40):
        (root / "books" / f"{i}.txt").write_text(f"{PROSE} {i}.\n" * (1 + i % 3))
        (root / "notes" / f"{i}.md").write_text(f"---\ntitle: {i}\n---\nNote {i}. {PROSE} {'on ' * i}.\n")
        (root / "held-out" / f"{i}.txt").write_text(f"Held out {i}. {PROSE}, with {i} lamps {'lit ' * i}.\n")
    def lines(name, rows, pack=bytes):
        (root / name).write_bytes(pack("".join(json.dumps(row) + "\n" for row in rows).encode()))
    lines("web/a.jsonl", [{"text": f"Page {i}: {PROSE} {'again ' * i}."} for i in range(40)])
    parquet.write_table(pa.table({"text": [f"Row {i}: {PROSE} {i}." for i in range(40)]}), root / "crawl/0.parquet")
    lines("quiz.jsonl", [{"text": "What is the name of the harbour?"}])
    lines("triplets/t.jsonl.gz", [{"query": f"query {i}", "positive": f"answer {i}", "negative": "no"}
                                  for i in range(40)], gzip.compress)
    lines("nq/corpus.jsonl", [{"_id": f"d{i}", "title": "t", "text": f"passage {i}"} for i in range(9)])
    lines("nq/queries.jsonl", [{"_id": f"q{i}", "text": f"question {i}"} for i in range(9)])
    for split, numbers in (("train", range(6)), ("test", range(6, 9))):
        (root / "nq" / "qrels" / f"{split}.tsv").write_text(
            "query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in numbers))
    (root / "packages" / "p" / "m.py").write_text(
        'def f(x):\n    """Add one to the given number."""\n    total = x + 1\n    return [total, total, total]\n')
    lines("nli/AllNLI.jsonl.gz", [[f"a man walks {i}", f"someone walks {i}", f"no one walks {i}"] for i in range(30)],
          gzip.compress)
    (root / "sts.csv").write_text("a man walks 3,nobody is here,1.0\n")
    return root


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_configs_of_the_page_run(name, corpora, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = Tokenizer(models.WordPiece({"[UNK]": 0, "[SEP]": 1, "[PAD]": 2, "query": 3}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["[UNK]", "[SEP]", "[PAD]"])
    tokenizer.save("tokenizer.json")
    stated = yaml.safe_load(EXAMPLES[name].replace("/corpora", str(corpora)))
    if stated["tokenizer"].get("vocab_size", 0) > 1000:
        stated["tokenizer"]["vocab_size"] = 1000
    manifest = prepare(PrepConfig.model_validate(stated | {"workers": 1}))
    assert Manifest.load(stated["out"]).splits["train"].docs > 5
    assert (manifest.folder / "summary.html").is_file()
    if name == "clean-data.yaml":
        assert 0 < manifest.splits["test"].docs < 40  # they are near copies of each other
        assert {"near_duplicate"} <= {r for counts in manifest.provenance["counts"].values() for r in counts}
    if name == "preset-pairs.yaml":
        assert manifest.provenance["counts"]["nli"]["contaminated"]["documents"] == 1


def test_the_page_has_its_examples():
    assert {"my-data.yaml", "my-parquet.yaml", "my-pairs.yaml", "clean-data.yaml", "preset-pairs.yaml"} <= set(EXAMPLES)
