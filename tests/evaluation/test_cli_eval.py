"""The commands eval, export and generate: output and exit codes."""

import json
import sys

import pytest

from evaluation import export as export_module
from evaluation.verify_export import largest_difference
from pretrain.cli.main import main


@pytest.fixture
def call(monkeypatch, capsys):
    def command(*words):
        monkeypatch.setattr(sys, "argv", ["pretrain", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err
    return command


def test_eval_prints_pure_json_and_writes_results(run, call):
    folder, _ = run
    code, out, _ = call("eval", folder.root, "--json", "--max-windows", 4, "--baselines")
    stated = json.loads(out)
    assert code == 0 and stated["dataset"]["windows"] == 4 and len(stated["baselines"]) == 6
    written = list(folder.eval_dir.rglob("results.json"))
    assert len(written) == 1 and json.loads(written[0].read_text()) == stated


def test_eval_shows_tables_and_refreshes_an_existing_report(run, call):
    folder, _ = run
    folder.report_file.write_text("old")
    code, out, _ = call("eval", folder.root, "--baselines", "--samples", 1)
    assert code == 0 and "val/bits_per_byte" in out and "bigram, equal tokens" in out and "written: " in out
    assert "bigram, equal tokens" in folder.report_file.read_text()


def test_gates_that_fail_leave_with_5(run, call, monkeypatch):
    folder, _ = run
    code, out, _ = call("eval", folder.root, "--suite", "gates")
    assert code == 0 and "causality" in out and "FAILED" not in out
    text = folder.config_file.read_text()
    folder.config_file.write_text(text.replace("document_masking: true", "document_masking: false"))
    code, out, err = call("eval", folder.root, "--suite", "gates")
    assert code == 5 and "FAILED" in out and "error: " in err and "documents" in err
    assert json.loads((folder.eval_dir / "step-3-gates-fp32" / "results.json").read_text())["passed"] is False


def test_export_and_generate(run, call, monkeypatch):
    folder, _ = run
    monkeypatch.setattr(export_module, "_fresh_process", largest_difference)
    code, out, _ = call("export", folder.root)
    assert code == 0 and "step-3-fp32" in out
    target = folder.export_dir / "step-3-fp32"
    words = ("generate", target, "--prompt", "def return", "--max-new-tokens", 6, "--json", "-n", 2)
    code, out, _ = call(*words)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [r["prompt"] for r in rows] == ["def return"] * 2 and rows[0] != rows[1]
    assert call(*words)[1] == out and call(*words, "--seed", 1)[1] != out
    code, out, _ = call("generate", folder.root, "--prompt", "import", "--max-new-tokens", 3, "--temperature", 0)
    assert code == 0 and out.startswith("import")
    assert call("generate", folder.root, "--max-new-tokens", 3)[0] == 0, "no prompt begins a document"
    assert call("export", folder.root)[0] == 2


def test_bad_input_is_one_line_and_2_and_damage_is_3(run, call, tmp_path):
    folder, _ = run
    for words in (("eval", tmp_path / "none"), ("eval", folder.root, "--step", 9), ("export", tmp_path),
                  ("generate", tmp_path), ("eval", folder.root, "--split", "vol")):
        code, _, err = call(*words)
        assert code == 2 and err.count("\n") == 1 and err.startswith("error: "), words
    state = folder.checkpoints()[0].path / "state.json"
    state.write_text(state.read_text() + " ")
    code, _, err = call("eval", folder.root)
    assert code == 3 and "state.json" in err and err.count("\n") == 1
