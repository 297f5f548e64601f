"""Which work counts: the chain of holders, each of which went on from a checkpoint of an earlier one.

Nothing on a shared filesystem can stop a process that was thought dead from writing. Everything written carries the
fence number of its writer instead, and readers follow the chain: from the newest fence to the fence and step it resumed
from, and so on. Whatever lies beside the chain, or past the step at which a later holder took over, does not count.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pretrain.runfolder.holder import Holder, fences


@dataclass(frozen=True, slots=True)
class Chain:
    """Fences that count, each with its last step that counts (None: all)."""

    limits: dict[int, int | None]

    def counts(self, fence: int, step: int) -> bool:
        """Whether what the holder of `fence` wrote at `step` counts."""
        if fence not in self.limits:
            return False
        limit = self.limits[fence]
        return limit is None or step <= limit


def read_chain(lease_dir: Path, also: Iterable[int] = ()) -> Chain:
    """Follow the holders under `lease_dir` from the newest fence down.

    `also` names fences seen on checkpoints or rows. One without a record (a copy made without the leases), or whose
    holder died before it decided where to go on from, hides nothing of what is older.
    """
    limits: dict[int, int | None] = {}
    limit: int | None = None
    target: int | None = None
    for fence in sorted({*fences(lease_dir), *also}, reverse=True):
        if target is not None and fence > target:
            continue
        limits[fence] = limit
        holder = Holder.read(lease_dir / str(fence))
        if holder is not None and holder.resumed_from is not None:
            target, limit = holder.resumed_from["fence"], holder.resumed_from["step"]
    return Chain(limits)
