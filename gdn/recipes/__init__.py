"""Runs as functions: each file defines functions that return a whole `Trainer.Config`. `gdn train NAME` runs one.

A recipe of your own is `path/to/file.py:function`.
"""

from gdn.recipes.find import load, names, summary

__all__ = ["load", "names", "summary"]
