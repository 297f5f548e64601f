"""Launches: one process start, many cases. Each case is a function of (world, folder) whose result is plain JSON."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pretrain.engine.launcher import _listen
from pretrain.engine.ranks import LISTEN_FD

ROOT = Path(__file__).resolve().parents[2]
Case = Callable[..., Any]


def launch_cases(module: str, nproc: int, folder: Path, timeout_s: float = 600.0) -> dict[str, Any]:
    """Run `module` as `nproc` ranks. Returns rank 0's results by case name; a case that failed holds {"error": ...}."""
    listener = _listen(None)
    environment = dict(os.environ, OMP_NUM_THREADS="1", MASTER_ADDR="127.0.0.1", WORLD_SIZE=str(nproc),
                       MASTER_PORT=str(listener.getsockname()[1]), PYTHONPATH=str(ROOT), TOKENIZERS_PARALLELISM="false")
    folder.mkdir(parents=True, exist_ok=True)
    ranks = []
    for rank in range(nproc):
        own = dict(environment, RANK=str(rank), LOCAL_RANK=str(rank))
        if rank == 0:
            own[LISTEN_FD] = str(listener.fileno())
        log = open(folder / f"rank-{rank}.log", "w")  # noqa: SIM115
        ranks.append(subprocess.Popen([sys.executable, "-m", module, str(folder)], env=own, stdout=log, stderr=log,
                                      pass_fds=(listener.fileno(),) if rank == 0 else (), cwd=ROOT))
    deadline = time.monotonic() + timeout_s
    try:
        for rank in ranks:
            rank.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        pass
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
                rank.wait()
        listener.close()
    results = folder / "results.json"
    if not results.exists():
        logs = "\n".join((folder / f"rank-{r}.log").read_text()[-3000:] for r in range(nproc))
        raise AssertionError(f"{module} left no results (codes {[r.returncode for r in ranks]}):\n{logs}")
    found: dict[str, Any] = json.loads(results.read_text())
    return found


def case(results: dict[str, Any], name: str) -> Any:
    """A case's result; fails with the traceback of the rank where the case failed."""
    assert name in results, f"{name} was not reached: an earlier case failed"
    value = results[name]
    if isinstance(value, dict) and "error" in value:
        raise AssertionError(value["error"])
    return value


def main(cases: Mapping[str, Case]) -> None:
    """Entry of a rank: run every case in the same order on all ranks, write rank 0's results after each."""
    from pretrain.engine.distributed import join, shutdown
    from pretrain.engine.ranks import rank_environment
    from tests.engine import toy

    toy.register()
    own = rank_environment(os.environ)
    assert own is not None
    world = join(own, timeout_s=120.0)
    folder = Path(sys.argv[1])
    results: dict[str, Any] = {}
    for name, case in cases.items():
        begun = time.process_time()
        try:
            results[name] = case(world, folder / name)
        except Exception:
            traceback.print_exc()
            results[name] = {"error": traceback.format_exc()}
        print(f"{name}: {time.process_time() - begun:.1f} CPU s", flush=True)
        if world.is_main:
            (folder / "results.json").write_text(json.dumps(results))
        if not world.agree("error" not in (results[name] if isinstance(results[name], dict) else {})):
            break  # ranks are out of step: later cases would hang
    shutdown(0, world)
