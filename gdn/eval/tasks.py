"""Tasks of lm-evaluation-harness on a run folder: find them, evaluate, keep the results beside the run."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gdn.core.errors import ArgumentError, DataError, nearest, require
from gdn.models.state import fingerprint
from gdn.models.store import model_folder

FOLDER = "evaluations"
"""The folder in that of the run that results go to."""

SEED = 1234
"""The harness's own."""


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """How tasks are evaluated."""

    limit: int = 0
    """Only the first documents of each task; 0 is all of them."""
    num_fewshot: int | None = None
    """Solved examples before each question. None is what each task says; a task that says 0 keeps 0."""
    include_path: Path | None = None
    """A folder with more tasks."""
    batch: int = 16
    """Texts that are read together."""
    max_length: int = 0
    """Most tokens of context, for comparison with models that have such a limit; 0 is no limit."""
    bos: Literal["auto", "yes", "no"] = "auto"
    """Whether each text follows the token that begins documents; auto does as the model was trained."""
    device: str = "auto"
    """"auto", "cpu" or "cuda"."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ArgumentError(f"limit: expected 0 (all) or more documents, got {self.limit}")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ArgumentError(f"num_fewshot: expected 0 or more, got {self.num_fewshot}")


def evaluate_tasks(run: str | Path, names: Sequence[str], options: TaskOptions) -> dict[str, Any]:
    """The results of a run folder on tasks, as plain values.

    Args:
        run: a training directory or a folder with a model.
        names: of tasks, groups or tags, patterns of names with `*`, or yaml files.
        options: how.

    Raises:
        ArgumentError: there is no such task, or an option is impossible.
        DataError: a task's data cannot be loaded.
    """
    require("lm_eval", "eval", "gdn eval --tasks")
    from lm_eval.evaluator import evaluate
    from lm_eval.utils import handle_non_serializable

    from gdn.eval.harness import GdnHarness

    model_folder(run)
    _seed()
    loaded = load_tasks(names, options.include_path)
    for task in loaded["tasks"].values():
        given = task.get_config("num_fewshot")
        if given != 0:
            task.set_config("num_fewshot", (given or 0) if options.num_fewshot is None else options.num_fewshot)
        task.set_fewshot_seed(seed=SEED)
    model = GdnHarness(run, batch_size=options.batch, device=options.device, max_length=options.max_length, bos=options.bos)
    found: Any = evaluate(lm=model, task_dict=loaded, limit=options.limit or None, log_samples=False)
    about = {"model": fingerprint(model.model), "tasks": list(names), **asdict(options), "lm_eval": version("lm_eval")}
    return json.loads(json.dumps({**found, "gdn": about}, default=handle_non_serializable))


def _seed() -> None:
    """As the harness's own command seeds: some tasks shuffle while they load."""
    random.seed(0)
    np.random.seed(SEED)


def load_tasks(names: Sequence[str], include_path: str | Path | None = None) -> Any:
    """Tasks by name. Only where a folder of the caller's does not hold them all is the harness's own index of thousands read."""
    from lm_eval.tasks import TaskManager

    if include_path is not None and not Path(include_path).is_dir():
        raise ArgumentError(f"include_path: expected a folder with tasks, got {include_path}")
    manager = None if include_path is None else TaskManager(include_path=str(include_path), include_defaults=False)
    if manager is None or any(not _found(manager, name) for name in names):
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
    chosen = [match for name in names for match in _found(manager, name) or _unknown(manager, name)]
    if not chosen:
        raise ArgumentError("tasks: expected at least one name")
    try:
        return manager.load(list(dict.fromkeys(chosen)))
    except (OSError, ValueError, RuntimeError, ImportError) as error:  # what datasets and the tasks' own code raise
        raise DataError(f"tasks: {', '.join(chosen)}: cannot be loaded: {error}") from error


def _found(manager: Any, name: str) -> list[str]:
    """The names that a name or pattern stands for."""
    if name in manager.task_index or (name.endswith((".yaml", ".yml")) and Path(name).is_file()):
        return [name]
    return manager.match_tasks([name]) if "*" in name else []


def _unknown(manager: Any, name: str) -> list[str]:
    close = nearest(name, manager.all_tasks)
    hint = close if "Did you mean" in close else " lm-eval ls tasks lists them."
    raise ArgumentError(f'tasks: lm-evaluation-harness knows no task "{name}".{hint}')


def print_results(results: dict[str, Any]) -> None:
    """The harness's own tables."""
    from lm_eval.utils import make_table

    print(make_table(results))
    if results.get("groups"):
        print(make_table(results, "groups"))


def write_results(results: dict[str, Any], folder: Path) -> Path:
    """Write results to `folder/evaluations/<time>.json`; the file."""
    path = folder / FOLDER / f"{datetime.now(UTC):%Y-%m-%dT%H-%M-%S.%f}.json"
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(results, indent=2) + "\n")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise DataError(f"cannot write {path}: {error}") from error
    return path
