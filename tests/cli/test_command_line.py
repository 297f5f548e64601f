"""The command itself: help, errors, what it imports."""

import subprocess
import sys

import pytest

from pretrain.cli.main import COMMANDS

HEAVY = ("torch", "transformers", "deepspeed", "webdataset", "datasets", "accelerate", "scipy", "matplotlib")
MOST_MODULES = 400
"""`--help` in under half a second means few imports; the count is steady where a clock is not."""
_PROBE = """
import sys
sys.argv = ["pretrain", *sys.argv[1:]]
from pretrain.cli.main import main
try:
    main()
except SystemExit as leaving:
    code = leaving.code or 0
heavy = [name for name in {heavy!r} if name in sys.modules]
print("\\n#", code, len(sys.modules), ",".join(heavy), file=sys.stderr)
"""


def pretrain(*arguments, cwd=None):
    """(exit code, standard output, standard error, number of modules, heavy modules) of one command line."""
    done = subprocess.run([sys.executable, "-c", _PROBE.format(heavy=HEAVY), *arguments], capture_output=True,
                          text=True, cwd=cwd, timeout=120)
    errors, _, tail = done.stderr.rpartition("\n# ")
    code, modules, heavy = tail.rstrip("\n").split(" ")
    return int(code), done.stdout, errors, int(modules), heavy


@pytest.mark.parametrize("arguments", [
    ("--help",), ("--version",), ("config", "--help"), ("config", "show", "--preset", "demo"), ("config", "schema"),
    ("config", "diff", "demo", "baseline-27m"), ("presets", "list"), ("presets", "show", "demo"),
    ("estimate", "--preset", "demo"), ("train", "--help"), ("train", "--preset", "demo", "--dry-run"),
    ("doctor", "--help"), ("doctor",), ("slurm", "--help"),
    ("slurm", "render", "--preset", "demo", "--set", "slurm={time: 12:00:00}")], ids=" ".join)
def test_commands_that_only_look_import_no_torch(arguments):
    code, output, errors, modules, heavy = pretrain(*arguments)
    assert (code, errors.strip()) == (0, "")
    assert output
    assert heavy == ""
    if "--help" in arguments:
        assert modules < MOST_MODULES


def test_help_lists_every_command_with_its_whole_line():
    _, output, *_ = pretrain("--help")
    words = " ".join(output.split())
    for name, (_, text) in COMMANDS.items():
        assert f"{name} {text}" in words


def test_groups_list_their_commands_and_commands_their_options():
    assert {"show", "schema", "diff"} <= set(pretrain("config", "--help")[1].split())
    words = pretrain("config", "show", "--help")[1]
    for option in ("CONFIG", "--preset", "--set", "--json", "--log-level"):
        assert option in words


@pytest.mark.parametrize(("arguments", "message"), [
    (("trian",), 'no command "trian" (did you mean "train"?)'),
    (("config", "shwo"), "Did you mean 'show'?"),
    (("config", "show"), "error: give a YAML file or --preset NAME"),
    (("config", "show", "a.yaml", "--preset", "demo"), "error: give a YAML file or --preset NAME, not both"),
    (("config", "show", "--preset", "dmo"), 'error: no preset "dmo" (did you mean "demo"?)'),
    (("config", "show", "none.yaml"), "error: none.yaml: no such file"),
    (("config", "show", "--preset", "demo", "--set", "optim.lrr=1"), 'error: --set: optim.lrr: is no key'),
    (("config", "show", "--prest", "demo"), "No such option: --prest"),
    (("estimate", "--preset", "demo", "--mfu", "0.4"), "error: --mfu 0.4: the peak of the device is not known here"),
    (("estimate", "--preset", "demo", "--mfu", "2", "--peak-flops", "1e12"), "error: --mfu 2.0: must be above 0"),
    (("estimate", "--preset", "demo", "--peak-flops", "1e12"), "error: give either --tokens-per-second, or --mfu"),
    (("estimate", "--preset", "demo", "--gpu", "H101"), 'error: --gpu "H101" is not known (did you mean "H100'),
    (("estimate", "--preset", "demo", "--gpu", "H100", "--tokens-per-second", "5"), "error: --gpu H100: gives the"),
    (("train", "--preset", "demo", "--dry-run", "--set", "batch.global_batch_size=24", "--set", "launch.nproc=5"),
     "error: batch.global_batch_size: 24 is not a multiple of 5 ranks; use 20 or 25"),
    (("train", "--preset", "demo", "--dry-run", "--set", "engine.deepspeed={train_batch_size: 3}"),
     "error: --set: engine.deepspeed.train_batch_size: contradicts batch.global_batch_size"),
    (("doctor", "--bundle", "nowhere"), "error: nowhere: no run folder"),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else "")
def test_bad_input_ends_with_one_clear_line_and_code_2(arguments, message, tmp_path):
    code, output, errors, *_ = pretrain(*arguments, cwd=tmp_path)
    assert code == 2
    assert message in errors
    assert "Traceback" not in errors + output
