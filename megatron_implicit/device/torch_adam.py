"""Repairs Megatron-Core's distributed optimizer for torch's own AdamW, wherever that is the optimizer in use.

Upstream expects Transformer Engine's or Apex's FusedAdam, which keep one ``step`` in the parameter group. torch keeps
a ``step`` tensor for each parameter, and four things break without either package (any CPU, many GPU machines):
``state_dict`` asserts on and misses ``step``; setting parameters writes in place to a view of a leaf; and after a load
one ``step`` tensor is *shared by all parameters*, so that every parameter's update advances it and bias correction
silently diverges. With FusedAdam these functions change nothing.
"""

from __future__ import annotations

from typing import Any

import torch


def repair_distributed_optimizer() -> None:
    """Wraps three methods of DistributedOptimizer; idempotent because prepare_megatron() runs once."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original_state_dict = DistributedOptimizer.state_dict
    original_load_state_dict = DistributedOptimizer.load_state_dict
    original_set_states = DistributedOptimizer._set_main_param_and_optimizer_states

    def state_dict(self: Any) -> Any:
        _fill_missing_state(self.optimizer)
        return original_state_dict(self)

    def load_state_dict(self: Any, state: Any) -> None:
        _fill_missing_state(self.optimizer)
        original_load_state_dict(self, state)
        _give_each_parameter_its_own_step(self.optimizer)

    def set_states(self: Any, model_param: torch.nn.Parameter, tensors: dict[str, torch.Tensor]) -> None:
        if not isinstance(self.optimizer, torch.optim.Adam):
            return original_set_states(self, model_param, tensors)
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        with torch.no_grad():
            for name, target in {"param": main, **self.optimizer.state[main]}.items():
                if name != "step":
                    target.copy_(tensors[name])

    DistributedOptimizer.state_dict = state_dict
    DistributedOptimizer.load_state_dict = load_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def _fill_missing_state(optimizer: Any) -> None:
    if not isinstance(optimizer, torch.optim.Adam):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for name in ("exp_avg", "exp_avg_sq"):
                if name not in state:
                    state[name] = torch.zeros_like(parameter)
            state.setdefault("step", torch.zeros(()))


def _give_each_parameter_its_own_step(optimizer: Any) -> None:
    for state in optimizer.state.values():
        if "step" in state and isinstance(state["step"], torch.Tensor):
            state["step"] = state["step"].clone()
