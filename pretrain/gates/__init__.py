"""Gates: what every model must pass before its figures mean anything. See `run_gates`."""

from pretrain.gates.base import GateResult
from pretrain.gates.suite import run_gates

__all__ = ["GateResult", "run_gates"]
