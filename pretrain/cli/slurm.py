"""`pretrain slurm`: the run of a config as a job of a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from pretrain.cli import slurm_graph
from pretrain.cli.options import (
    ConfigArgument,
    JsonOption,
    LogLevel,
    LogLevelOption,
    PresetOption,
    SetOption,
    load_config,
)

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None,
                  help="The run of a config as a job of a cluster: render, submit, watch, cancel.")
app.command()(slurm_graph.pipeline)
app.command()(slurm_graph.sweep)
app.command("eval-new")(slurm_graph.eval_new)
TARGET = "Run folder, config, preset, or number of a job."


@app.command()
def render(sets: SetOption, config: ConfigArgument = None, preset: PresetOption = None,
           write: Annotated[bool, typer.Option("--write", help="Write it and the config that it reads into the run "
                                               "folder, ready for sbatch, and print its path.")] = False,
           log_level: LogLevelOption = LogLevel.INFO) -> None:
    """Print the sbatch file of a config, for a person to review. Submits nothing."""
    from slurm.script import Job, script_file
    from slurm.script import render as text_of
    from slurm.submit import here, write_job
    loaded = load_config(config, preset, sets)
    if write:
        typer.echo(script_file(write_job(loaded, here()).folder))
    else:
        typer.echo(text_of(Job.of(loaded.config, here())), nl=False)


@app.command()
def submit(sets: SetOption, config: ConfigArgument = None, preset: PresetOption = None,
           again: Annotated[bool, typer.Option("--again", help="Even where a job of this run is queued.")] = False,
           as_json: JsonOption = False, log_level: LogLevelOption = LogLevel.INFO) -> None:
    """Freeze the config, write the sbatch file into the run folder, and hand it to sbatch."""
    from slurm.script import script_file
    from slurm.submit import here
    from slurm.submit import submit as hand_over
    job, numbers = hand_over(load_config(config, preset, sets), here(), again=again)
    if as_json:
        typer.echo(json.dumps({"jobs": numbers, "run": job.root, "script": str(script_file(job.folder))}))
    else:
        chain = f", the first of a chain of {len(numbers)}" if len(numbers) > 1 else ""
        typer.echo(f"submitted job {numbers[0]}{chain}: {script_file(job.folder)}")


@app.command()
def smoke(sets: SetOption, config: ConfigArgument = None, preset: PresetOption = None,
          nodes: Annotated[int, typer.Option(min=1, help="Machines.")] = 2,
          wait: Annotated[float, typer.Option(help="Seconds to wait for the job; 0: submit only.")] = 900.0) -> None:
    """Submit a job of two minutes that tells what works on this cluster, and print what it found.

    CONFIG gives the slurm section (partition, account, env, ...); without one, --set slurm.partition=... does. Ends
    with code 5 where something does not work.
    """
    from pretrain.errors import CheckFailed
    from pretrain.runfolder.layout import RunFolder
    from slurm.history import starts_file
    from slurm.script import Job, frozen_config
    from slurm.smoke import SETS, read_report, report_file
    from slurm.submit import await_end, here
    from slurm.submit import submit as hand_over
    loaded = load_config(config, preset if preset or config else "demo", [*sets, *SETS, f"slurm.nodes={nodes}"])
    folder = Job.of(loaded.config, here()).folder
    for old in (report_file(folder), starts_file(folder)):
        old.unlink(missing_ok=True)
    job, numbers = hand_over(loaded, here(), command=["-m", "slurm.smoke", str(frozen_config(folder))])
    typer.echo(f"submitted job {numbers[0]}: {job.root}")
    if not wait:
        return
    state = await_end(numbers[0], wait)
    checks = read_report(RunFolder(Path(job.root)))
    for check in checks:
        typer.echo(f"{check.state:<8}{check.name:<14}{check.text}")
    names = {check.name for check in checks}
    missing = [name for name in ("machines", "signal", "requeue") if name not in names]
    if state not in ("COMPLETED", "RUNNING") or missing or any(check.state == "problem" for check in checks):
        unknown = f"; nothing is known of {', '.join(missing)}" if missing else ""
        raise CheckFailed(f"job {numbers[0]} is {state}{unknown}; its log: `pretrain slurm logs {job.root}`")


@app.command()
def status(target: Annotated[str, typer.Argument(help=TARGET)], as_json: JsonOption = False) -> None:
    """State, machines, step, loss, tokens/s, restarts and time to go of a run, and why its starts ended."""
    from slurm import client
    from slurm.history import read_history
    from slurm.show import run_folder, view
    jobs = client.squeue()
    folder = run_folder(target, jobs)
    found = view(folder, jobs)
    history = read_history(folder)
    if as_json:
        typer.echo(json.dumps({**found.as_dict(), "history": [
            {"job": start.job, "restart": start.restart, "nodes": start.nodes, "begun": start.begun,
             "ended": start.ended, "from_step": start.step, "to_step": start.saved, "reason": start.reason,
             "action": start.action} for start in history]}, indent=2))
        return
    for name, value in _rows(found.as_dict()):
        typer.echo(f"{name:<10}{value}")
    for number, start in enumerate(history, 1):
        end = f"to step {start.saved}: {start.reason}" if start.ended else "under way"
        typer.echo(f"start {number:<4}job {start.job}.{start.restart} on {start.nodes}, from step {start.step} {end}")


@app.command()
def machines(target: Annotated[str, typer.Argument(help=TARGET)], as_json: JsonOption = False) -> None:
    """Seconds a step by machine, the one that the others wait for first."""
    from dataclasses import asdict

    from slurm import client
    from slurm.history import read_history
    from slurm.show import run_folder
    from slurm.stragglers import by_machine, read_times
    folder = run_folder(target, client.squeue() if target.isdigit() else [])
    history = read_history(folder)
    found = by_machine(read_times(folder), history[-1].step if history else 0)
    if as_json:
        typer.echo(json.dumps([asdict(machine) for machine in found], indent=2))
        return
    for machine in found:
        mark = "  straggler" if machine.straggles else ""
        typer.echo(f"{machine.node:<16}{machine.ranks:3d} ranks  data {machine.data:.3f} s  "
                   f"forward {machine.forward:.3f} s  backward and step {machine.shared:.3f} s  "
                   f"{machine.over_median:.2f} x the median{mark}")
    if not found:
        typer.echo(f"{folder.root}: its ranks have left no times yet")


@app.command("list")
def list_jobs(ended: Annotated[bool, typer.Option("--all", help="Those that ended not long ago, too.")] = False,
              as_json: JsonOption = False) -> None:
    """The runs whose jobs wait or run."""
    from rich.console import Console
    from rich.table import Table

    from pretrain.errors import PretrainError
    from pretrain.runfolder.layout import RunFolder
    from slurm import client
    from slurm.show import view
    jobs = client.squeue()
    found: list[dict[str, Any]] = []
    for root in dict.fromkeys(job.root for job in jobs if job.root is not None and (ended or job.live)):
        try:
            found.append(view(RunFolder.open(Path(root)), jobs).as_dict())
        except PretrainError as error:
            found.append({"name": Path(root).name, "root": root, "state": f"unreadable: {error}"})
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    table = Table("run", "job", "state", "machines", "step", "loss", "tokens/s", "restarts", "to go", box=None,
                  pad_edge=False)
    for row in found:
        shown = dict(_rows(row))
        table.add_row(row["name"], *(shown.get(key, "-") for key in (
            "job", "state", "machines", "step", "loss", "tokens/s", "restarts", "to go")))
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table if found else "no jobs")


@app.command()
def logs(target: Annotated[str, typer.Argument(help=TARGET)],
         rank: Annotated[int | None, typer.Option(min=0, help="Rank; default: the job's script and rank 0.")] = None,
         follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on, over restarts, until the job ends.")
                           ] = False) -> None:
    """Print what a job, or one of its ranks, has written in its newest start."""
    from slurm import client
    from slurm.follow import follow as lines
    from slurm.follow import sources
    from slurm.show import run_folder
    from slurm.submit import live_jobs
    folder = run_folder(target, client.squeue() if target.isdigit() else [])
    for line in lines(lambda: sources(folder, rank), lambda: bool(live_jobs(folder)), forever=follow):
        typer.echo(line)


@app.command()
def cancel(target: Annotated[str, typer.Argument(help=TARGET)],
           now: Annotated[bool, typer.Option("--now", help="End it at once; without, it saves first.")] = False
           ) -> None:
    """End the jobs of a run: what waits is removed, what runs saves at its next step and is not started again."""
    from pretrain.runfolder.control import request
    from slurm import client
    from slurm.show import jobs_of, run_folder
    jobs = client.squeue()
    folder = run_folder(target, jobs)
    live = [job for job in jobs_of(folder, jobs) if job.live]
    ended = [job.id for job in live if now or job.state != "RUNNING"]
    asked = [job.id for job in live if job.id not in ended]
    client.scancel(ended)
    if asked:
        request(folder, "stop")
    for number in ended:
        typer.echo(f"job {number}: cancelled")
    for number in asked:
        typer.echo(f"job {number}: asked to save and stop; --now ends it at once")
    if not live:
        typer.echo(f"{folder.root}: no job of this run waits or runs")


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    """What `status` shows, as text; what is not known is left out."""
    def shape(key: str, layout: str) -> str | None:
        return None if found.get(key) is None else format(found[key], layout)

    total = f" of {found['total_steps']:,}" if found.get("total_steps") else ""
    waiting = f", {found['links_waiting']} more in its chain" if found.get("links_waiting") else ""
    eta = found.get("eta_seconds")
    rows = [("run", found.get("root")), ("job", f"{found['job']}{waiting}" if found.get("job") else None),
            ("state", found.get("state")), ("why", found.get("why")), ("machines", found.get("nodes")),
            ("step", f"{found.get('step', 0):,}{total}"), ("loss", shape("loss", ".4f")),
            ("tokens/s", shape("tokens_per_second", ",.0f")), ("restarts", shape("restarts", "d")),
            ("to go", None if eta is None else f"{eta / 3600:.1f} h" if eta >= 3600 else f"{eta / 60:.0f} min")]
    return [(name, value) for name, value in rows if value]
