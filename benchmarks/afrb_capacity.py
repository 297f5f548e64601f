"""How much AFRB's matrix memory holds, beside arithmetic: right answers against the size of the state.

Written are T associations of random tokens. A read returns the wanted value plus all others, each times the product of
two random unit addresses, so a wrong token's score has variance s^2 + 1/dv with s^2 = T / (dk dv), and none of P - 1
beats the wanted one with probability p = E_z[ Phi((1 + s z) / sqrt(s^2 + 1/dv))^(P - 1) ], z normal. p is of a read at
the right address (teacher-forced); free-running, one error spoils the addresses after it.

Untrained structured maps on the frozen small backbone. Run by name, where that is:
`python -m benchmarks.afrb_capacity`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.special import log_ndtr

from benchmarks.harness import write_results
from evaluation.needle import Answers, ask
from evaluation.needle_reader import Reader
from evaluation.target import open_target
from pretrain.config.needle import NeedleConfig
from pretrain.data.needle import NeedleSource
from pretrain.metrics.needle import needle_rates

EXAMPLES, BATCH = 50, 25
SIZES = {512: [(64, 64), (96, 96), (128, 64), (128, 128), (192, 128), (256, 64), (256, 128), (256, 256)],
         2048: [(256, 256), (384, 256), (512, 256), (640, 256)]}
_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(200)


def predicted(tokens: int, dk: int, dv: int, pool: int) -> float:
    """p of the module's docstring."""
    noise = tokens / (dk * dv)
    z = (1 + np.sqrt(noise) * _NODES) / np.sqrt(noise + 1 / dv)
    return float((_WEIGHTS * np.exp((pool - 1) * log_ndtr(z))).sum() / _WEIGHTS.sum())


@torch.no_grad()
def measure(tokens: int, dk: int, dv: int) -> dict[str, Any]:
    """Rates of one size on the first test needles."""
    target = open_target("afrb-retrieve-small", sets=[f"data.source.ctx_chunks={tokens // 128}", f"model.pvm_dk={dk}",
                                                      f"model.pvm_dv={dv}"])
    assert target.config is not None and isinstance(target.config.data.source, NeedleConfig)
    source = NeedleSource(target.config.data.source.model_copy(update={"split": "test"}))
    batches = (source.get(np.arange(start, start + BATCH)) for start in range(0, EXAMPLES, BATCH))
    answers = Answers.of(ask(Reader(target.forward, target.device, True), batches, source.config))
    rates = needle_rates(answers.predictions, source.config.eval_soft_topk)
    pool = source.config.pool_high - source.config.pool_low
    return {"numbers_a_token": dk * dv / tokens, "predicted": predicted(tokens, dk, dv, pool), "pool": pool,
            **{name: {"value": rates[name].value, "ci": rates[name].ci, "n": rates[name].n}
               for name in ("needle_hit_rate_tf", "needle_hit_rate")}}


def main() -> None:
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for tokens, sizes in SIZES.items():
        for dk, dv in sizes:
            results[f"{tokens} tokens, {dk} x {dv}"] = found = measure(tokens, dk, dv)
            print(f"{tokens} tokens, {dk} x {dv}: {found['numbers_a_token']:.0f} numbers a token, predicted "
                  f"{found['predicted']:.3f}, teacher-forced {found['needle_hit_rate_tf']['value']:.3f}, free-running "
                  f"{found['needle_hit_rate']['value']:.3f}", flush=True)
    write_results("afrb_capacity", results)


if __name__ == "__main__":
    main()
