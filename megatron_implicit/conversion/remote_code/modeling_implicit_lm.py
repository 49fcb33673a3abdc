"""An implicit language model (arXiv 2502.07827) for transformers: z = F(z; u(x)) is solved in every call.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.generate(**tokenizer("In the beginning", return_tensors="pt"), max_new_tokens=32)

A call solves its tokens together, on top of the states of the tokens before them: ``generate`` solves the prompt at
once and then token by token. ``model.config.inference`` holds the solver's values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from .configuration_implicit_lm import ImplicitLMConfig
from .layers_implicit_lm import Layer, NormedWeight, RMSNorm, Tokens, Weights

_EPSILON = 1e-6


class SolveStates:
    """What a call leaves to the next: states of all layers, the padding so far, the effective weights."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.layers: list[Optional[tuple[Tensor, ...]]] = []
        self.valid: Optional[Tensor] = None
        self.length = 0


@dataclass
class ImplicitLMOutput(ModelOutput):
    """What a call returns."""

    loss: Optional[Tensor] = None
    logits: Optional[Tensor] = None
    """[b, s, vocab] float32."""
    hidden: Optional[Tensor] = None
    """[b, s, h] float32: the fixed point."""
    evaluations: Optional[Tensor] = None
    """[b] evaluations of F that each sample's solve took, without the output pass."""
    states: Optional[SolveStates] = None


class _Embedding(nn.Module):
    def __init__(self, config: ImplicitLMConfig) -> None:
        super().__init__()
        self.emb = nn.Embedding(config.vocab_size, config.hidden_size)


class _Backbone(nn.Module):
    """The injection and the map F."""

    def __init__(self, config: ImplicitLMConfig) -> None:
        super().__init__()
        width, eps = config.hidden_size, config.model["norm_eps"]
        self.layers = nn.ModuleList(Layer(config.model) for _ in range(config.num_hidden_layers))
        self.injection_norm = RMSNorm(width, eps)
        self.injection = NormedWeight(self.layers[0].mixer.injected_rows, width, bias=True)
        self.norm_f = RMSNorm(width, eps, float32=True)

    def inject(self, embedding: Tensor, weights: Weights) -> Tensor:
        """u = W_inj · RMSNorm(e) + b, once for all layers and evaluations."""
        return F.linear(self.injection_norm(embedding), weights[self.injection], self.injection.bias)

    def forward(
        self, z: Tensor, u: Tensor, weights: Weights, states: list, tokens: Tokens
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """F(z; u), and the layers' states after the tokens."""
        after = []
        for index, layer in enumerate(self.layers):
            z, state = layer(z, u, weights, states[index] if states else None, tokens)
            after.append(state)
        return self.norm_f(z), after


class ImplicitLMForCausalLM(PreTrainedModel, GenerationMixin):
    """Embedding, fixed point, head. For inference; training needs the program the model comes from."""

    config_class = ImplicitLMConfig
    base_model_prefix = "implicit_lm"
    main_input_name = "input_ids"
    _is_stateful = True
    _supports_sdpa = True
    _no_split_modules = ["Layer"]

    def __init__(self, config: ImplicitLMConfig) -> None:
        super().__init__(config)
        self.word_emb = _Embedding(config)
        self.backbone = _Backbone(config)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Modules initialise themselves."""

    def get_input_embeddings(self) -> nn.Module:
        """The token embedding."""
        return self.word_emb.emb

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the token embedding."""
        self.word_emb.emb = value

    def get_output_embeddings(self) -> Optional[nn.Module]:
        """The head, if it has weights of its own."""
        return self.lm_head

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Optional[Tensor] = None,
        states: Optional[SolveStates] = None,
        use_cache: bool = False,
        labels: Optional[Tensor] = None,
        logits_to_keep: int = 0,
        return_dict: bool = True,
        **unused: Any,
    ) -> ImplicitLMOutput | tuple:
        """Solves the fixed point of the tokens.

        Args:
            input_ids: [b, s], the tokens after those of ``states``.
            attention_mask: [b, all tokens so far], 0 where a sample is padded (on the left, if states go on).
            states: of the call before.
            use_cache: return the states for the next call.
            labels: [b, s] targets, shifted inside; -100 is ignored.
            logits_to_keep: logits of only that many last tokens; 0 keeps all.
        """
        if self.training:
            raise RuntimeError("this class is for inference: call eval(), or train with megatron_implicit")
        weights = states.weights if states else self._effective_weights()
        before = states.layers if states else []
        tokens = _tokens(input_ids, attention_mask, states)
        u = self.backbone.inject(self.word_emb.emb(input_ids), weights)
        z, after, evaluations = self._solve(lambda z: self.backbone(z, u, weights, before, tokens), u, tokens)
        head = (self.lm_head or self.word_emb.emb).weight
        logits = F.linear(z[:, -logits_to_keep:].to(head.dtype), head).float()
        output = ImplicitLMOutput(_loss(logits, labels), logits, z, evaluations)
        if use_cache:
            output.states = _next_states(weights, after, tokens, states, input_ids)
        return output if return_dict else output.to_tuple()

    def _effective_weights(self) -> Weights:
        return {module: module.effective() for module in self.modules() if isinstance(module, NormedWeight)}

    def _solve(self, evaluate: Callable[[Tensor], tuple], u: Tensor, tokens: Tokens) -> tuple[Tensor, list, Tensor]:
        """z ← (1 - damping) z + damping F(z) from 0 until ‖F(z) - z‖ / ‖z‖ of a sample is below the tolerance.

        What counts is one more F(z), states included. A sample that has converged stays as it is (stop=sample), so
        none depends on its companions.
        """
        values, damping = self.config.inference, self.config.inference["damping"]
        z = u.new_zeros(*u.shape[:2], self.config.hidden_size, dtype=torch.float32)
        active = torch.ones(len(z), dtype=torch.bool, device=z.device)
        evaluations = torch.zeros(len(z), dtype=torch.long, device=z.device)
        for _ in range(values["max_iterations"] - 1):
            image = _without_padding(evaluate(z)[0], tokens)
            residual = _norm(image - z) / (_norm(z) + _EPSILON)
            evaluations += active
            z = torch.where(active[:, None, None], damping * image + (1 - damping) * z, z)
            unconverged = residual >= values["tolerance"]
            active = active & unconverged if values["stop"] == "sample" else unconverged.any().expand_as(active)
            if not active.any():
                break
        image, after = evaluate(z)
        return _without_padding(image, tokens), after, evaluations

    # ---------------------------------------------------------------- generation

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, states: Optional[SolveStates] = None, attention_mask: Optional[Tensor] = None,
        use_cache: Optional[bool] = None, **unused: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """The tokens that the states do not know yet."""
        known = states.length if states else 0
        return {
            "input_ids": input_ids[:, known:], "attention_mask": attention_mask, "states": states,
            "use_cache": bool(use_cache), "logits_to_keep": 1,
        }  # fmt: skip

    def _update_model_kwargs_for_generation(self, outputs: ModelOutput, model_kwargs: dict, *args: Any, **kwargs: Any):
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        model_kwargs["states"] = outputs.states
        return model_kwargs

    def _prepare_cache_for_generation(self, generation_config: Any, *args: Any, **kwargs: Any) -> None:
        """The states are kept here, not in one of transformers' caches; beams, which reorder samples, solve anew."""
        if (generation_config.num_beams or 1) > 1:
            generation_config.use_cache = False


