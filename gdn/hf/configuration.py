"""The configuration of every gdn model as a Hugging Face configuration."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from gdn.models.lm import LM
from gdn.models.store import HF_NAMES, read_config


class GdnConfig(PreTrainedConfig):
    """`LM.Config` under Hugging Face's names.

    Args:
        vocab_size, hidden_size, num_hidden_layers, intermediate_size, tie_word_embeddings: as everywhere.
        lm: the other fields of `LM.Config`, above all `pattern`, the list of mixers: `[{"type": "gated_deltanet", "heads": 6}]`.
        first_memory: the weights hold a memory that texts begin with (`gdn.models.start`); saving a model writes this down.
        logits_with_loss: give logits beside a loss. False never holds `[B, T, vocab]` in training; TRL needs them.
    """

    model_type = "gdn"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012
    attribute_map = {"num_layers": "num_hidden_layers"}  # noqa: RUF012

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 8
    intermediate_size: int = 1408
    tie_word_embeddings: bool = True
    lm: dict[str, Any] | None = None
    first_memory: bool = False
    logits_with_loss: bool = True
    use_cache: bool = True
    initializer_range: float = 0.02
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self.lm = {"pattern": [{"type": "gated_deltanet"}]} if self.lm is None else self.lm
        super().__post_init__(**kwargs)
        self.lm = {k: v for k, v in self.lm_config().to_dict().items() if k not in HF_NAMES}  # checked, defaults filled in

    def lm_config(self) -> LM.Config:
        """The configuration of the model inside. Impossible values raise `ConfigError`."""
        named = {theirs: getattr(self, theirs) for theirs in HF_NAMES.values()}
        return read_config({"model_type": self.model_type, "lm": self.lm or {}, **named})

    @classmethod
    def from_lm(cls, config: LM.Config, **rest: Any) -> GdnConfig:
        """From a model's configuration; `rest` are the other fields."""
        values = config.to_dict()
        named = {theirs: values.pop(ours) for ours, theirs in HF_NAMES.items()}
        return cls(**named, lm=values, **rest)
