"""A loaded transformers model on our operators: `gdn.accelerate(model)`.

    report = gdn.accelerate(model)          # in place; print(report) says what changed
    gdn.restore(model)                      # or: with gdn.accelerate(model): ...

Qwen3-Next, Qwen3.5 (dense and mixture of experts) and OLMo Hybrid. Only the `forward` of single modules is replaced, on the instance, and
the loss of a causal language model: parameters, names, configuration, cache and everything else stay transformers' own.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType, TracebackType
from typing import Any

from torch import nn

from gdn.core.errors import ArgumentError, ImplementationError
from gdn.hf.accelerate.families import FAMILIES, LOSS_SOURCES, Family
from gdn.hf.accelerate.loss import causal_lm_loss

logger = logging.getLogger("gdn.accelerate")

_MARK = "_gdn_accelerate"
CHECKED = "5.23 and 5.24"
"""The versions of transformers that the digests in `families` are of."""


@dataclass(frozen=True, eq=False)
class Accelerated:
    """What `accelerate` changed in a model. As a context manager it restores the model at the end of the block."""

    model: nn.Module
    changed: dict[str, str]
    """By the name of a module: what it runs on now."""

    def restore(self) -> None:
        """Give the model its own forwards back."""
        restore(self.model)

    def __enter__(self) -> Accelerated:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.restore()

    def __str__(self) -> str:
        counts = Counter((type(self.model.get_submodule(name)).__name__, what) for name, what in self.changed.items())
        lines = [f"{type(self.model).__name__}: {len(self.changed)} modules now run on gdn's operators"]
        width = max(len(kind) for kind, _ in counts)
        lines += [f"  {count:>3} x {kind:<{width}}  {what}" for (kind, what), count in counts.items()]
        return "\n".join([*lines, "gdn.restore(model) takes it back"])

    __repr__ = __str__


def accelerate(model: nn.Module) -> Accelerated:
    r"""Run a loaded transformers model's gated delta rule, short convolutions and norms on gdn's operators, in place.

    On CPU and GPU, in training and decoding, with transformers' own caches, under `torch.compile(fullgraph=True)`. Results equal the
    stock model's within the rounding of its dtype. Three things change for the better: packed documents (`position_ids` that restart,
    `cu_seq_lens_q`, `seq_idx`, or `packing=gdn.Packing(...)`) never leak, where stock leaks without a word or raises; padding leaves no
    trace in the state on either side; and gradients can flow through a cache. Beside an attention mask, even one of ones, `position_ids`
    are not looked at, as in stock: packed rows go without it.

    Args:
        model: a model that holds Qwen3-Next, Qwen3.5, Qwen3.5-MoE or OLMo Hybrid layers, whole or wrapped (for example by PEFT).

    Returns:
        What was changed; printable, and a context manager that restores the model.

    Raises:
        ArgumentError: the model holds no layer of these families, or one is configured in a way that the operators do not serve.
        ImplementationError: the installed transformers defines one of the classes otherwise than the version this was checked against, or
            somebody else has replaced a forward already.

    Example:
        report = gdn.accelerate(AutoModelForCausalLM.from_pretrained("Qwen/Qwen3.5-0.8B"))
    """
    plan = _plan(model)
    losses = _losses(model, {module for module, _ in plan.values()})
    for module, (forward, _) in plan.values():
        _set_forward(module, forward)
    for module in losses.values():
        module._loss_function = causal_lm_loss
    changed = {name: what for name, (_, (_, what)) in plan.items()}
    report = Accelerated(model, changed | dict.fromkeys(losses, "cross_entropy in the cache of a CPU"))
    logger.info("%s", report)
    return report


def restore(model: nn.Module) -> int:
    """Undo `accelerate`, also on a copy of an accelerated model. Returns the number of modules that got their own forward back."""
    count = 0
    for module in model.modules():
        place = _place(module)
        if getattr(vars(module).get(place), _MARK, False):
            if place == "forward":
                del module.forward
            else:
                module._old_forward = MethodType(type(module).forward, module)  # type: ignore[assignment]
            del module._gdn_no_pickle
            count += 1
        if vars(module).get("_loss_function") is causal_lm_loss:
            del module._loss_function
            count += 1
    return count


Replacement = tuple[Callable[..., Any], str]


def _plan(model: nn.Module) -> dict[str, tuple[nn.Module, Replacement]]:
    """By name: each module to change, its new forward and a description. Nothing is changed when anything is refused."""
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected a torch module, got {type(model).__name__}")
    kinds = {(type(m).__module__, type(m).__name__) for m in model.modules()}
    found = [family for family in FAMILIES.values() if (family.module, family.mixer) in kinds]
    if not found:
        raise ArgumentError(_why_nothing(model))
    plan: dict[str, tuple[nn.Module, Replacement]] = {}
    for family in found:
        check_sources(family)
        table = _replacements(family)
        for name, module in model.named_modules():
            if type(module).__module__ == family.module and type(module).__name__ in table:
                _check_module(name, module, family)
                plan[name] = (module, table[type(module).__name__])
    return plan


def _losses(model: nn.Module, changed: set[nn.Module]) -> dict[str, Any]:
    """By name: the modules that hold a changed one and take transformers' loss of causal language models as it is."""
    from transformers.loss import loss_utils

    try:
        sources = digest(loss_utils.ForCausalLMLoss), digest(loss_utils.fixed_cross_entropy)
    except (OSError, TypeError, ValueError):  # no function with source code: somebody has replaced it
        return {}
    if sources != LOSS_SOURCES:
        return {}
    return {
        name: module
        for name, module in model.named_modules()
        if loss_utils.LOSS_MAPPING.get(getattr(module, "loss_type", None) or "") is loss_utils.ForCausalLMLoss
        and vars(module).get("_loss_function") in (None, causal_lm_loss)
        and not changed.isdisjoint(module.modules())
    }


