"""Spikes, stops at bad moments and saves that training overtakes, on two ranks; for the slow suite."""

from tests.engine import background_cases, interruption_cases, rewind_cases
from tests.engine.world import main

CASES = {**rewind_cases.CASES, **interruption_cases.CASES, **background_cases.CASES}

if __name__ == "__main__":
    main(CASES)
