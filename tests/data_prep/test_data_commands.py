"""`pretrain prep` and `pretrain data`: each fault by name and code, what the commands print."""

import json
import shutil
import sys

import numpy as np
import pytest

from data_prep.manifest import Manifest
from pretrain.cli.main import main


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["pretrain", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err
    return call


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


def flip(path, offset):
    content = bytearray(path.read_bytes())
    content[offset] ^= 4
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-512])


def foreign_manifest(folder):
    stated = json.loads((folder / "manifest.json").read_text())
    stated["splits"]["train"]["table_sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(stated))


def other_tokenizer(folder):
    stated = json.loads((folder / "tokenizer.json").read_text())
    stated["model"]["merges"] = stated["model"]["merges"][:-1]
    (folder / "tokenizer.json").write_text(json.dumps(stated))


FAULTS = {
    "flipped byte in a tar": (lambda d: flip(d / "train-000001.tar", 5000), ["train-000001.tar: SHA-256", "changed"]),
    "flipped byte in an index": (lambda d: flip(d / "train-000001.idx", 150), ["train-000001.idx: rows"]),
    "flipped byte in a table": (lambda d: flip(d / "val.shards.bin", 3), ["val.shards.bin: SHA-256"]),
    "truncated tar": (lambda d: cut(d / "train-000002.tar"), ["train-000002.tar", "truncated"]),
    "truncated index": (lambda d: cut(d / "test-000000.idx"), ["test-000000.idx", "truncated"]),
    "missing shard": (lambda d: (d / "train-000003.tar").unlink(), ["train-000003.tar: missing"]),
    "missing index": (lambda d: (d / "train-000003.idx").unlink(), ["train-000003.idx: missing"]),
    "missing table": (lambda d: (d / "train.shards.bin").unlink(), ["train.shards.bin: missing"]),
    "shard of another split": (lambda d: shutil.copy(d / "val-000000.tar", d / "train-000000.tar"),
                               ["train-000000.tar"]),
    "foreign manifest": (foreign_manifest, ["train.shards.bin: SHA-256", "foreign manifest"]),
    "wrong tokenizer": (other_tokenizer, ["tokenizer.json: SHA-256", "another tokenizer"]),
    "missing tokenizer": (lambda d: (d / "tokenizer.json").unlink(), ["tokenizer.json: missing"]),
    "wrong token bytes": (lambda d: flip(d / "token_bytes.npy", 900), ["token_bytes.npy"]),
    "missing token bytes": (lambda d: (d / "token_bytes.npy").unlink(), ["token_bytes.npy"]),
    "torn manifest": (lambda d: cut(d / "manifest.json"), ["manifest.json: not JSON"]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_verify_names_the_file_and_leaves_with_3(copy, run, fault):
    harm, words = FAULTS[fault]
    harm(copy)
    code, out, err = run("data", "verify", copy)
    assert code == 3
    for word in words:
        assert word in out + err
    assert "Traceback" not in err


def test_verify_names_every_fault_once(copy, run):
    flip(copy / "train-000001.tar", 5000)
    cut(copy / "train-000002.tar")
    (copy / "val-000000.tar").unlink()
    other_tokenizer(copy)
    code, out, err = run("data", "verify", copy)
    assert code == 3
    assert sorted(line.split(":")[0].rsplit("/", 1)[1] for line in out.splitlines()) == [
        "tokenizer.json", "train-000001.tar", "train-000002.tar", "val-000000.tar"]
    assert "4 faults found" in err


def test_a_sound_dataset_is_called_sound_and_a_sample_hashes_its_share(dataset, run):
    shards = sum(Manifest.load(dataset).split(s).n_shards for s in ("train", "val", "test"))
    assert shards > 10
    code, out, _ = run("data", "verify", dataset)
    assert code == 0 and f"sound; {shards} shards hashed" in out
    code, out, _ = run("data", "verify", dataset, "--sample", "0.5")
    hashed = int(out.split("sound; ")[1].split()[0])
    assert code == 0 and shards / 2 <= hashed <= shards / 2 + 3


def test_verify_of_no_dataset_is_the_users_error(tmp_path, run):
    code, _, err = run("data", "verify", tmp_path)
    assert code == 2 and "no dataset here" in err


def test_peek_shows_text_and_provenance_and_steers_no_terminal(make_config, tmp_path, run):
    (tmp_path / "texts").mkdir()
    for i in range(5):
        (tmp_path / "texts" / f"{i}.txt").write_text(f"note {i} \x1b[31mred\x07 naïve\n")
    config = tmp_path / "config.yaml"
    config.write_text(f"out: {tmp_path / 'd'}\nsources:\n- {{kind: text, name: notes, path: {tmp_path / 'texts'}}}\n"
                      "splits: {}\ntokenizer: {vocab_size: 300}\n")
    code, out, _ = run("prep", config, "--workers", "1", "--set", "block_tokens=64")
    assert code == 0 and "notes: 5 kept" in out and "train: 5 documents" in out
    assert Manifest.load(tmp_path / "d").block_tokens == 64
    code, out, _ = run("prep", config, "--set", "block_tokens=64")
    assert code == 0 and "nothing to do" in out
    code, out, _ = run("data", "peek", tmp_path / "d", "--n", "2", "--offset", "3")
    assert code == 0
    assert '"path": "3.txt"' in out and "note 3" in out and "note 4" in out and "note 2" not in out
    assert "naïve" in out and r"\x1b[31mred\x07" in out and "\x1b" not in out and "<|endoftext|>" in out
    code, _, err = run("data", "peek", tmp_path / "d", "--offset", "5")
    assert code == 2 and "5 documents" in err
    code, _, err = run("data", "peek", tmp_path / "d", "--split", "trian")
    assert code == 2 and 'did you mean "train"' in err


def test_stats_print_what_json_says(dataset, run):
    code, out, _ = run("data", "stats", dataset, "--json")
    stated = json.loads(out)
    assert code == 0 and stated["fingerprint"] == Manifest.load(dataset).fingerprint
    train = stated["splits"]["train"]
    assert train["bytes_per_token"] == train["bytes"] / train["tokens"]
    assert np.sum(train["histogram"]) == train["documents"]
    code, out, _ = run("data", "stats", dataset)
    assert code == 0 and f"train: {train['documents']} documents, {train['tokens']:,} tokens" in out


@pytest.mark.parametrize("words, message", [
    (["--preset", "stdlb"], 'did you mean "stdlib"'), ([], "give a YAML file or --preset NAME"),
    (["--preset", "stdlib", "--set", "tokenizer.vocab_sze=9"], 'did you mean "vocab_size"'),
    (["--preset", "stdlib", "--set", "sources.0.max_byte=9"], 'did you mean "max_bytes"')])
def test_prep_tells_the_right_name(run, words, message):
    code, _, err = run("prep", *words)
    assert code == 2 and message in err