def _replacements(family: Family) -> dict[str, Replacement]:
    """By class."""
    from gdn.hf.accelerate import forward

    return {
        family.model: (forward.model_forward(family), "packed documents found once, for every layer"),
        family.mixer: (forward.mixer_forward(family), "convolved_qkv, gated_delta_rule; causal_conv1d_step, gated_delta_step in decoding"),
        family.gated_norm: (forward.gated_norm_forward(family), "gated_rms_norm"),
        family.norm: (forward.norm_forward(family), "rms_norm"),
    }


def check_sources(family: Family) -> None:
    """Raise `ImplementationError` unless the installed transformers defines the family's classes as they were when checked."""
    module = importlib.import_module(family.module)
    for name, known in family.sources.items():
        found = digest(getattr(module, name, None))
        if found not in known:
            import transformers

            raise ImplementationError(
                f"transformers {transformers.__version__} defines {family.module}.{name} in a way that gdn.accelerate has not been checked "
                f"against (its source has the digest {found}, known: {', '.join(known)}); known good: transformers {CHECKED}"
            )


@functools.cache
def digest(kind: type | Callable[..., Any] | None) -> str:
    """Sixteen digits that stand for the source code of a class or function, from its first line without decorators on."""
    if kind is None:
        return "absent"
    source = inspect.getsource(kind)
    return hashlib.sha256(source[source.index("class " if isinstance(kind, type) else "def ") :].strip().encode()).hexdigest()[:16]


def _check_module(name: str, module: nn.Module, family: Family) -> None:
    if type(module).__name__ == family.mixer and getattr(module, "activation", "silu") not in ("silu", "swish"):
        raise ArgumentError(f'{name}: its convolution has the activation "{module.activation}", the operators have "silu" only')
    if type(module).__name__ == family.mixer and getattr(module, "conv_kernel_size", 0) < 2:
        raise ArgumentError(f"{name}: expected a convolution of at least 2 taps, got {module.conv_kernel_size}")
    now = vars(module).get(_place(module))
    own = now is None or getattr(now, "__func__", None) is type(module).forward
    if not own and not getattr(now, _MARK, False):
        raise ImplementationError(
            f"{name}: its forward has been replaced already, by {getattr(now, '__module__', now)}; undo that first, or accelerate first"
        )


def _place(module: nn.Module) -> str:
    """The attribute that holds the forward: another one where Accelerate's hooks (offloading, `device_map`) stand before it."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def _set_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    setattr(forward, _MARK, True)
    setattr(module, _place(module), MethodType(forward, module))
    vars(module)["_gdn_no_pickle"] = _NoPickle()


class _NoPickle:
    """Stands in a changed module. Of a bound method a pickle holds the name only, so what `torch.save(model)` wrote could not be read."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _NoPickle:
        return self

    def __reduce__(self) -> str:
        raise ImplementationError(
            "an accelerated model cannot be pickled: gdn.restore(model) first, or save it with save_pretrained or as a state_dict"
        )


def _why_nothing(model: nn.Module) -> str:
    known = ", ".join(family.mixer for family in FAMILIES.values())
    alike = sorted({f"{type(m).__module__}.{type(m).__name__}" for m in model.modules() if "Delta" in type(m).__name__})
    found = f"it holds {', '.join(alike)}, which gdn.accelerate does not know" if alike else "it holds no gated delta rule layer"
    return f"model: expected one with layers of transformers ({known}); {type(model).__name__} does not fit: {found}"
