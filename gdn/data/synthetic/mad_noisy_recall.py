"""MAD, noisy in-context recall (arXiv 2403.17844): in-context recall in which some pairs are noise tokens that mean nothing."""

from __future__ import annotations

from gdn.data.synthetic.mad_recall import InContextRecall


class NoisyRecall(InContextRecall):
    """See the module\'s docstring."""

    vocab: int = 32
    """Keys, values and noise tokens."""
    noise_vocab: int = 16
    """How many of the tokens are noise."""
    noise: float = 0.2
    """Fraction of the pairs that are two noise tokens."""
