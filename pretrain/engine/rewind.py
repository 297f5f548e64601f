"""Back to the last whole checkpoint in the running process, and on after the batches that led away from it.

Everything is put back: weights, moments, schedule, hooks, health, random state, counters. Only the cursor goes forward:
the batches from the checkpoint's up to the one that was the reason are passed over.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

from pretrain.engine import checkpoint
from pretrain.engine.state import Rewind, RunState
from pretrain.errors import Divergence
from pretrain.runfolder.layout import CheckpointRef, RunFolder
from pretrain.runfolder.whole import newest_whole

if TYPE_CHECKING:
    from pretrain.engine.trainer import Trainer

_log = logging.getLogger("pretrain")


def rewind(trainer: Trainer, k: int, loss: float, why: str) -> bool:
    """Go back because of batch `k`. False where there is no checkpoint yet. Collective.

    Raises Divergence once `train.max_rewinds` returns to one step have not led past it, DataCorruption where there are
    checkpoints and none is whole.
    """
    world = trainer.engine.world
    ref = world.on_main(lambda: _newest(trainer.keeper.folder))
    if ref is None:
        return False
    before = [past for past in trainer.state.rewinds if past["to_step"] == ref.step]
    if len(before) >= trainer.config.train.max_rewinds:
        batches = ", ".join(str(batch) for batch in [*(past["k"] for past in before), k])
        error = Divergence(f"{why}; {len(before)} returns to step {ref.step} did not lead past it (batches {batches}): "
                           "lower optim.lr, go on from an earlier checkpoint with --branch and --from-step, or raise "
                           "train.max_rewinds")
        error.agreed = True
        raise error
    with trainer.reporter.aside("other"):
        _put_back(trainer, ref, k, loss)
    last = trainer.state.rewinds[-1]
    if world.is_main:
        _log.warning("batch %d: %s; back to %s (step %d), on with batch %d: %d batches are passed over (return %d of "
                     "%d to this step)", k, why, ref.path, ref.step, k + 1, k + 1 - last["to_k"], len(before) + 1,
                     trainer.config.train.max_rewinds)
    trainer.reporter.rewound(trainer.state, trainer.progress, last)
    return True


def _newest(folder: RunFolder) -> CheckpointRef | None:
    """The newest whole checkpoint. Damaged ones above it lose their names: the run is about to reach them again."""
    ref = newest_whole(folder)
    if ref is not None:
        for above in folder.checkpoints():
            if (above.fence, above.step) > (ref.fence, ref.step):
                aside = above.path.with_name(f"damaged-{above.path.name}")
                above.path.rename(aside)
                _log.warning("%s is now %s", above.path, aside.name)
    return ref


def _put_back(trainer: Trainer, ref: CheckpointRef, k: int, loss: float) -> None:
    now = trainer.state
    snapshot = checkpoint.load(trainer.engine, ref, trainer.config.seed)
    record = Rewind(k=k, step=now.step, loss=loss if math.isfinite(loss) else None, checkpoint=ref.path.name,
                    to_step=ref.step, to_k=int(snapshot.state["k"]))
    trainer.restore(snapshot)
    state: RunState = trainer.state
    state.k = k + 1
    state.rewinds = [*now.rewinds, record]
    state.saves = now.saves
    state.lr_override = now.lr_override  # a person's wish, perhaps because of this very spike
    trainer.loader.close()
    trainer.loader = trainer.open_loader(state.k)
