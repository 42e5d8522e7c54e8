"""Evaluation: loss and bits per byte, whole and by position."""

from gdn.eval.perplexity import ByPosition, Perplexity, evaluate, evaluate_by_position

__all__ = ["ByPosition", "Perplexity", "evaluate", "evaluate_by_position"]
