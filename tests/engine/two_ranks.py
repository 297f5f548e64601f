"""Cases of the two-rank launch."""

from tests.engine import shared_cases
from tests.engine.world import main

CASES = {"splits": shared_cases.splits, "contrastive": shared_cases.contrastive, "bf16": shared_cases.bf16,
         "resume": shared_cases.resume, "not_finite": shared_cases.not_finite,
         "frozen_and_buffers": shared_cases.frozen_and_buffers, "read_write": shared_cases.read_write}

if __name__ == "__main__":
    main(CASES)
