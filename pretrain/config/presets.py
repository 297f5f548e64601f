"""Where the configs that come with this project lie: `configs/` of the source tree, `pretrain/_configs` in a wheel."""

from __future__ import annotations

from pathlib import Path

from pretrain.config.suggest import nearest
from pretrain.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]


def configs_dir() -> Path:
    """Folder with `presets/` and `deepspeed/`. Raises UserError where the installation has none."""
    for candidate in (_PACKAGE / "_configs", _PACKAGE.parent / "configs"):
        if (candidate / "presets").is_dir():
            return candidate
    raise UserError(f"no presets beside {_PACKAGE}: the installation is incomplete, install the package again")


def list_presets() -> list[str]:
    """Names of all presets, sorted."""
    return sorted(path.stem for path in (configs_dir() / "presets").glob("*.yaml"))


def preset_path(name: str) -> Path:
    """The file of a preset. Raises UserError with the nearest right name."""
    path = configs_dir() / "presets" / f"{name}.yaml"
    if not path.is_file() or path.parent != configs_dir() / "presets":
        known = list_presets()
        raise UserError(f'no preset "{name}"{nearest(name, known)}; known: {", ".join(known) or "none"}')
    return path


def display_path(path: Path) -> str:
    """How messages and origins name a config file: `configs/...` for ours, relative inside the working folder."""
    path = path.resolve()
    try:
        return (Path("configs") / path.relative_to(configs_dir().resolve())).as_posix()
    except (ValueError, UserError):
        pass
    try:
        return path.relative_to(Path.cwd()).as_posix()
    except ValueError:
        return str(path)
