"""What killed processes may not leave in a run folder. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from pretrain.runfolder.layout import CheckpointRef
from pretrain.runfolder.publish import READERS
from pretrain.runfolder.retention import live_pins


def leftovers(root: Path) -> list[str]:
    """Temporary files under a run folder, and pins of readers that are gone."""
    found = [str(path.relative_to(root)) for path in root.rglob(".*") if path.name != READERS]
    for path in root.glob(f"checkpoints/step-*/{READERS}"):
        ref = CheckpointRef.parse(path.parent)
        assert ref is not None
        found += [str(pin.relative_to(root)) for pin in path.iterdir() if pin not in live_pins(ref)]
    return sorted(set(found))
