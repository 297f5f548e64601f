"""Cases of the four-rank launch."""

from tests.engine import elastic_cases, shared_cases
from tests.engine.world import main

CASES = {"splits": shared_cases.splits, "contrastive": shared_cases.contrastive,
         "first_link": elastic_cases.first_link}

if __name__ == "__main__":
    main(CASES)
