"""Cases of the four-rank launch."""

from tests.engine import shared_cases
from tests.engine.world import main

CASES = {"splits": shared_cases.splits, "contrastive": shared_cases.contrastive}

if __name__ == "__main__":
    main(CASES)
