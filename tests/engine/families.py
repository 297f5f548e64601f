"""Cases of the families whose figures are compared between one rank and four."""

from tests.engine import afrb_cases, spectra_cases
from tests.engine.world import main

CASES = {**afrb_cases.EVERYWHERE, **spectra_cases.CASES}

if __name__ == "__main__":
    main(CASES)
