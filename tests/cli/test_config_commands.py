import json
import tarfile

import pytest
from typer.testing import CliRunner

from pretrain.cli.bundle import redact, write_bundle
from pretrain.cli.config import app as config_app
from pretrain.cli.main import app
from pretrain.config.load import load_run_config
from pretrain.config.presets import list_presets


def run(*arguments):
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_show_prints_a_config_that_loads_to_the_same(tmp_path):
    path = tmp_path / "again.yaml"
    path.write_text(run("config", "show", "--preset", "demo", "--set", "optim.lr=1e-4"))
    assert load_run_config(path).config == load_run_config("demo", ["optim.lr=1e-4"]).config
    shown = json.loads(run("config", "show", "demo", "--json", "--set", "seed=9"))
    assert shown["config"]["seed"] == 9
    assert shown["origins"]["seed"] == "--set"
    assert shown["origins"]["model.hidden_size"] == "configs/presets/demo.yaml"


def test_diff_names_what_differs_and_nothing_else(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: demo\noptim: {lr: 0.5}\n")
    assert run("config", "diff", "demo", str(path)) == "optim.lr: 0.002 -> 0.5\n"
    assert json.loads(run("config", "diff", "demo", str(path), "--json")) == [
        {"key": "optim.lr", "left": 0.002, "right": 0.5}]
    assert run("config", "diff", "demo", "demo") == "no difference\n"


def test_schema_goes_to_a_file(tmp_path):
    CliRunner().invoke(config_app, ["schema", "-o", str(tmp_path / "s.json")], catch_exceptions=False)
    assert json.loads((tmp_path / "s.json").read_text())["$defs"]["OptimConfig"]


def test_presets_are_listed_with_their_exact_counts():
    rows = {row["preset"]: row for row in json.loads(run("presets", "list", "--json"))}
    assert sorted(rows) == list_presets()
    table = run("presets", "list")
    for name, row in rows.items():
        count = load_run_config(name).config.model.parameter_count()
        assert (row["parameters"], row["trainable"]) == (count.total, count.trainable)
        assert f"{count.total:,}" in next(line for line in table.splitlines() if line.startswith(name + " "))
    assert f"# parameters: {rows['demo']['parameters']:,}" in run("presets", "show", "demo")


def test_estimate_agrees_with_itself():
    figures = json.loads(run("estimate", "--preset", "baseline-1b", "--nodes", "2", "--gpus-per-node", "8", "--memory",
                             "80", "--tokens-per-second", "1e5", "--json"))
    assert figures["world_size"] == 16
    assert figures["device"] == "cuda"
    assert figures["tokens"] == figures["steps"] * figures["tokens_per_step"]
    assert figures["hours"] == pytest.approx(figures["tokens"] / 1e5 / 3600)
    peak = figures["memory"]["phases"][figures["memory"]["peak_phase"]]
    assert figures["memory"]["device_bytes"] == sum(peak.values())
    assert figures["largest_micro_batch_size"] >= figures["micro_batch_size"]


def test_estimate_of_pairs_without_their_data_takes_the_number_of_samples():
    figures = json.loads(run("estimate", "--preset", "spectra-m600", "--epoch-samples", "98000", "--json"))
    assert figures["steps"] == 4593 and figures["tokens_per_step"] == 64 * 3 * 192
    assert figures["model"]["claimed_parameters"] == 600_000_000
    text = run("estimate", "--preset", "spectra-m600", "--epoch-samples", "98000")
    assert "warning     size M600 claims 600,000,000 parameters, the model has 719,202,800 (+19.9%)" in text
    assert "98,000 samples (--epoch-samples)" in text


def test_a_dry_run_shows_the_plan_and_touches_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    output = run("train", "--preset", "demo", "--dry-run", "--set", "train.length=1M tokens")
    assert list(tmp_path.iterdir()) == []
    assert "length: 1000000 tokens" in output
    assert "# --set" in output
    count = load_run_config("demo").config.model.parameter_count().total
    for expected in (f"{count:,} ({count:,} trainable)", "244 of 4,096 tokens", "memory a rank", "Adam moments"):
        assert expected in output


def test_doctor_reports_each_stage_and_preset():
    findings = json.loads(run("doctor", "--json"))
    topics = {finding["topic"] for finding in findings}
    assert {f"precision, ZeRO-{stage}" for stage in range(4)} <= topics
    assert {f"preset {name}" for name in list_presets()} <= topics
    assert {finding["state"] for finding in findings} <= {"ok", "note", "problem"}
    assert all("\n" not in finding["text"] for finding in findings)


@pytest.fixture
def a_run(tmp_path):
    folder = tmp_path / "runs" / "mine"
    (folder / "checkpoints" / "step-5.f1").mkdir(parents=True)
    (folder / "checkpoints" / "step-5.f1" / "weights.safetensors").write_bytes(b"\0" * 1000)
    (folder / "config.yaml").write_text("name: mine\n")
    (folder / "environment.json").write_text('{"command": ["pretrain", "--token=abcdefgh"]}')
    (folder / "status.json").write_text("{}")
    (folder / "train.log").write_text("".join(f"line {i}\n" for i in range(2000)) + "key s3cr3t-value hf_" + "a" * 30)
    (folder / "metrics.jsonl").write_text("{}\n" * 3000)
    return folder


def test_a_bundle_holds_what_a_report_needs_and_neither_weights_nor_secrets(a_run, tmp_path, monkeypatch):
    monkeypatch.setenv("MY_API_KEY", "s3cr3t-value")
    output = tmp_path / "b.tar.gz"
    write_bundle(a_run, output, "all well")
    with tarfile.open(output) as tar:
        content = {name.removeprefix("mine/"): tar.extractfile(name).read().decode() for name in tar.getnames()}
    assert set(content) == {"doctor.txt", "config.yaml", "environment.json", "status.json", "train.log",
                            "metrics.jsonl", "files.json"}
    assert content["doctor.txt"] == "all well\n"
    assert len(content["train.log"].splitlines()) == 500
    assert len(content["metrics.jsonl"].splitlines()) == 1000
    assert json.loads(content["files.json"])["checkpoints/step-5.f1/weights.safetensors"] == 1000
    everything = "".join(content.values())
    for secret in ("s3cr3t-value", "hf_aaaa", "abcdefgh", "\0"):
        assert secret not in everything


@pytest.mark.parametrize(("text", "secret"), [
    ("push to https://bob:hunter2@example.org/x", "hunter2"), ("AKIA" + "A" * 16, "AKIAA"),
    ("https://example.org/?token=12345&x=1", "12345"), ("wandb login pass-word-1", "pass-word-1"),
    ("ghp_" + "b" * 36, "ghp_b")])
def test_what_looks_like_a_secret_is_removed(text, secret):
    cleaned = redact(f"before {text} after", {"WANDB_API_KEY": "pass-word-1", "HOME": "before"})
    assert secret not in cleaned
    assert cleaned.startswith("before ")
    assert cleaned.endswith(" after")
