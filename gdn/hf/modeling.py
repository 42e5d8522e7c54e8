"""One model class for every mixer: `gdn.models.LM` with the manners of transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from gdn.core.checks import accumulate_dtype, shapes
from gdn.core.errors import ArgumentError
from gdn.hf.cache import GdnCache, GdnStaticCache
from gdn.hf.configuration import GdnConfig
from gdn.hf.inputs import Boundaries, Layout, layout
from gdn.hf.names import CACHE, one_of
from gdn.mixers.base import FLOAT32
from gdn.models.lm import LM
from gdn.models.start import Start
from gdn.ops import linear_cross_entropy


class GdnPreTrainedModel(PreTrainedModel):
    """What both models share: the module inside, initialisation, recomputation, embeddings."""

    config_class = GdnConfig
    config: GdnConfig
    base_model_prefix = "lm"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012
    _keep_in_fp32_modules_strict = FLOAT32  # type: ignore[assignment]
    _skip_keys_device_placement = ["past_key_values", "cache"]  # noqa: RUF012
    _is_stateful = False  # transformers' word for states that cannot go back: these can

    def __init__(self, config: GdnConfig) -> None:
        super().__init__(config)
        self.lm = LM(config.lm_config())
        if config.first_memory:
            self.lm.start = Start(self.lm.init_state(1))
        self._initialised = not self.lm.embedding.weight.is_meta

    @property
    def base_model(self) -> nn.Module:
        return self

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        self.config.first_memory = self.lm.start is not None
        super().save_pretrained(*args, **kwargs)

    def get_input_embeddings(self) -> nn.Module:
        return self.lm.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.lm.embedding = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module | None:
        return getattr(self.lm, "head", None)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm.head = new_embeddings  # type: ignore[assignment]

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        embeddings = super().resize_token_embeddings(*args, **kwargs)
        self.lm.config = self.config.lm_config()
        return embeddings

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Weights that no checkpoint gave, as gdn initialises them: each module's own way, then the model's."""
        if not self._initialised:
            super().initialize_weights()
            self._init_weights(self.lm)
            self._initialised = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        given = [p for p in module.parameters() if getattr(p, "_is_hf_initialized", False)]
        reset = getattr(module, "reset_parameters", None)
        if reset is None or len(given) == len(list(module.parameters())):
            return
        values = [p.clone() for p in given]
        reset()
        for parameter, value in zip(given, values):
            parameter.copy_(value)

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable[..., Any] | None = None, every_n_layers: int = 1
    ) -> None:
        if every_n_layers != 1:
            raise ArgumentError(f"every_n_layers: expected 1, blocks are recomputed all or none, got {every_n_layers}")
        self.lm.recompute = "block" if enable else "none"

    @property
    def is_gradient_checkpointing(self) -> bool:
        return self.lm.recompute == "block"

    @property
    def is_activation_checkpointing(self) -> bool:
        return self.lm.recompute == "block"

    def _run(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, given: Boundaries, cache: Any, use_cache: bool | None, hidden: bool
    ) -> tuple[BaseModelOutputWithPast, Layout]:
        """The last hidden states in the caller's order, and how the batch was laid out."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ArgumentError("input_ids: expected exactly one of input_ids and inputs_embeds")
        x = input_ids if inputs_embeds is None else inputs_embeds
        assert x is not None
        if inputs_embeds is None:
            shapes(("input_ids", x, "B T"))
        else:
            shapes(("inputs_embeds", x, "B T D"), D=self.config.hidden_size)
        if cache is not None and not isinstance(cache, GdnCache):
            raise ArgumentError(f"{CACHE}: expected a GdnCache, got {type(cache).__name__}")
        how = layout(x.shape[0], x.shape[1], x.device, given, cached=cache is not None)
        wanted = use_cache if use_cache is not None else self.config.use_cache and not self.training
        if cache is None and wanted and how.packing is None:
            cache = GdnCache()
        state = None if cache is None else cache.open(self.lm, x.shape[0], x.device)
        with _outputs_of(self.lm.blocks if hidden else ()) as seen:
            last, after = self.lm.hidden(how.arrange(x), packing=how.packing, state=state, mask=how.mask)
        if cache is not None:
            cache.close(after)
        last = how.restore(last)
        states = None
        if hidden:
            first = self.lm.embedding(x) if inputs_embeds is None else x
            states = (first, *(how.restore(h) for h in seen[:-1]), last)
        found: dict[str, Any] = {"last_hidden_state": last, "hidden_states": states, CACHE: cache}
        return BaseModelOutputWithPast(**found), how


class GdnModel(GdnPreTrainedModel):
    """The model without a head: hidden states."""

    _keys_to_ignore_on_load_unexpected = [r"lm\.head\.weight"]  # noqa: RUF012

    def __init__(self, config: GdnConfig) -> None:
        super().__init__(config)
        if hasattr(self.lm, "head"):
            del self.lm.head
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: GdnCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: GdnCache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        """
        Args:
            input_ids, inputs_embeds: `[B, T]` or `[B, T, width]`, one of the two.
            attention_mask: `[B, T]`, 0 at padding on either side; longer by the cached tokens with a cache.
            position_ids, seq_idx, cu_seq_lens_q (or cu_seqlens): documents of packed rows, in any one of the ways transformers has.
            past_key_values, cache: a `GdnCache` to go on from, updated; by the one name or the other.
            output_hidden_states: also the embeddings and the output of each block; the last one is normed.
        """
        given = Boundaries(attention_mask, position_ids, seq_idx, _first(cu_seq_lens_q, kwargs.get("cu_seqlens")))
        hidden = _first(output_hidden_states, self.config.output_hidden_states)
        output, _ = self._run(input_ids, inputs_embeds, given, one_of(past_key_values, cache), use_cache, bool(hidden))
        return output if _first(return_dict, self.config.return_dict) else output.to_tuple()


class GdnForCausalLM(GdnPreTrainedModel, GenerationMixin):
    """The language model: logits, loss, generation."""

    accepts_loss_kwargs = True

    def __init__(self, config: GdnConfig) -> None:
        super().__init__(config)
        self.post_init()

    @property
    def base_model(self) -> nn.Module:
        """The same module without the head, giving hidden states: TRL applies the head itself, to a part of the tokens at a time."""
        trunk = GdnModel.__new__(GdnModel)
        nn.Module.__init__(trunk)
        own = {name: value for name, value in vars(self).items() if name != "forward" and "hook" not in name}
        vars(trunk).update(own)
        return trunk

    def get_output_embeddings(self) -> nn.Module | None:
        if not self.config.tie_word_embeddings:
            return super().get_output_embeddings()
        embedding = self.lm.embedding  # the one matrix of a tied model, with what is asked of a head
        if not hasattr(embedding, "bias"):
            embedding.register_parameter("bias", None)
        return embedding

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        if self.config.tie_word_embeddings:
            self.set_input_embeddings(new_embeddings)
        else:
            super().set_output_embeddings(new_embeddings)

    @classmethod
    def from_lm(cls, lm: LM, **config: Any) -> GdnForCausalLM:
        """Around a model that exists; the weights are shared, not copied."""
        with torch.device("meta"):
            model = cls(GdnConfig.from_lm(lm.config, **config))
        model.lm = lm
        return model

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: GdnCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        seq_idx: Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: GdnCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """
        Args:
            labels: `[B, T]`, -100 where nothing is predicted. The label at t is predicted at t - 1, never across documents or from padding.
            logits_to_keep: logits of the last so many tokens (0: all), or of the given places.
            kwargs: `shift_labels` are labels already shifted; `num_items_in_batch` divides the summed loss.

        The other arguments are those of `GdnModel`. The loss never holds all logits at once, unless PEFT has put an adapter around the
        head; `config.logits_with_loss` says whether they are computed beside it.
        """
        given = Boundaries(attention_mask, position_ids, seq_idx, _first(cu_seq_lens_q, kwargs.get("cu_seqlens")))
        hidden = _first(output_hidden_states, self.config.output_hidden_states)
        output, how = self._run(input_ids, inputs_embeds, given, one_of(past_key_values, cache), use_cache, bool(hidden))
        last = output.last_hidden_state
        assert last is not None
        weight = self.lm.head_weight
        if weight.is_meta and not last.is_meta:
            raise ArgumentError("device_map: expected the embedding and the head in memory, got one of them offloaded")
        last = last.to(weight.device)  # layers may be spread over devices
        adapted = not self.config.tie_word_embeddings and hasattr(self.lm.head, "base_layer")  # by PEFT: more than its matrix
        weight = None if adapted else weight.to(last.dtype)
        targets = kwargs.get("shift_labels")
        if labels is not None and targets is None:
            targets = shifted(labels, how)
        loss = None if targets is None else self._loss(last, weight, targets, kwargs.get("num_items_in_batch"))
        logits = None
        if loss is None or self.config.logits_with_loss:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) and logits_to_keep else slice(None)
            last = last[:, kept if isinstance(logits_to_keep, int) else logits_to_keep]
            logits = self.lm.head(last) if weight is None else F.linear(last, weight)
        found: dict[str, Any] = {"loss": loss, "logits": logits, "hidden_states": output.hidden_states, CACHE: getattr(output, CACHE)}
        result = CausalLMOutputWithPast(**found)
        return result if _first(return_dict, self.config.return_dict) else result.to_tuple()

    def _loss(self, hidden: Tensor, weight: Tensor | None, targets: Tensor, items: Tensor | int | None) -> Tensor:
        """Without a weight of the logits that the head gives, held at once."""
        targets = targets.to(hidden.device)
        if weight is None:
            logits = self.lm.head(hidden)
            loss = F.cross_entropy(logits.to(accumulate_dtype(logits.dtype)).flatten(0, 1), targets.flatten(), reduction="sum")
            return loss / ((targets != -100).sum().clamp(min=1) if items is None else items)
        if items is None:
            return linear_cross_entropy(hidden, weight, targets)
        return linear_cross_entropy(hidden, weight, targets, reduction="sum") / items

    @staticmethod
    def create_masks_for_generate(inputs_embeds: Tensor, attention_mask: Tensor | None, is_first_iteration: bool, **kwargs: Any) -> Any:
        """For a cache of fixed addresses: the mask as it is, and none for a step, whose token is never padding."""
        return attention_mask if is_first_iteration or inputs_embeds.shape[1] > 1 else None

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> None:
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic", "static"):
            raise ArgumentError(f'cache_implementation: expected None, "dynamic" or "static", got {kind!r}')
        cache = one_of(model_kwargs.pop("past_key_values", None), model_kwargs.pop("cache", None))
        if cache is not None:
            cache._is_user_defined = True
            model_kwargs[CACHE] = cache
        elif generation_config.use_cache is not False:
            room = max(max_cache_length, generation_config.max_cache_len or 0)
            cache = model_kwargs[CACHE] = GdnStaticCache(room) if kind == "static" else GdnCache()
            if generation_config.is_assistant:
                cache.activate_past_recording()


def shifted(labels: Tensor, how: Layout) -> Tensor:
    """Targets: at each token the label of the next one, -100 at the end of a document and at padding."""
    targets = F.pad(labels[:, 1:], (0, 1), value=-100).clone()
    if how.packing is not None:
        documents = how.packing.documents.reshape(labels.shape)
        targets[:, :-1].masked_fill_(documents[:, 1:] != documents[:, :-1], -100)
    if how.real is not None:
        targets.masked_fill_(~how.real, -100)
        targets[:, :-1].masked_fill_(~how.real[:, 1:], -100)
    return targets


@contextmanager
def _outputs_of(blocks: Any) -> Iterator[list[Tensor]]:
    """Collect the outputs of blocks during a forward pass, and not when they are computed again for a gradient."""
    seen: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda module, args, output: seen.append(output[0])) for block in blocks]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _first(*values: Any) -> Any:
    """The first that is not None."""
    return next((v for v in values if v is not None), None)
