"""Experiments: claims about models, tested on generated tasks. `gdn experiment NAME` runs one.

Each is a file that defines `EXPERIMENT`: the runs that it compares, the published figures and the picture. Results of those that have been
run are committed in `experiments/NAME/` of the repository.
"""

from gdn.experiments.find import load, names

__all__ = ["load", "names"]
