"""The wheel stands alone: it works where neither the source tree is nor the folder's own packages are harmless."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.cli.tiny_run import losses, status, write_config

pytestmark = [pytest.mark.slow, pytest.mark.launch]
ROOT = Path(__file__).resolve().parents[2]
HOSTILE = ("slurm", "evaluation", "data_prep", "pretrain", "benchmarks", "yaml")
OURS = ("pretrain.cli.main", "pretrain.engine.run", "data_prep.pipeline", "evaluation.perplexity")


def done(command: Sequence[str | Path], folder: Path, timeout_s: float = 240) -> str:
    """Standard output of a command that ends well."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout_s)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin` of an environment that has the wheel and our dependencies, and does not know of the source tree."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    done([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, ROOT], folder)
    wheel, = folder.glob("pretrain-*.whl")
    done([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], folder)
    python = folder / "venv/bin/python"
    packages = done([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    # A folder named in a .pth file brings its packages, but not its own .pth files: the editable install stays behind.
    Path(packages, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done([*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], folder)
    return python.parent


@pytest.fixture
def hostile(tmp_path: Path, tiny_dataset: Path) -> Path:
    """A working folder whose packages and presets are not ours."""
    for name in HOSTILE:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f'raise SystemExit("{name} of the working folder was imported")\n')
    (tmp_path / "configs/presets").mkdir(parents=True)
    (tmp_path / "configs/presets/demo.yaml").write_text("not: ours\n")
    (tmp_path / "set").symlink_to(tiny_dataset)
    write_config(tmp_path)
    return tmp_path


def test_every_module_comes_out_of_the_wheel(installed: Path, hostile: Path) -> None:
    code = "import importlib\n" + "\n".join(f"print(importlib.import_module('{name}').__file__)" for name in OURS)
    files = done([installed / "python", "-P", "-c", code], hostile).split()
    assert len(files) == len(OURS)
    for file in files:
        assert Path(file).is_relative_to(installed.parent)


def test_presets_and_configs_are_in_the_wheel(installed: Path, hostile: Path) -> None:
    listed = done([installed / "pretrain", "presets", "list"], hostile)
    for preset in (ROOT / "configs/presets").glob("*.yaml"):
        assert preset.stem in listed
    shown = done([installed / "pretrain", "config", "show", "--preset", "demo"], hostile)
    assert "hidden_size: 192" in shown
    assert "configs/presets/demo.yaml" in shown
    assert list(installed.parent.glob("lib/python*/site-packages/pretrain/_configs/prep/stdlib.yaml"))


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_train_beside_hostile_packages(stage: int, installed: Path, hostile: Path) -> None:
    done([installed / "pretrain", "train", "tiny.yaml", "--nproc", "2", "--set", f"engine.zero_stage={stage}", "--set",
          "train.length=12 steps", "--set", "data.workers=1"], hostile)
    assert list(losses(hostile / "runs/tiny")) == list(range(1, 13))
    assert status(hostile / "runs/tiny").state == "done"
    assert (hostile / "runs/tiny/report.html").exists()
