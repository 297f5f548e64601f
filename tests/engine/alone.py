"""Cases that two ranks take part in as well, on one rank by itself; for the slow suite."""

from tests.engine import (
    afrb_cases,
    background_cases,
    interruption_cases,
    rewind_cases,
    shared_cases,
    spectra_cases,
)
from tests.engine.world import main

CASES = {"resume": shared_cases.resume, "not_finite": shared_cases.not_finite,
         "frozen_and_buffers": shared_cases.frozen_and_buffers, "read_write": shared_cases.read_write,
         "dead_matrices": shared_cases.dead_matrices,
         **rewind_cases.CASES, **interruption_cases.CASES, **background_cases.CASES,
         **afrb_cases.CASES, **spectra_cases.SMALL_CASES}

if __name__ == "__main__":
    main(CASES)
