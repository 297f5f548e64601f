"""Cases of the two-rank launch."""

from pathlib import Path
from typing import Any

from pretrain.engine.distributed import World
from tests.engine import afrb_cases, elastic_cases, shared_cases, spectra_cases
from tests.engine.world import main


def last_link(world: World, folder: Path) -> dict[str, Any]:
    """1 rank -> 2 ranks, of the runs that 4 ranks began."""
    return elastic_cases.next_link(world, folder, "four_ranks", 2)


CASES = {"splits": shared_cases.splits, "contrastive": shared_cases.contrastive, "bf16": shared_cases.bf16,
         "resume": shared_cases.resume, "not_finite": shared_cases.not_finite,
         "frozen_and_buffers": shared_cases.frozen_and_buffers, "read_write": shared_cases.read_write,
         "dead_matrices": shared_cases.dead_matrices,
         "last_link": last_link, "interrupted": elastic_cases.interrupted,
         **afrb_cases.CASES, **spectra_cases.SMALL_CASES}

if __name__ == "__main__":
    main(CASES)
