"""Exports of encoders: the same vectors in a fresh process and in sentence-transformers; the seed's files."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from data_prep.config import PrepConfig
from data_prep.pipeline import prepare
from evaluation import export as export_module
from evaluation.embedding_eval import Encoder
from evaluation.export import export_run
from evaluation.seed_layout import export_seed_layout
from evaluation.target import open_target
from evaluation.vectors import shorten
from evaluation.verify_export import largest_difference
from pretrain.cli.main import app
from pretrain.config.load import dump_yaml
from pretrain.config.registry import FAMILIES, resolve
from pretrain.config.run import RunConfig
from pretrain.data.open import open_training
from pretrain.errors import CheckFailed, UserError
from pretrain.metrics.sts import cosines, spearman
from pretrain.models.base import BuildContext
from pretrain.objectives.contrastive import Contrastive
from pretrain.runfolder.layout import RunFolder
from pretrain.runfolder.publish import Manifest, write_text_atomic
from pretrain.runfolder.status import Status

SPECTRA = {"family": "spectra", "size": None, "vocab_size": 300, "max_positions": 32, "max_length": 32,
           "hidden_size": 32, "num_layers": 2, "num_heads": 2, "ffn_inner": 48, "spectral_dim": 8,
           "sem_dims": [48, 24], "ent_dims": [24, 12], "anchor_dim": 8, "retrieval_dim": 16, "ranking_dim": 32,
           "anomaly_basis": 2}
BERT = {"family": "baseline", "body": "bert", "vocab_size": 300, "hidden_size": 32, "num_layers": 1, "num_heads": 2,
        "max_position_embeddings": 32}
TEXTS = ["one", "the thing 7 is what 1 asks", "", "longer " * 60, "question 12 about thing 84"]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 pairs with a tokenizer of their own."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = [f"question {i} about thing {i * 7},the thing {i * 7} is what {i} asks\n" for i in range(200)]
    (folder / "rows.csv").write_text("query,positive\n" + "".join(rows))
    prepare(PrepConfig.model_validate({
        "out": str(folder / "set"), "splits": {"val": 0.3},
        "sources": [{"kind": "pair_table", "name": "rows", "path": str(folder / "rows.csv")}],
        "tokenizer": {"vocab_size": 300}, "workers": 1}))
    return folder / "set"


def config_of(pairs: Path, runs: Path, model: dict) -> RunConfig:
    objective = {"name": "contrastive"}
    if model["family"] == "spectra":
        objective["loss_weight_sem"] = [0.6, 0.4]
    return RunConfig.model_validate({
        "name": "encoder", "runs_dir": str(runs), "model": model, "objective": objective,
        "data": {"seq_len": 32, "source": {"kind": "pairs", "path": str(pairs), "query_length": 24,
                                           "passage_length": 32}},
        "batch": {"micro_batch_size": 2, "gradient_accumulation_steps": 8},
        "checkpoint": {"every": "500 micro_steps"}, "eval": {"metric": "val/loss"}})


def checkpoints(config: RunConfig, steps: tuple[int, ...]) -> RunFolder:
    """A run with ZeRO-0 checkpoints, of other weights each, as the engine lays them out."""
    folder = RunFolder.create(Path(config.runs_dir) / config.name)
    write_text_atomic(folder.config_file, dump_yaml(config))
    family = resolve(FAMILIES, config.model.family, "model.family")
    inputs = Contrastive(config.objective).probe_inputs(open_training(config, config.batch.resolve(1)).samples(8))
    for step in steps:
        model = family.build(config.model, BuildContext(seed=step)).eval()
        path = folder.final_checkpoint(step, 1).path
        (path / "deepspeed").mkdir(parents=True)
        torch.save({"module": model.state_dict(), "optimizer": {"state": {}}, "global_steps": step,
                    "pretrain": {"optimizer_parameters": [[name for name, _ in model.named_parameters()]]}},
                   path / "deepspeed" / "mp_rank_00_model_states.pt")
        save_file({}, path / "extra.safetensors")
        save_file({name: value.contiguous() for name, value in inputs.items()}, path / "probe.safetensors")
        (path / "probe.json").write_text(json.dumps({"figures": {}, "controls": {}}))
        (path / "state.json").write_text('{"health": {"bad_steps": {"skipped": []}}}')
        Manifest.collect(path, {}, step=step, k=step, fence=1, world=1, stage=0, dtype="fp32").write(path)
    return folder


@pytest.fixture(params=[SPECTRA, BERT], ids=["spectra", "bert"])
def run(request, pairs: Path, tmp_path: Path) -> RunFolder:
    return checkpoints(config_of(pairs, tmp_path / "runs", request.param), (126,))


@pytest.fixture
def in_process(monkeypatch):
    """The check of the fresh process, without its start."""
    monkeypatch.setattr(export_module, "_fresh_process", largest_difference)


def vectors(folder: Path, head: str | None = None, dim: int | None = None) -> np.ndarray:
    encoder = Encoder.of(open_target(str(folder)))
    found = encoder(encoder.tokens(TEXTS), None if head is None else [head])
    return shorten(next(iter(found.values())), dim).numpy()


def test_sentence_transformers_gives_the_vectors_of_the_run(run: RunFolder, in_process) -> None:
    from sentence_transformers import SentenceTransformer
    done = export_run(str(run.root))
    assert done.compared == "vectors" and done.largest_difference < 1e-6
    model = SentenceTransformer(str(done.folder), trust_remote_code=True, device="cpu")
    want = vectors(run.root)
    assert model.max_seq_length == 32 and model.get_embedding_dimension() == want.shape[1]
    assert model.encode(TEXTS, batch_size=2) == pytest.approx(want, abs=1e-6)
    assert vectors(done.folder) == pytest.approx(want, abs=1e-6)
    assert model.encode(TEXTS, truncate_dim=8, normalize_embeddings=True) == pytest.approx(
        want[:, :8] / np.linalg.norm(want[:, :8], axis=1, keepdims=True), abs=1e-6)
    card = (done.folder / "README.md").read_text()
    assert "library_name: sentence-transformers" in card and "trust_remote_code=True" in card


def test_a_copy_that_sentence_transformers_saved_gives_them_again(run: RunFolder, in_process, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    done = export_run(str(run.root))
    SentenceTransformer(str(done.folder), trust_remote_code=True, device="cpu").save(str(tmp_path / "copy"))
    again = SentenceTransformer(str(tmp_path / "copy"), trust_remote_code=True, device="cpu")
    assert again.encode(TEXTS) == pytest.approx(vectors(run.root), abs=1e-6)


def test_another_head_may_stand_for_a_text(pairs: Path, in_process, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    run = checkpoints(config_of(pairs, tmp_path / "runs", SPECTRA), (3,))
    done = export_run(str(run.root), head="retrieval_16:8")
    model = SentenceTransformer(str(done.folder), trust_remote_code=True, device="cpu")
    assert model.encode(TEXTS) == pytest.approx(vectors(run.root, "retrieval_16", 8), abs=1e-6)
    with pytest.raises(UserError, match="retrieval_16"):
        export_run(str(run.root), head="retrieval_61", overwrite=True)
    with pytest.raises(UserError, match="has 16 coordinates"):
        export_run(str(run.root), head="retrieval_16:17", overwrite=True)


def test_a_damaged_export_of_an_encoder_leaves_nothing(run: RunFolder, in_process, monkeypatch) -> None:
    write = export_module._write_model

    def damage(model, target, out):
        write(model, target, out)
        weights = load_file(out / "model.safetensors")
        next(v for v in weights.values() if v.shape[0] == 300)[::2] *= 1.5  # every other word
        save_file(weights, out / "model.safetensors", {"format": "pt"})
    monkeypatch.setattr(export_module, "_write_model", damage)
    with pytest.raises(CheckFailed, match="vectors that differ"):
        export_run(str(run.root))
    assert list(run.export_dir.iterdir()) == []


def test_the_files_of_the_first_scripts(pairs: Path, tmp_path: Path) -> None:
    run = checkpoints(config_of(pairs, tmp_path / "runs", SPECTRA), (63, 125, 150))
    run.write_pointer("best-val/loss", run.final_checkpoint(63, 1))
    run.write_pointer("latest", run.final_checkpoint(150, 1))
    run.metrics_jsonl.write_text("".join(json.dumps({"fence": 1, "step": s, "val/loss": s / 100}) + "\n"
                                         for s in (63, 125)))
    told = CliRunner().invoke(app, ["export", str(run.root), "--layout", "seed"])
    assert told.exit_code == 0, told.output
    folder = run.export_dir / "seed"
    # 8 micro-steps an update: the 63rd is the first past 500 of them, the 125th ends 1000, the 150th no multiple.
    assert sorted(p.name for p in folder.iterdir()) == ["best_val.pt", "step-1000.pt", "step-1200.pt", "step-500.pt"]
    assert "not written: final.pt (the run has not come to its end)" in told.output
    assert "not written: best_sts.pt (the run selects by eval.metric val/loss)" in told.output
    best = torch.load(folder / "best_val.pt", weights_only=True)
    assert (best["step"], best["micro_step"], best["metrics"]["val/loss"]) == (63, 504, 0.63)
    config = RunConfig.model_validate(json.loads(best["run"]))
    assert json.loads(best["config"]) == json.loads(best["run"])["model"]
    model = resolve(FAMILIES, "spectra", "").build(config.model, BuildContext(seed=9)).eval()
    model.load_state_dict(best["model"])
    ids = torch.randint(0, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    want = open_target(str(run.root), step=63).forward(input_ids=ids).heads
    with torch.no_grad():
        for name, value in model(input_ids=ids).heads.items():
            assert torch.equal(value, want[name]), name
    with pytest.raises(UserError, match="--overwrite"):
        export_seed_layout(str(run.root))
    Status(fence=1).ended(0, "length reached").write(run)
    written = export_seed_layout(str(run.root), overwrite=True)
    assert "final.pt" in written.files and list(written.missing) == ["best_sts.pt"]
    final = torch.load(folder / "final.pt", weights_only=True)
    assert final["step"] == 150


def test_the_seeds_files_are_of_a_run_and_whole(run: RunFolder) -> None:
    with pytest.raises(UserError, match="is no run"):
        export_seed_layout(str(run.final_checkpoint(126, 1).path))
    for words in (["--best"], ["--step", "126"], ["--dtype", "bf16"], ["--head", "mean"]):
        found = CliRunner().invoke(app, ["export", str(run.root), "--layout", "seed", *words])
        assert isinstance(found.exception, UserError)


@pytest.mark.slow
def test_a_fresh_process_proves_the_vectors_and_encodes(pairs: Path, tmp_path: Path) -> None:
    run = checkpoints(config_of(pairs, tmp_path / "runs", SPECTRA), (3,))
    done = export_run(str(run.root))
    code = ("import sys, numpy; from sentence_transformers import SentenceTransformer; "
            "numpy.save(sys.argv[2], SentenceTransformer(sys.argv[1], trust_remote_code=True).encode(sys.argv[3:]))")
    found = subprocess.run([sys.executable, "-P", "-c", code, str(done.folder), str(tmp_path / "v.npy"), *TEXTS],
                           capture_output=True, text=True, timeout=180, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert np.load(tmp_path / "v.npy") == pytest.approx(vectors(run.root), abs=1e-6)


@pytest.mark.slow
def test_a_task_of_mteb_runs_on_an_export_without_a_network(pairs: Path, in_process, tmp_path: Path,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    mteb = pytest.importorskip("mteb")
    from datasets import Dataset
    from mteb.abstasks.sts import AbsTaskSTS
    from mteb.abstasks.task_metadata import TaskMetadata
    from sentence_transformers import SentenceTransformer
    scored = [(f"question {i}", f"the thing {i * 5 % 90}", i * 3 % 6) for i in range(40)]

    class Offline(AbsTaskSTS):
        metadata = TaskMetadata(
            name="Offline", description="pairs in memory", type="STS", main_score="cosine_spearman", category="t2t",
            dataset={"path": "none", "revision": "none"}, reference=None, modalities=["text"], eval_splits=["test"],
            eval_langs=["eng-Latn"], date=None, domains=None, task_subtypes=None, license=None, dialect=None,
            annotations_creators=None, sample_creation=None, bibtex_citation=None)

        def load_data(self, **_: object) -> None:
            columns = dict(zip(("sentence1", "sentence2", "score"), map(list, zip(*scored, strict=True)), strict=True))
            self.dataset, self.data_loaded = {"test": Dataset.from_dict(columns)}, True

    run = checkpoints(config_of(pairs, tmp_path / "runs", SPECTRA), (3,))
    model = SentenceTransformer(str(export_run(str(run.root)).folder), trust_remote_code=True, device="cpu")
    found, = mteb.evaluate(model, tasks=[Offline()], cache=None, show_progress_bar=False).task_results
    encoder = Encoder.of(open_target(str(run.root)))
    sides = [next(iter(encoder(encoder.tokens([row[side] for row in scored]), None).values())) for side in (0, 1)]
    want = spearman(cosines(*(side.numpy() for side in sides)), [row[2] for row in scored])
    assert found.scores["test"][0]["cosine_spearman"] == pytest.approx(want, abs=1e-6)
