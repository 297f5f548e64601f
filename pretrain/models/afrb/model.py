"""AFRB: a causal language model, as a rule frozen, with resonant adapters after its embedding and a memory beside it.

    embeddings -> n blocks (mixer, memory, phase) -> backbone -> hidden h -> logits W_out (h + scale P r)

r is what the memory says at a token. Forward is pure: what decoding goes on from is an `AFRBState` that comes in as
`past_key_values` and out in the output. It holds one vector a block; it grows with the sequence only for a readout over
all states and where the backbone keeps its attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel

from pretrain.models.afrb.backbone import Backbone, BackboneHFConfig, OutputTable, freeze
from pretrain.models.afrb.block import BlockControls, BlockOutput, ResonantBlock
from pretrain.models.afrb.infonce import infonce
from pretrain.models.afrb.memory import ContentDecay, ContentPhases, MatrixMemory, MatrixOutput
from pretrain.models.afrb.phase import Tokens, WriteGate, pick, token_layout
from pretrain.models.afrb.readout import ReadoutOutput, VectorReadout
from pretrain.models.afrb.schema import AFRBConfig
from pretrain.models.afrb.state import AFRBState
from pretrain.models.base import LMOutput
from pretrain.ops.cross_entropy import IGNORE_INDEX, chunked_cross_entropy

NCE_TEMPERATURE = 0.08
"""Of InfoNCE where controls name none."""


class AFRBHFConfig(PreTrainedConfig):
    """`config.json`: the schema's values as `options`."""

    model_type = "afrb"

    def __init__(self, options: dict[str, Any] | None = None, document_masking: bool = True, **kwargs: Any) -> None:
        self.options = options or {}
        self.document_masking = document_masking
        if options:
            cfg = self.schema()
            self.vocab_size, self.hidden_size = cfg.vocab_size, cfg.hidden_size
            self.num_hidden_layers = cfg.backbone.sizes.num_layers
            self.max_position_embeddings = cfg.max_seq_len
        super().__init__(**kwargs)

    def schema(self) -> AFRBConfig:
        """The model's config section."""
        return AFRBConfig.model_validate(self.options)


def hf_config(cfg: AFRBConfig, *, document_masking: bool = True) -> AFRBHFConfig:
    """The transformers config of a schema. Where the weights once came from is no part of it."""
    options = cfg.model_dump(mode="json", by_alias=True)
    options["backbone"]["weights"] = None
    return AFRBHFConfig(options, document_masking)


@dataclass
class AFRBOutput(LMOutput):
    """Result of a forward."""

    diagnostics: dict[str, Tensor] | None = None
    """Without gradient, where asked for; see `AFRBForCausalLM.forward`."""


