"""Targets of low-rank adapters (PEFT) that cover every projection of a layer, and refuse to skip one in silence.

LoraConfig(target_modules=lora_targets(model))                 every projection of mixers and MLPs
LoraConfig(target_modules=lora_targets(model, "mixers"))       only of the token mixers
LoraConfig(target_modules=lora_targets(model, experts=True), target_parameters=lora_parameters(model))     with routed experts
check_targets(model, ["q_proj", "v_proj"])                     raises: on Qwen3.5 these miss three layers of four
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal

from torch import Tensor, nn

from gdn.core.errors import ConfigError, nearest

Part = Literal["all", "mixers", "mlps"]

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
SHARED = (*MLP, "shared_expert_gate")
QWEN3_5 = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj", *ATTENTION)
SEPARATE = ("q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj", "o_proj")

PRESETS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "qwen3_5": (QWEN3_5, MLP),
    "qwen3_5_text": (QWEN3_5, MLP),
    "qwen3_5_moe": (QWEN3_5, SHARED),
    "qwen3_5_moe_text": (QWEN3_5, SHARED),
    "qwen3_next": (("in_proj_qkvz", "in_proj_ba", "out_proj", *ATTENTION), SHARED),
    "olmo_hybrid": (SEPARATE, MLP),
    "gated_deltanet": (SEPARATE, MLP),
    "gdn": (("qkv_proj", "a_proj", "b_proj", "dt_proj", "g_proj", "z_proj", "o_proj"), ("gate_up", "down")),
}
"""Names of projections by model type: of token mixers, of MLPs."""

REWRITTEN = {"qwen3_next": MLP}
"""Names that PEFT (0.21) itself turns into names of experts' parameters for a model type, so that it skips modules called so."""

PLACES = {"mixers": ("mixer", "linear_attn", "self_attn", "attn"), "mlps": ("mlp",)}
"""Names of the modules that hold them."""

EXPERTS = "experts"
"""Name of the module that holds routed experts as parameters of three dimensions, which are no modules."""

APART = "visual"
"""Name of the module that reads images; its projections are no part of the language model."""


def lora_targets(model: nn.Module, part: Part = "all", *, experts: bool = False) -> list[str]:
    """Names for `LoraConfig(target_modules=...)`.

    Args:
        model: a model of transformers or of this package. Of one that reads images too, the language model.
        part: "all", "mixers" (the token mixers of every kind) or "mlps".
        experts: routed experts are taken care of by `lora_parameters`; without it they are refused where they belong to the part.

    Raises:
        ConfigError: there is no preset for the architecture, or it would leave out a projection of the model.
    """
    if part not in ("all", *PLACES):
        raise ConfigError(f'part: expected "all", "mixers" or "mlps", got {part!r}')
    kind = str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
    if kind not in PRESETS:
        raise ConfigError(f'no adapter preset for "{kind}".{nearest(kind, PRESETS)}')
    chosen = {"mixers": PRESETS[kind][0], "mlps": PRESETS[kind][1]}
    names = [name for place, names in chosen.items() if part in ("all", place) for name in names]
    check_targets(model, names, part)
    lost = [name for name in names if name in REWRITTEN.get(kind, ())]
    if lost:
        raise ConfigError(f'{kind}: PEFT takes {", ".join(lost)} for experts and would skip these modules; expected part="mixers"')
    routed = [path for path, _ in routed_experts(model)]
    if part != "mixers" and routed and not experts:
        raise ConfigError(
            f"{kind}: {len(routed)} parameters of routed experts ({routed[0]}, ...) are no modules; "
            'expected experts=True with target_parameters=lora_parameters(model), or part="mixers"'
        )
    present = {path.rpartition(".")[2] for path, _ in projections(model, part)}
    return [name for name in dict.fromkeys(names) if name in present]


def lora_parameters(model: nn.Module) -> list[str]:
    """Names for `LoraConfig(target_parameters=...)`: the projections of routed experts; none where a model has no such."""
    return sorted({".".join(path.split(".")[-3:]) for path, _ in routed_experts(model)})


def check_targets(model: nn.Module, targets: Iterable[str], part: Part = "mixers") -> None:
    """Raise `ConfigError` if adapters with these targets would skip a projection of the model.

    Args:
        model: the model that the adapters are for.
        targets: names as in `LoraConfig(target_modules=...)`: the last parts of modules' names.
        part: where nothing may be skipped.
    """
    targets = tuple(targets)
    found = list(projections(model, part))
    if not found:
        raise ConfigError(f"model: {type(model).__name__} has no projections in modules called {', '.join(_places(part))}")
    skipped = [path for path, _ in found if not any(path == t or path.endswith(f".{t}") for t in targets)]
    if skipped:
        kinds = sorted({path.rpartition(".")[2] for path in skipped})
        raise ConfigError(
            f"target_modules: {', '.join(targets)} skip {len(skipped)} of {len(found)} projections ({', '.join(kinds)}), "
            f"the first of them {skipped[0]}"
        )


def projections(model: nn.Module, part: Part = "all") -> Iterator[tuple[str, nn.Linear]]:
    """The linear maps inside a model's token mixers, its MLPs, or both, by name."""
    places = _places(part)
    for path, module in model.named_modules():
        pieces = path.split(".")[:-1]
        if isinstance(module, nn.Linear) and any(piece in places for piece in pieces) and APART not in pieces:
            yield path, module


def routed_experts(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The matrices of routed experts, `[experts, rows, columns]`, by name."""
    for path, parameter in model.named_parameters():
        if parameter.ndim == 3 and EXPERTS in path.split("."):
            yield path, parameter


def _places(part: Part) -> tuple[str, ...]:
    return tuple(name for place, names in PLACES.items() if part in ("all", place) for name in names)