def _tokens(input_ids: Tensor, attention_mask: Optional[Tensor], states: Optional[SolveStates]) -> Tokens:
    """Positions, padding and which keys are seen."""
    count, known = input_ids.shape[1], states.length if states else 0
    seen = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    seen = seen[:, -count:].bool()
    if states is not None:
        seen = torch.cat((states.valid, seen), dim=1)
    order, keys = torch.arange(known, known + count), torch.arange(known + count)
    causal = (order[:, None] >= keys).to(seen.device)
    positions = (seen.long().cumsum(1) - 1).clamp_min(0)[:, known:]
    if bool(seen.all()):
        return Tokens(positions, None, causal[None, None] if known else None)
    itself = (order[:, None] == keys).to(seen.device)  # a padded query sees something
    return Tokens(positions, seen[:, known:], ((causal & seen[:, None]) | itself)[:, None])


def _next_states(
    weights: Weights, layers: list, tokens: Tokens, before: Optional[SolveStates], input_ids: Tensor
) -> SolveStates:
    states, known = SolveStates(weights), before.length if before else 0
    states.layers, states.length = layers, known + input_ids.shape[1]
    valid = tokens.valid if tokens.valid is not None else torch.ones_like(input_ids, dtype=torch.bool)
    if before is not None:
        valid = torch.cat((before.valid, valid), dim=1)
    states.valid = valid
    return states


def _without_padding(z: Tensor, tokens: Tokens) -> Tensor:
    return z if tokens.valid is None else z.masked_fill(~tokens.valid[..., None], 0.0)


def _norm(z: Tensor) -> Tensor:
    """[b], over tokens and channels."""
    return torch.linalg.vector_norm(z, dim=(1, 2))


def _loss(logits: Tensor, labels: Optional[Tensor]) -> Optional[Tensor]:
    if labels is None:
        return None
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


ImplicitLMForCausalLM.register_for_auto_class("AutoModelForCausalLM")  # save_pretrained then copies the code along