class AFRBForCausalLM(PreTrainedModel, GenerationMixin):
    """See the module's docstring."""

    config_class = AFRBHFConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _is_stateful = True

    def __init__(self, config: AFRBHFConfig) -> None:
        super().__init__(config)
        cfg = self.schema = config.schema()
        inner = BackboneHFConfig(cfg.backbone.hf_config, cfg.disabled_attention, config.document_masking,
                                 cfg.attention_reach)
        inner._attn_implementation = self.config._attn_implementation
        self.backbone = Backbone(inner)
        self.afrb_adapters = nn.ModuleList(ResonantBlock(cfg, index) for index in range(cfg.n_afrb))
        reads = cfg.readout_from == "pvm"
        self.memory = MatrixMemory(cfg) if cfg.matrix_pvm and reads else None
        self.readout = VectorReadout(cfg) if cfg.vector_pvm and reads else None
        self.register_buffer("calibrated", torch.zeros(1, dtype=torch.float32) if reads else None)
        if not cfg.backbone.trained:
            freeze(self.backbone)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (ResonantBlock, MatrixMemory, ContentDecay, VectorReadout, WriteGate, ContentPhases)):
            module.reset_parameters()
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)

    def get_input_embeddings(self) -> nn.Module:
        """The backbone's token table."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the token table."""
        self.backbone.set_input_embeddings(value)

    @property
    def evaluation_controls(self) -> frozenset[str]:
        """Ablations among forward's controls that mean something on this model."""
        read = self.memory is not None or self.readout is not None
        steps = self.memory is not None and self.schema.pvm_read == "step"
        known = {"readout_off": read, "phase_freeze": steps,
                 "memory_zero": read or (self.schema.vector_pvm and self.schema.n_afrb > 0)}
        return frozenset(name for name, means_something in known.items() if means_something)

    def get_output_embeddings(self) -> OutputTable:
        """The backbone's output table."""
        return self.backbone.get_output_embeddings()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the state is ours

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, document_ids: Tensor | None = None,
                attention_mask: Tensor | None = None, readout_positions: Tensor | None = None,
                negatives: Tensor | None = None, nce_positions: Tensor | None = None,
                past_key_values: AFRBState | None = None, use_cache: bool = False,
                return_logits: bool = False, logits_to_keep: int = 0, controls: Mapping[str, float] | None = None,
                diagnostics: bool = False, return_dict: bool = True) -> AFRBOutput:
        """Loss sums or logits, at all tokens or at chosen rows.

        Args:
            input_ids: [B, T].
            labels: [B, T], already shifted, -100 where a position has none.
            document_ids: [B, T], with a state [B, past + T]; see `pretrain.ops.documents`.
            attention_mask: like `document_ids`, 0 at padding.
            readout_positions: [B, R] of the T tokens: memory, output table and loss are computed at these rows alone,
                and logits are [B, R, V].
            negatives: [B, N] ids, taken modulo the vocabulary; then `terms["nce"]` is (sum, count) of InfoNCE against
                the output table at the rows, positives the labels there, and `terms["nce_correct"]` counts first
                choices. `nce_positions` [B, S] limits it to these of the rows.
            past_key_values, use_cache: state for decoding; with `use_cache` it comes back in the output.
            return_logits: also return logits [B, T, V]; `logits_to_keep` > 0 limits them to the last positions.
            controls: `rho_I`, `phase_ramp`, `omega_trained`, `pvm2emb_trained`, `query_trained` from the family's
                hooks; `infonce_tau`; and switches of ablations, 1 to use them: `readout_off` (logits of the backbone
                alone), `memory_zero` (memories are read empty), `phase_freeze` (a stepped read head stands still).
            diagnostics: also return tensors: `embeddings`, `adapted`, `hidden` [B, T, D]; `theta` [n, B or 1, T];
                `gamma`, `omega`, `pvm_gate`, `pvm_gate_start`, `pvm_memory_norm` [n]; `traces` [n, B, T, D]; `readout`
                [B, R, D or dv]; `write_gate` [B, T]; `readout_entropy`, `readout_largest`, `readout_cosine` [n, B, R].
            return_dict: as transformers' generation passes it; the output is always an `AFRBOutput`.
        """
        controls = controls or {}
        state = past_key_values
        masked_ids = document_ids if self.config.document_masking else None
        tokens = token_layout(input_ids, masked_ids, attention_mask, state.length if state is not None else 0)
        embeddings = self.get_input_embeddings()(input_ids)
        blocks = self._adapt(embeddings, tokens, controls, state, measure=diagnostics)
        adapted = blocks[-1].hidden if blocks else embeddings
        rows = self._rows(input_ids, readout_positions, labels, return_logits, logits_to_keep)
        whole = self.schema.looks_back or diagnostics
        hidden, cache = self.backbone(adapted, tokens, masked_ids, attention_mask,
                                      None if state is None else state.backbone, use_cache, None if whole else rows)
        said = self._say(input_ids, hidden, blocks, tokens, rows, controls, state, keep_state=use_cache,
                         measure=diagnostics)
        replace = self.schema.readout_replace and readout_positions is not None and said is not None
        head = _Head(self.get_output_embeddings(), self.memory)
        features = self._features(pick(hidden, rows) if whole and rows is not None else hidden, said, controls,
                                  replace=replace)
        output = AFRBOutput(past_key_values=self._after(tokens, input_ids, blocks, said, cache) if use_cache else None)
        if labels is not None:
            asked = labels if rows is None else pick(labels, rows)
            self._losses(output, features, asked, head)
            if negatives is not None:
                output["terms"] |= self._nce(said, asked, negatives % self.config.vocab_size, nce_positions, controls)
        if return_logits:
            kept = features[:, -logits_to_keep:] if logits_to_keep else features
            output["logits"] = head(kept)
        if diagnostics:
            output["diagnostics"] = self._diagnostics(embeddings, adapted, hidden, blocks, said)
        return output

    def _adapt(self, embeddings: Tensor, tokens: Tokens, controls: Mapping[str, float], state: AFRBState | None, *,
               measure: bool) -> list[BlockOutput]:
        """The blocks, one after the other."""
        found: list[BlockOutput] = []
        for index, block in enumerate(self.afrb_adapters):
            own = BlockControls(controls.get(f"rho_{index + 1}", 1.0), controls.get("phase_ramp", 1.0),
                                controls.get("omega_trained", 1.0), measure, 1 - controls.get("memory_zero", 0.0))
            before = None if state is None else state.blocks[index]
            found.append(block(found[-1].hidden if found else embeddings, tokens, own, before))
        return found

    def _rows(self, input_ids: Tensor, readout_positions: Tensor | None, labels: Tensor | None, return_logits: bool,
              logits_to_keep: int) -> Tensor | None:
        """[B, R] rows at which anything is said; None: all."""
        if readout_positions is not None:
            return readout_positions
        if labels is not None or not return_logits or not logits_to_keep:
            return None
        batch, length = input_ids.shape
        last = torch.arange(max(0, length - logits_to_keep), length, device=input_ids.device)
        return last.expand(batch, -1)

    def _say(self, input_ids: Tensor, hidden: Tensor, blocks: list[BlockOutput], tokens: Tokens, rows: Tensor | None,
             controls: Mapping[str, float], state: AFRBState | None, *, keep_state: bool, measure: bool
             ) -> MatrixOutput | ReadoutOutput | None:
        """What the memory says; None where nothing is read out."""
        before = None if state is None else state.memory
        if self.memory is not None:
            rows_in, rows_out = self.get_input_embeddings()(input_ids), self.get_output_embeddings()(input_ids)
            said: MatrixOutput | ReadoutOutput = self.memory(rows_in, rows_out, tokens, rows, before, controls,
                                                             keep_state=keep_state)
            return said
        if self.readout is not None:
            traces = [block.trace for block in blocks if block.trace is not None]
            said = self.readout(hidden, traces, tokens, rows, before, controls, keep_state=keep_state, measure=measure)
            return said
        return None

    def _features(self, hidden: Tensor, said: MatrixOutput | ReadoutOutput | None, controls: Mapping[str, float], *,
                  replace: bool) -> Tensor:
        """What the head maps to logits: h + scale P r, or h and the memory's vector side by side [B, R, 2D]."""
        if said is None:
            return hidden
        on = 1 - controls.get("readout_off", 0.0)
        own = hidden * (1 - on) if replace else hidden
        if isinstance(said, ReadoutOutput):
            return own + (on * self.schema.readout_scale * said.vector).to(hidden.dtype)
        return torch.cat([own, on * said.logit_vector.to(hidden.dtype)], -1)

    def _losses(self, output: AFRBOutput, features: Tensor, labels: Tensor, head: _Head) -> None:
        sums = chunked_cross_entropy(features.flatten(0, 1), labels.flatten(), head)
        output["nll_sum"], output["n_tokens"], output["n_correct"] = sums.nll_sum, sums.n_tokens, sums.n_correct
        output["terms"] = {"z": (sums.z_sum, sums.n_tokens)}

    def _nce(self, said: MatrixOutput | ReadoutOutput | None, labels: Tensor, negatives: Tensor,
             positions: Tensor | None, controls: Mapping[str, float]) -> dict[str, tuple[Tensor, Tensor]]:
        """InfoNCE of what is said at the rows of labels [B, R], or at `positions` [B, S] of them."""
        if said is None:
            raise ValueError("negatives are scored against what the memory says, but model.readout_from is none")
        vectors = said.whitened if isinstance(said, MatrixOutput) else said.vector
        if positions is not None:
            vectors, labels = pick(vectors, positions), pick(labels, positions)
        table = self.get_output_embeddings()
        positive, negative = table(labels.clamp(min=0)), table(negatives)
        if self.memory is not None:
            positive, negative = self.memory.output_rows(positive), self.memory.output_rows(negative)
        found = infonce(vectors, positive, negative, labels != IGNORE_INDEX,
                        controls.get("infonce_tau", NCE_TEMPERATURE), negatives[:, None] == labels[..., None])
        return {"nce": (found.loss, found.count), "nce_correct": (found.correct, found.count)}

    def _after(self, tokens: Tokens, input_ids: Tensor, blocks: list[BlockOutput],
               said: MatrixOutput | ReadoutOutput | None, cache: Any | None) -> AFRBState:
        return AFRBState(tuple(block.state for block in blocks), None if said is None else said.state, cache,
                         tokens.past + input_ids.shape[1])

    @torch.no_grad()
    def _diagnostics(self, embeddings: Tensor, adapted: Tensor, hidden: Tensor, blocks: list[BlockOutput],
                     said: MatrixOutput | ReadoutOutput | None) -> dict[str, Tensor]:
        found = {"embeddings": embeddings.detach(), "adapted": adapted.detach(), "hidden": hidden.detach()}
        if blocks:
            found["theta"] = torch.stack([block.angles[..., 0].detach() for block in blocks])
            for name in blocks[0].figures:
                found[name] = torch.cat([block.figures[name] for block in blocks])
        traces = [block.trace.states.detach() for block in blocks if block.trace is not None]
        if traces:
            found["traces"] = torch.stack(traces)
        if said is not None:
            found["readout"] = said.features.detach()
        if isinstance(said, MatrixOutput) and said.share is not None and self.schema.pvm_write_gate:
            found["write_gate"] = said.share[..., 0].detach()
        if isinstance(said, ReadoutOutput) and said.weights is not None:
            found |= {f"readout_{name}": value for name, value in said.weights._asdict().items()}
        return found

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What transformers prepares, with logits asked for; positions follow from the mask."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs.pop("position_ids", None)
        return {**inputs, "return_logits": True}

    def get_pvm_readout(self, tokens: Tensor, state: AFRBState | None = None) -> tuple[Tensor, AFRBState]:
        """(what the memory says after the last token [B, D or dv], state to go on from) for ids [B, T].

        Raises ValueError where nothing is read out.
        """
        if self.memory is None and self.readout is None:
            raise ValueError("no memory is read out: model.readout_from is none")
        last = torch.full((tokens.shape[0], 1), tokens.shape[1] - 1, device=tokens.device)
        out = self(tokens, readout_positions=last, past_key_values=state, use_cache=True, diagnostics=True)
        return out.diagnostics["readout"][:, 0], out.past_key_values


class _Head:
    """Features to logits; with a matrix memory, the backbone's logits plus those of the memory's vector."""

    def __init__(self, table: OutputTable, memory: MatrixMemory | None) -> None:
        self.table, self.memory = table, memory
        self.out_features = table.out_features

    def __call__(self, features: Tensor) -> Tensor:
        if self.memory is None:
            return self.table(features)
        hidden, vector = features.chunk(2, -1)
        mean, inverse = self.memory.output_rows.mean, self.memory.inverse_norms
        own = (self.table(vector).float() - (vector.float() @ mean)[..., None]) * inverse
        return self.table(hidden).float() + own


AutoConfig.register(AFRBHFConfig.model_type, AFRBHFConfig)
AutoModel.register(AFRBHFConfig, AFRBForCausalLM)
AutoModelForCausalLM.register(AFRBHFConfig, AFRBForCausalLM)
