"""Hugging Face transformers: their models on our operators."""
