"""Muon for the matrices of the blocks, AdamW for everything else, in one optimizer.

Muon (Keller Jordan, 2024) replaces the averaged gradient of a matrix by the nearest orthogonal one. What is stacked in one matrix for
speed (queries, keys and values; gate and up) is several maps, and each is made orthogonal by itself: done on the stack, the result would
depend on how weights happen to be stored. The step is scaled by 0.2 sqrt(longer side), so that learning rate and decay are those of AdamW
(Moonlight, arXiv 2502.16982).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gdn.core.errors import ConfigError

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz iteration: they push singular values into about 0.7 to 1.2 fast rather than to 1 slowly."""

SMALL = ("a_proj", "b_proj", "dt_proj", "in_proj_a", "in_proj_b", "in_proj_ba", "shared_expert_gate")
"""Projections to one number a head: vectors a head, not maps between spaces."""

STACKS = ("qkv_proj", "qfi_proj", "gate_up", "in_proj_qkv", "in_proj_qkvz")
"""Names of matrices that hold several, transformers' too; a module that has one says how many rows each takes (`stacked_rows`)."""


class Muon(torch.optim.Optimizer):
    """Groups with `muon=True` hold matrices, the others anything. `rows` are the blocks of stacked matrices."""

    def __init__(self, groups: Iterable[dict[str, Any]], rows: dict[Tensor, tuple[int, ...]], **defaults: Any) -> None:
        super().__init__(groups, {"muon": False, **defaults})
        self.rows = rows

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    (self._orthogonal if group["muon"] else self._adam)(parameter, parameter.grad, group)
        return loss

    def _orthogonal(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = gradient.lerp(average, group["momentum"])
        rows = self.rows.get(parameter, (parameter.shape[0],))
        for weight, block in zip(parameter.split(rows), update.split(rows)):
            step = orthogonal(block)
            weight.add_(step.to(weight.dtype), alpha=-group["lr"] * 0.2 * math.sqrt(max(block.shape)))

    def _adam(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, (fast, slow) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - fast)
        state["exp_avg_sq"].mul_(slow).addcmul_(gradient, gradient, value=1 - slow)
        steps = float(state["step"])
        spread = (state["exp_avg_sq"] / (1 - slow**steps)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["exp_avg"], spread, value=-group["lr"] / (1 - fast**steps))


def orthogonal(matrix: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """About the orthogonal matrix nearest to one `[m, n]`: its singular vectors with singular values near 1. Computed in bfloat16."""
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16()
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def split(model: nn.Module) -> tuple[list[str], dict[Tensor, tuple[int, ...]]]:
    """The names of the matrices for Muon, and the rows of those that hold several."""
    inside = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    names, rows = [], {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and any(path.startswith(f"{p}.") for p in inside) and not path.endswith(SMALL):
            names.append(f"{path}.weight")
            stacked = getattr(model.get_submodule(path.rpartition(".")[0]), "stacked_rows", {}).get(path.rpartition(".")[2])
            if stacked is None and path.endswith(STACKS):
                raise ConfigError(f"matrices: {path} holds several matrices and its module does not say their rows (stacked_rows)")
            if stacked is not None:
                rows[module.weight] = tuple(stacked)
    return names, rows
