"""Configuration of an implicit language model (arXiv 2502.07827) for transformers."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig


class ImplicitLMConfig(PretrainedConfig):
    """The model, solver and inference sections of the training configuration.

    Args:
        model: what the stack F is made of: family, num_layers, hidden_size, vocab_size, ...
        solver: the solve of training; kept for going on with it.
        inference: max_iterations (the output pass included), tolerance, damping and stop of the solve of each call. The
            values may be changed at any time; the next call uses them.
    """

    model_type = "implicit_lm"

    def __init__(
        self, model: dict[str, Any] | None = None, solver: dict[str, Any] | None = None,
        inference: dict[str, Any] | None = None, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.model, self.solver, self.inference = dict(model or {}), dict(solver or {}), dict(inference or {})
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary."""
        return self.model.get("vocab_size", 0)

    @property
    def hidden_size(self) -> int:
        """Width of the model."""
        return self.model.get("hidden_size", 0)

    @property
    def num_hidden_layers(self) -> int:
        """Layers of the stack F."""
        return self.model.get("num_layers", 0)


ImplicitLMConfig.register_for_auto_class()  # save_pretrained then copies the code along
