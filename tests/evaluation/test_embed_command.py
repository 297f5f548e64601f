"""`pretrain embed` and the tasks of encoders on a small BERT folder as transformers writes it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import BertConfig, BertModel
from typer.testing import CliRunner

from evaluation import embedding_eval
from evaluation.embed import read_texts
from evaluation.embedding_eval import Encoder, evaluate_retrieval, evaluate_sts
from evaluation.offline import Request
from evaluation.tables import vectors_table
from evaluation.target import open_target
from pretrain.cli.main import app
from pretrain.config.load import load_run_config
from pretrain.errors import UserError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(60))]
TEXTS = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10 w11 w12 w13", "unknown w2"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random BERT of 64 positions and its tokenizer."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
                         intermediate_size=64, max_position_embeddings=64)).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def by_hand(folder: Path, text: str) -> np.ndarray:
    """Mean of the states of one text, alone and without padding, at length 1."""
    ids = [2, *(WORDS.index(word) if word in WORDS else 1 for word in text.split()), 3]
    with torch.no_grad():
        states = BertModel.from_pretrained(folder)(torch.tensor([ids])).last_hidden_state
    return torch.nn.functional.normalize(states.mean(1), dim=1)[0].numpy()


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".parquet", ".jsonl"])
def test_vectors_in_every_format_are_those_of_each_text_alone(bert: Path, suffix: str, tmp_path: Path) -> None:
    out = tmp_path / f"v{suffix}"
    words = [word for text in TEXTS for word in ("--texts", text)]
    found = CliRunner().invoke(app, ["embed", str(bert), *words, "--out", str(out), "--batch-size", "3"])
    assert found.exit_code == 0, found.output
    assert f"{out}: 4 x 32 (mean), lengths 1.0000 to 1.0000" in found.output
    if suffix == ".npy":
        vectors = np.load(out)
    elif suffix == ".npz":
        vectors = np.load(out)["vectors"]
    elif suffix == ".jsonl":
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["text"] for row in rows] == TEXTS
        vectors = np.array([row["vector"] for row in rows])
    else:
        import pyarrow.parquet
        vectors = np.array(pyarrow.parquet.read_table(out)["vector"].to_pylist())
    for text, vector in zip(TEXTS, vectors, strict=True):
        assert vector == pytest.approx(by_hand(bert, text), abs=1e-6)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize(("arguments", "told"), [
    (["--texts", "a", "--out", "v.txt"], "must end in .npy"),
    ([], "give --texts or --file"),
    (["--texts", "a", "--head", "means"], 'head "means"'),
    (["--texts", "a", "--dim", "33"], "have 32 coordinates"),
    (["--texts", "a", "--max-length", "65"], "takes 64 tokens"),
    (["--file", "nowhere.txt"], "nowhere.txt: there is no such file")])
def test_what_cannot_be_embedded_is_told_in_one_line(bert: Path, arguments: list[str], told: str) -> None:
    found = CliRunner().invoke(app, ["embed", str(bert), *arguments])
    assert isinstance(found.exception, UserError)
    assert told in str(found.exception)


def test_texts_are_read_from_lines_and_columns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\n")
    (tmp_path / "d.tsv").write_text('id\ttext\n1\tone\n2\ttwo\n')
    (tmp_path / "b.csv").write_text('id,text\n1,"one"\n2,two\n')
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    for name in ("a.txt", "b.csv", "c.jsonl", "d.tsv"):
        assert read_texts(tmp_path / name, "text") == ["one", "two"]
    with pytest.raises(UserError, match=r'b\.csv:2: has no text in "body"; it has id, text'):
        read_texts(tmp_path / "b.csv", "body")


def test_a_text_is_neither_lost_nor_made_up(tmp_path: Path) -> None:
    """Vector i belongs to line i: a quote in a .tsv is a character, a long field a field, nothing is passed over."""
    datasets = pytest.importorskip("datasets")
    (tmp_path / "q.tsv").write_text('text\n"unclosed\nsecond\nthird"\n')
    assert read_texts(tmp_path / "q.tsv", "text") == ['"unclosed', "second", 'third"']
    (tmp_path / "long.csv").write_text("text\n" + "x" * 200_000 + "\n")
    assert len(read_texts(tmp_path / "long.csv", "text")[0]) == 200_000
    datasets.Dataset.from_dict({"text": ["one", None]}).to_parquet(tmp_path / "null.parquet")
    wrong: dict[str, tuple[bytes, str]] = {
        "blank.txt": (b"one\n\ntwo\n", r"blank\.txt:2: is empty"),
        "bytes.txt": (b"one\n\xff\xfe\n", r"bytes\.txt: cannot be read"),
        "broken.jsonl": (b'{"text": "one"}\n{"text": \n', r"broken\.jsonl:2: no JSON"),
        "open.csv": (b'text\n"one\ntwo\n', r"open\.csv:3: unexpected end"),
        "short.csv": (b"id,text\n1,one\n2\n", r'short\.csv:3: has no text in "text"'),
        "cut.jsonl.gz": (b"\x1f\x8b\x08\x00", r"cut\.jsonl\.gz: cannot be read"),
        "null.parquet": ((tmp_path / "null.parquet").read_bytes(), r"null\.parquet, row 1: has no text")}
    for name, (content, told) in wrong.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=told):
            read_texts(tmp_path / name, "text")


def test_sts_has_a_row_a_head_and_its_results_name_the_data(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "pairs.csv").write_text("w1 w2,w1 w2,5\nw1 w2,w1 w3,3\nw4 w5,w9 w20 w30,1\nw7,w50 w51 w52,0\n")
    results = evaluate_sts(open_target(str(bert)), Request(data=tmp_path / "pairs.csv", heads=("mean", "cls:8")), ["x"])
    assert set(results.metrics) == {f"sts/{v}/{f}" for v in ("mean", "cls:8") for f in ("spearman", "pearson")}
    assert results.dataset["pairs"] == 4


def test_retrieval_in_a_beir_folder_stands_beside_bm25_and_a_reference(
        bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_eval, "minilm_folder", lambda: bert)
    (tmp_path / "qrels").mkdir()
    passages = [f"w{i} w{i + 1} w{i + 2}" for i in range(40)]
    (tmp_path / "corpus.jsonl").write_text("".join(
        json.dumps({"_id": f"d{i}", "text": text}) + "\n" for i, text in enumerate(passages)))
    (tmp_path / "queries.jsonl").write_text("".join(
        json.dumps({"_id": f"q{i}", "text": passages[i]}) + "\n" for i in range(10)))
    (tmp_path / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n" + "".join(
        f"q{i}\td{i}\t1\n" for i in range(10)))
    results = evaluate_retrieval(open_target(str(bert)), Request(data=tmp_path, baselines=True), ["x"])
    assert results.metrics["retrieval/mean/recall@1"].value == 1.0  # the very same text
    assert results.metrics["retrieval/BM25/ndcg@10"].value == 1.0
    own, theirs = (results.metrics[f"retrieval/{name}/ndcg@10"] for name in ("mean", "all-MiniLM-L6-v2"))
    assert own == theirs, "here the reference is the model itself"
    assert results.details["max_length_of_references"] == {"all-MiniLM-L6-v2": 64}
    counted = f", {results.dataset['queries']} queries, {results.dataset['passages']} passages, fp32"
    assert str(vectors_table(results).title).endswith(counted)
    assert (results.dataset["queries"], results.dataset["passages"]) == (10, 40)


@pytest.mark.parametrize(("init_from", "trunk", "rows"), [
    (None, "scratch", {"untrained": []}),
    ("runs/first", "scratch", {"untrained": ["train.init_from=null"], "before_this_run": []}),
    ("runs/first", "runs/trunk", {"untrained": ["train.init_from=null", "model.trunk_init=scratch"],
                                  "before_this_run": []})])
def test_a_run_that_began_with_weights_stands_beside_a_model_without_any(
        init_from: str | None, trunk: str, rows: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding_eval, "open_target", lambda text, **given: (text, given["sets"]))
    monkeypatch.setattr(embedding_eval.Encoder, "of", lambda target, **_: target)
    monkeypatch.setattr(embedding_eval, "minilm_folder", lambda: None)
    config = SimpleNamespace(train=SimpleNamespace(init_from=init_from), model=SimpleNamespace(trunk_init=trunk))
    run = SimpleNamespace(config=config, run_folder=SimpleNamespace(config_file="file"), dtype="fp32", device=None)
    found = embedding_eval._references(run, Request(baselines=True))  # type: ignore[arg-type]
    assert found == [(name, ("file", sets)) for name, sets in rows.items()]
    without = load_run_config("spectra-tiny", rows["untrained"]).config
    assert without.train.init_from is None and without.model.trunk_init == "scratch"  # type: ignore[union-attr]


def test_a_language_model_gives_no_vectors(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=10, n_positions=8, bos_token_id=0,
                               eos_token_id=0)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a language model"):
        Encoder.of(open_target(str(tmp_path)))


@pytest.mark.slow
@pytest.mark.launch
def test_two_processes_give_the_vectors_of_one(bert: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("".join(f"w{i} w{(7 * i) % 60}" + " w3" * (i % 9) + "\n" for i in range(60)))
    found = []
    for nproc in ("1", "2"):
        out = tmp_path / f"v{nproc}.npy"
        done = subprocess.run([sys.executable, "-P", "-m", "pretrain.cli.main", "embed", str(bert), "--file",
                               str(tmp_path / "texts.txt"), "--out", str(out), "--nproc", nproc, "--batch-size", "7"],
                              capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(str(out)) == 1
        found.append(np.load(out))
    assert found[0] == pytest.approx(found[1], abs=1e-6)
