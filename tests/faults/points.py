"""Every point at which the engine is killed: 12 steps, saved at 3, 6, 9 and 12, evaluated at 6 and 12, two kept.

Unless it says otherwise a point is hit in the save of step 9, or while step 8 is made.
"""

from __future__ import annotations

from tests.faults.inject import Point

_WRITING = "pretrain.engine.writing"
_PUBLISH = "pretrain.runfolder.publish"
_STEP = "pretrain.engine.build:Engine"
_MID_STEP = (3, 6)
"""Step 6 may still be on its way to the disk while step 8 is made."""

STEPPING = [
    Point("reading a batch", "pretrain.data.loader:UpdateLoader.__next__", "before", nth=8, rank=1, newest=_MID_STEP),
    Point("between two micro-batches", f"{_STEP}.backward", "before", nth=16, newest=_MID_STEP),
    Point("between two micro-batches of rank 1", f"{_STEP}.backward", "before", nth=16, rank=1, newest=_MID_STEP),
    Point("before the optimizer", f"{_STEP}.step", "before", nth=8, rank=1, newest=_MID_STEP),
    Point("after the optimizer", f"{_STEP}.step", "after", nth=8, newest=_MID_STEP),
    Point("in a line of the metrics", "pretrain.monitor.writers:_JsonLines.write", "half", match="'step|\"step\": 8",
          newest=_MID_STEP),
    Point("before an evaluation", "evaluation.perplexity:PerplexityEvaluator.evaluate", "before", rank=1, newest=(3,)),
    Point("after an evaluation", "evaluation.perplexity:PerplexityEvaluator.evaluate", "after", newest=(3,)),
]
SAVING = [
    Point("in DeepSpeed's weights", "torch:save", "half", match=r"-9/.*model_states"),
    Point("in DeepSpeed's moments of rank 0", "torch:save", "half", match=r"-9/.*rank_0.*optim_states"),
    Point("in DeepSpeed's moments of rank 1", "torch:save", "half", match=r"-9/.*rank_1.*optim_states", rank=1),
    Point("in the random state of rank 1", "safetensors.torch:save_file", "half", match=r"-9/rng-1", rank=1),
    Point("in frozen parameters and buffers", "safetensors.torch:save_file", "half", match=r"-9/extra"),
    Point("before the state", f"{_WRITING}:TextFile.write", "before", match=r"-9/state\.json"),
    Point("before a file is flushed", f"{_WRITING}:HashedFile.close", "before", match=r"-9/.*optim", rank=1),
    Point("before the manifest", f"{_PUBLISH}:Manifest.write", "before", match=r"step=9"),
    Point("before the manifest has its name", "os:replace", "before", match=r"-9/.* .*manifest\.json"),
    Point("before the rename", "os:rename", "before", match=r"tmp-f1-step-9 .*/step-9\.f1"),
    Point("after the rename", "os:rename", "after", match=r"tmp-f1-step-9 .*/step-9\.f1", newest=(9,)),
    Point("before `latest` moves", "os:replace", "before", match=r"runs.*checkpoints/latest$", nth=3, newest=(9,)),
    Point("after `latest` moved", "os:replace", "after", match=r"runs.*checkpoints/latest$", nth=3, newest=(9,)),
    Point("before `best` moves", "os:replace", "before", match=r"runs.*checkpoints/best-val-loss$", nth=2,
          newest=(12,)),
]
FORGETTING = [
    Point("before a checkpoint is deleted", "os:rename", "before", match=r"trash-step-3", newest=(9,)),
    Point("a deleted checkpoint has lost its name", "os:rename", "after", match=r"trash-step-3", newest=(9,)),
    Point("a checkpoint is half deleted", "shutil:rmtree", "half", match=r"trash-step-3", newest=(9,)),
]
MIRRORING = [
    Point("in a file of the copy", "pretrain.runfolder.backup:copy_file", "half", match=r"optim", newest=(3, 6, 9)),
    Point("before the copy is renamed", "os:rename", "before", match=r"tmp-copy-.*disk", newest=(3, 6, 9)),
    Point("before `latest` of the copy moves", "os:replace", "before", match=r"disk.*checkpoints/latest$",
          newest=(3, 6, 9)),
    Point("in the records of the copy", "os:replace", "before", match=r"disk.*metrics\.jsonl", newest=(3, 6, 9)),
]
STARTING = [
    Point("before the lease is claimed", "os:rename", "before", match=r"claim-.*/lease/1$", newest=(0,)),
    Point("after the lease is claimed", "os:rename", "after", match=r"claim-.*/lease/1$", newest=(0,)),
    Point("before the first config is written", "os:replace", "before", match=r"config\.yaml$", newest=(0,)),
    Point("before a fresh start counts", "pretrain.runfolder.lease:Lease.set_fresh", "before", newest=(0,)),
    Point("after a fresh start counts", "pretrain.runfolder.lease:Lease.set_fresh", "after", newest=(0,)),
    Point("before the first step", f"{_STEP}.backward", "before", newest=(0,)),
]
RESTARTING = [
    Point("while leftovers are removed", "shutil:rmtree", "half", match=r"tmp-f1-step-9", first="before the rename"),
    Point("while a checkpoint is verified", f"{_PUBLISH}:hash_file", "before", match=r"step-6.*optim",
          first="before the rename"),
    Point("while weights are restored", "pretrain.engine.shards:Shards.copy", "before", nth=20, rank=1,
          first="before the rename"),
    Point("before the restart counts", "pretrain.runfolder.lease:Lease.set_resumed_from", "before",
          first="before the rename"),
    Point("after the restart counts", "pretrain.runfolder.lease:Lease.set_resumed_from", "after",
          first="before the rename"),
    Point("in the first step after a restart", f"{_STEP}.backward", "before", nth=2, rank=1,
          first="before the rename"),
    Point("again at the same point", "os:rename", "before", match=r"tmp-f2-step-9 .*/step-9\.f2",
          first="before the rename"),
    Point("where it was renamed before", "os:rename", "before", match=r"tmp-f2-step-12 .*/step-12\.f2", newest=(9,),
          first="after the rename"),
]
ENDING = [
    Point("before the last evaluation", "evaluation.perplexity:PerplexityEvaluator.evaluate", "before", nth=2, rank=1,
          newest=(6, 9)),
    Point("before the last checkpoint", "os:rename", "before", match=r"tmp-f1-step-12 ", newest=(9,)),
    Point("before the verdict", "pretrain.runfolder.status:Status.write", "before", match=r"state='done'",
          newest=(12,)),
    Point("before the lease is released", "pretrain.runfolder.lease:Lease.release", "before", newest=(12,)),
    Point("before the report", "evaluation.report:write_report", "before", newest=(12,)),
]
ALL = [*STEPPING, *SAVING, *FORGETTING, *MIRRORING, *STARTING, *RESTARTING, *ENDING]
BY_NAME = {point.name: point for point in ALL}
assert len(BY_NAME) == len(ALL)
