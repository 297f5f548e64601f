"""A training step of AFRB on needles of 512 tokens: one block with a memory over a model without either.

On the small backbone, frozen and without attention: over the same block without a memory (the null adapter). There a
model sends only the rows that are asked for through its layers, where nothing looks back at hidden states. Ratios are
over a null adapter that is made to send the whole sequence, as it would on text, and over one that sends what is asked.

On a Llama of 8 layers of 512 that is trained as a whole, attention kept: over that Llama alone. Logits are computed at
the asked rows.
"""

from __future__ import annotations

import functools

import torch

from benchmarks.harness import Comparison, compare, cpu_seconds, write_results
from pretrain.config.load import load_run_config
from pretrain.models.afrb.family import FAMILY
from pretrain.models.afrb.schema import AFRBConfig
from pretrain.models.base import BuildContext

ROWS, T, ANSWERS = 4, 533, 16
GOAL, LLAMA_GOAL = 1.3, 1.15
PAIRS, LLAMA_PAIRS = 10, 6
LLAMA = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 1408,
         "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 1024,
         "tie_word_embeddings": False}
BARE = {"n_afrb": 0, "enable_pvm": False, "readout_from": "none", "kiss_ridge_calib": False}
NULL = {"phase_mode": "none", "enable_pvm": False, "readout_from": "none", "kiss_ridge_calib": False}
VECTOR = {"enable_pvm": True, "readout_from": "pvm"}
KINDS = {
    "phase branch alone": {**NULL, "phase_mode": "rotate"},
    "vector memory, trace readout": VECTOR,
    "vector memory, state readout": {**VECTOR, "readout_mode": "state"},
    "matrix memory 256 x 128": {"enable_pvm": True, "readout_from": "pvm", "pvm_memory": "matrix", "pvm_beta": 1.0,
                                "pvm_phase_clock": "token", "pvm_omega_mode": "uniform"},
}


class Step:
    """Forward at the answer's rows, backward, AdamW, on fixed random tokens."""

    def __init__(self, options: dict[str, object], *, whole: bool = False, llama: bool = False) -> None:
        preset = load_run_config("afrb-micro-small").config.model.model_dump(by_alias=True)
        if llama:
            preset |= {"backbone": {"hf_config": LLAMA}, "disable_attn": False}
        model = FAMILY.build(AFRBConfig.model_validate({**preset, **options}), BuildContext(seed=0))
        if llama:
            model.requires_grad_(True)
        self.model, self.whole = model.train(), whole
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
        draw = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, 32000, (ROWS, T + 1), generator=draw)
        self.rows = torch.arange(T - ANSWERS, T).expand(ROWS, -1)

    def __call__(self) -> float:
        """Milliseconds of CPU time of one step."""
        return 1e3 * cpu_seconds(self._step)

    def _step(self) -> None:
        out = self.model(self.ids[:, :-1], labels=self.ids[:, 1:], readout_positions=self.rows,
                         diagnostics=self.whole)
        (out.nll_sum / out.n_tokens).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def main() -> None:
    """Run it all; a minute or two."""
    torch.set_num_threads(1)
    nulls = {"all rows": Step(NULL, whole=True), "asked rows": Step(NULL)}
    found: dict[str, dict[str, Comparison]] = {sent: {} for sent in nulls}
    for name, options in KINDS.items():
        own = Step(options)
        for sent, null in nulls.items():
            one = found[sent][name] = compare(functools.partial(own), null, unit="ms", pairs=PAIRS)
            verdict = "met" if one.ratio.median <= GOAL else "MISSED"
            print(f"{name}: {one.ours} over the null adapter's {one.other}, which sends {sent}: {one.ratio}; goal "
                  f"{GOAL:g} or less: {verdict}")
    bare = Step(BARE, llama=True)
    larger: dict[str, Comparison] = {}
    for name in ("vector memory, trace readout", "vector memory, state readout", "matrix memory 256 x 128"):
        larger[name] = compare(functools.partial(Step(KINDS[name], llama=True)), bare, unit="ms", pairs=LLAMA_PAIRS)
        verdict = "met" if larger[name].ratio.median <= LLAMA_GOAL else "MISSED"
        print(f"{name}, Llama of 8 x 512: {larger[name].ours} over {larger[name].other} without: {larger[name].ratio}; "
              f"goal {LLAMA_GOAL:g} or less: {verdict}")
    write_results("afrb_step", {"rows": ROWS, "tokens": T, "backbone": "afrb-micro-small, attention off, fp32",
                                "over_null_adapter_that_sends": found, "goal": GOAL, "over_llama_8x512": larger,
                                "llama_goal": LLAMA_GOAL})


if __name__ == "__main__":
    main()
