"""The command `gdn`. Options come from the configuration dataclasses; modules load when a command needs them."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from gdn.core.errors import FULL, ArgumentError, CheckpointError, ConfigError, GdnError, nearest

RunPath = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
OutPath = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
Family = Literal[
    "gdn", "run", "qwen3_5_text", "qwen3_next", "olmo_hybrid", "nvlabs",
    "gated_deltanet", "delta_net", "gated_deltaproduct", "kda", "gla", "gsa", "retnet", "hgrn2", "mamba2",
]  # fmt: skip
"""The names of `gdn.hf.families`, which needs transformers."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status. Errors of gdn are one line on standard error and status 1."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        return _told("", lambda: print(_usage()))
    if arguments[0] in ("-V", "--version"):
        from gdn import __version__

        return _told("", lambda: print(f"gdn {__version__}"))
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f'gdn: no command "{name}".{nearest(name, COMMANDS)}', file=sys.stderr)
        return 2
    return _told(f" {name}", lambda: COMMANDS[name](rest))


def _told(name: str, command: Callable[[], int | None]) -> int:
    """Its exit status; what went wrong is one line."""
    try:
        status = command() or 0
        sys.stdout.flush()
        return status
    except GdnError as error:
        print(f"gdn{name}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        with contextlib.suppress(OSError):  # the reader has gone; that is its right, and Python must not find out again as it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None and error.errno not in FULL:
            raise
        print(f"gdn{name}: {error.filename or 'cannot write'}: {error.strerror}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\ngdn{name}: interrupted", file=sys.stderr)
        return 130


def _usage() -> str:
    lines = ["usage: gdn COMMAND [options]        (gdn COMMAND --help for its options)", ""]
    lines += [f"  {name:<12}{(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    return "\n".join(lines)


def _train(arguments: list[str]) -> int:
    """Train a model: gdn train [RECIPE] [--size NAME] [options]; the same command resumes a stopped run."""
    from gdn import recipes
    from gdn.models.sizes import size
    from gdn.train import Trainer

    if "--list" in arguments:
        print("\n".join(f"{name:<10} {recipes.summary(name)}" for name in recipes.names()))
        return 0
    named = bool(arguments) and not arguments[0].startswith("-")
    recipe = arguments.pop(0) if named else "corpus"
    config = recipes.load(recipe)
    chosen = _take(arguments, "--size")
    if chosen is not None:
        config = config.with_(model=size(chosen).with_(vocab=config.model.vocab))
    description = (
        f"{recipes.summary(recipe)}\n\nRecipes: {', '.join(recipes.names())}. --size NAME picks a model size (gdn_d8, gdn_0.4b, ...)."
    )
    config = tyro.cli(
        Trainer.Config, default=config, args=arguments, prog=f"gdn train {recipe}" if named else "gdn train", description=description
    )
    return Trainer(config).run()


def _take(arguments: list[str], option: str) -> str | None:
    """Remove `option VALUE` or `option=VALUE` from the arguments and return the value."""
    for i, argument in enumerate(arguments):
        if argument == option:
            if i + 1 == len(arguments):
                raise ArgumentError(f"{option}: expected a value")
            value = arguments[i + 1]
            del arguments[i : i + 2]
            return value
        if argument.startswith(f"{option}="):
            del arguments[i]
            return argument.partition("=")[2]
    return None


def generate(
    run: RunPath,
    *,
    prompt: str = "",
    tokens: int = 256,
    temperature: float = 0.8,
    top_p: float = 0.95,
    top_k: int = 0,
    seed: int = 0,
    save_state: Path | None = None,
    load_state: Path | None = None,
    device: str = "auto",
) -> int:
    """Continue a text with a trained model; memory stays constant however long the text.

    Args:
        run: A training directory or a folder with model.safetensors.
        prompt: Text to continue. "-" reads standard input. Empty starts a new document.
        tokens: Number of tokens to generate; 0 goes on until interrupted.
        temperature: Divides the logits; 0 always takes the likeliest token.
        top_p: Draw from the smallest set of tokens with at least this probability in all.
        top_k: Draw from this many of the likeliest tokens; 0 is no limit.
        seed: Seed of the draws.
        save_state: Write what the model remembers after the prompt to this file.
        load_state: Go on from such a file: the prompt continues what was read there.
        device: "auto", "cpu" or "cuda".
    """
    import torch

    from gdn.core.files import expect_writable
    from gdn.models.sampling import Sampling, resume
    from gdn.models.sampling import generate as tokens_of
    from gdn.models.state import LMState

    if tokens < 0:
        raise ArgumentError(f"tokens: expected 0 or more, got {tokens}")
    if save_state is not None:
        expect_writable(save_state, "save_state", replaced=True)
    model, tokenizer = _open(run, device)
    text = _utf8("prompt", sys.stdin.read if prompt == "-" else lambda: prompt)
    ids = list(tokenizer.encode(text))
    if not ids and load_state is None:
        ids = [tokenizer.end_id]
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k, seed=seed)
    state = None if load_state is None else LMState.load(load_state, model)
    sys.stdout.write(text)
    decoder = tokenizer.stream()
    tokens_in = torch.tensor([ids], dtype=torch.int64, device=model.embedding.weight.device)
    prompt_ids, state = resume(model.eval(), tokens_in, state)
    if save_state is not None:
        state.save(save_state)
    stream = tokens_of(model, prompt_ids, sampling, state=state)
    for count, token in enumerate(stream, start=1):
        if int(token) == tokenizer.end_id:
            break
        sys.stdout.write(decoder(int(token)))
        sys.stdout.flush()
        if count == tokens:
            break
    sys.stdout.write(decoder.flush() + "\n")
    return 0


def evaluate(
    run: RunPath,
    *,
    source: str | None = None,
    length: int = 0,
    max_tokens: int = 262_144,
    device: str = "auto",
) -> int:
    """Loss and bits per byte on held-out text, whole and by position; with --tasks NAMES, tasks of lm-evaluation-harness.

    Positions go beyond the training length. The options of --tasks: gdn eval --tasks --help.

    Args:
        run: A training directory or a folder with model.safetensors.
        source: Text to evaluate on; default: validation text of the run, or, for a folder with a model alone, Python source from here.
        length: Longest context in tokens; 0 is four times the training length.
        max_tokens: Stop after this many tokens.
        device: "auto", "cpu" or "cuda".
    """
    from gdn.data import DataConfig
    from gdn.eval.report import print_evaluation

    model, tokenizer = _open(run, device)
    trained = _data_of(run)
    data = trained or DataConfig()
    data = data if source is None else data.with_(validation_source=source)
    print_evaluation(model, tokenizer, data, trained and trained.length, length=length, max_tokens=max_tokens)
    return 0


def evaluate_on_tasks(
    run: RunPath,
    *,
    tasks: str,
    limit: int = 0,
    num_fewshot: int | None = None,
    include_path: Path | None = None,
    batch: int = 16,
    max_length: int = 0,
    bos: Literal["auto", "yes", "no"] = "auto",
    device: str = "auto",
) -> int:
    """Tasks of lm-evaluation-harness. The results are printed, and written to evaluations/ in the folder of the run.

    Args:
        run: A training directory or a folder with model.safetensors.
        tasks: Names separated by commas; patterns with *, groups, tags and yaml files too. "lm-eval ls tasks" lists them.
        limit: Only the first documents of each task; 0 is all of them.
        num_fewshot: Solved examples before each question; default: what each task says. A task that says 0 keeps 0.
        include_path: A folder with more tasks.
        batch: Texts that are read together.
        max_length: Most tokens of context, to compare with models that have such a limit; 0 is no limit: long texts are read once.
        bos: Whether each text follows the token that begins documents; auto does as the model was trained.
        device: "auto", "cpu" or "cuda".
    """
    from gdn.eval.tasks import TaskOptions, evaluate_tasks, print_results, write_results

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    options = TaskOptions(
        limit=limit,
        num_fewshot=num_fewshot,
        include_path=include_path,
        batch=batch,
        max_length=max_length,
        bos=bos,
        device=device,
    )
    results = evaluate_tasks(run, names, options)
    print_results(results)
    print(write_results(results, run))
    return 0


def _eval(arguments: list[str]) -> int:
    if any(argument.partition("=")[0] == "--tasks" for argument in arguments):
        if "--help" in arguments or "-h" in arguments:
            arguments = ["--help"]
        return tyro.cli(evaluate_on_tasks, args=arguments, prog="gdn eval")
    return tyro.cli(evaluate, args=arguments, prog="gdn eval")


_eval.__doc__ = evaluate.__doc__


def _data_of(run: Path) -> Any:
    """The text that a training directory, or the `model` folder in one, was trained on; None for any other folder with a model."""
    from gdn.data import DataConfig
    from gdn.models.store import model_folder

    saved = model_folder(run).resolve().parent / "config.json"
    try:
        values = json.loads(saved.read_text("utf-8")) if saved.is_file() else {}
    except ValueError as error:
        raise CheckpointError(f"{saved} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{saved} is damaged: expected a JSON object")
    return DataConfig.from_dict(values["data"]) if "data" in values else None


def drift(
    run: RunPath,
    *,
    source: str | None = None,
    tokens: int = 1024,
    device: str = "auto",
) -> int:
    """How far memories stored in bf16, fp16, int8 or fp8 drift from float32 as a text goes on.

    Args:
        run: A training directory or a folder with model.safetensors.
        source: A text file to read; default: the text that the model itself writes.
        tokens: Length of the text.
        device: "auto", "cpu" or "cuda".
    """
    import itertools

    import torch

    from gdn.eval.drift import drift as measured
    from gdn.models.sampling import Sampling
    from gdn.models.sampling import generate as tokens_of

    if tokens < 1:
        raise ArgumentError(f"tokens: expected at least 1, got {tokens}")
    model, tokenizer = _open(run, device)
    if source is None:
        begin = torch.tensor([[tokenizer.end_id]], device=model.embedding.weight.device)
        ids = [int(token) for token in itertools.islice(tokens_of(model.eval(), begin, Sampling()), tokens)]
    else:
        ids = list(tokenizer.encode(_utf8("source", lambda: Path(source).read_text("utf-8"))))[:tokens]
        if not ids:
            raise ArgumentError(f"source: expected text, got none in {source}")
    rows = measured(model.eval(), torch.tensor([ids], device=model.embedding.weight.device))
    print(f"{'precision':<10}{'tokens':>8}{'memory error':>14}{'KL, nats':>12}{'same token':>12}{'bytes':>12}")
    for row in sorted(rows, key=lambda r: (r.precision, r.tokens)):
        values = f"{row.memory_error:>14.2e}{row.divergence:>12.2e}{row.agreement:>12.1%}{row.bytes_per_sequence:>12,}"
        print(f"{row.precision:<10}{row.tokens:>8}{values}")
    return 0


def _utf8(name: str, read: Callable[[], str]) -> str:
    """What an argument gives to read. Bytes that are no UTF-8 come as an error, or, from a terminal, as half characters."""
    try:
        text = read()
        text.encode("utf-8")
    except UnicodeDecodeError as error:
        raise ArgumentError(f"{name}: expected UTF-8, got {error.object[error.start]:#04x} as byte {error.start}") from None
    except UnicodeEncodeError as error:
        raise ArgumentError(f"{name}: expected UTF-8, which character {error.start} is not") from None
    return text


def _open(run: Path, device: str) -> tuple[Any, Any]:
    """The model and tokenizer of a training directory or an exported folder."""
    from gdn.core.device import named_device
    from gdn.data import load_tokenizer
    from gdn.models.store import load_model, model_folder

    folder = model_folder(run)
    return load_model(folder, device=named_device(device)), load_tokenizer(str(folder))


def tokenizer(
    out: OutPath,
    *,
    source: str = "python",
    vocab: int = 8192,
    megabytes: float = 100.0,
    text_field: str = "text",
    validation_fraction: float = 0.02,
) -> int:
    """Learn a byte-level BPE tokenizer from text, for --data.tokenizer.

    Only documents that are trained on are read, in random order, as `gdn train` splits them.

    Args:
        out: A new folder, or a file that ends in .json.
        source: What --data.source of `gdn train` takes.
        vocab: Number of tokens, the 256 bytes and the end of a document among them.
        megabytes: Of text to learn from, at most.
        text_field: Field or column of .jsonl, .parquet and hf: that holds the text.
        validation_fraction: What data.validation_fraction of the run will be.
    """
    from gdn.data import ByteTokenizer, train_bpe
    from gdn.data.find import open_source
    from gdn.data.source import View, up_to

    if megabytes <= 0:
        raise ArgumentError(f"megabytes: expected above 0, got {megabytes}")
    if not 0 <= validation_fraction < 1:
        raise ArgumentError(f"validation_fraction: expected at least 0 and below 1, got {validation_fraction}")
    if any(item.strip().startswith("tokens:") for item in source.split(",")):
        raise ArgumentError(f"source: expected text, got tokens: {source}")
    file = out if out.suffix == ".json" else out / "tokenizer.json"
    if file.exists():
        raise ArgumentError(f"out: {file} exists; expected a new one, since models depend on their tokenizer")
    text = open_source(source, tokenizer=ByteTokenizer(), text_field=text_field, fraction=validation_fraction)
    made = train_bpe(up_to(text.documents(View(side="train")), megabytes * 1e6), vocab, out)
    print(f"{file}: {made.vocab_size:,} tokens")
    print(shlex.join(["gdn", "train", "--data.tokenizer", str(out), "--model.vocab", str(made.vocab_size), "--data.source", source]))
    return 0


def tokens(
    out: OutPath,
    *,
    source: str = "python",
    tokenizer: str = "bytes",
    text_field: str = "text",
) -> int:
    """Tokenise text once, into a memory-mapped file for --data.source tokens:FILE.

    Args:
        out: The file, NAME.bin; NAME.json beside it says how to read it.
        source: What --data.source of `gdn train` takes.
        tokenizer: "bytes", a tokenizer.json, or a folder that holds one.
        text_field: Field or column of .jsonl, .parquet and hf: that holds the text.
    """
    from gdn.data import load_tokenizer, prepare

    prepare(source, load_tokenizer(tokenizer), out, text_field=text_field)
    about = json.loads(out.with_suffix(".json").read_text())
    print(f"{out}: {about['tokens']:,} tokens of {about['documents']:,} documents, {about['bytes']:,} bytes of text")
    return 0


def info(
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")],
    *,
    length: int = 4096,
    precision: Literal["fp32", "bf16"] = "fp32",
    exports: bool = False,
) -> int:
    """The resolved configuration of a size, recipe or run, with parameters, operations, state and memory; --mixers lists every mixer.

    Args:
        name: A size (gdn_0.4b, gdn_1.3b, gdn_d8), a recipe, or a training directory.
        length: Context length for operations, state and memory.
        precision: Of activations.
        exports: Instead: which formats of `gdn convert` the model can be written in, and what the others cannot express.
    """
    from gdn.eval.report import print_config

    if length < 1:
        raise ArgumentError(f"length: expected at least 1, got {length}")
    if exports:
        return _print_exports(_config_of(name))
    print_config(_config_of(name), title=name, length=length, itemsize=4 if precision == "fp32" else 2)
    return 0


def _print_exports(config: Any) -> int:
    from gdn.core.errors import require

    require("transformers", "hf", "gdn info --exports")
    from gdn.hf.families import refusals

    for name, reason in refusals(config).items():
        print(f"{name:<20}{reason or 'yes'}")
    return 0


def mixers(*, width: int = 1024, length: int = 4096, precision: Literal["fp32", "bf16"] = "fp32") -> int:
    """Parameters, operations and state of every mixer in its default configuration.

    Args:
        width: Channels of the residual stream.
        length: Context length for operations and state.
        precision: Of activations.
    """
    from gdn.eval.report import print_mixers

    for name, value in (("width", width), ("length", length)):
        if value < 1:
            raise ArgumentError(f"{name}: expected at least 1, got {value}")
    print_mixers(width=width, length=length, itemsize=4 if precision == "fp32" else 2)
    return 0


def _info(arguments: list[str]) -> int:
    if "--mixers" in arguments:
        arguments.remove("--mixers")
        return tyro.cli(mixers, args=arguments, prog="gdn info --mixers")
    return tyro.cli(info, args=arguments, prog="gdn info")


_info.__doc__ = info.__doc__


def _config_of(name: str) -> Any:
    """The model configuration of a size, a recipe, a training directory or a model folder."""
    from gdn import recipes
    from gdn.models.sizes import SIZES, size
    from gdn.models.store import model_folder, stored_config

    if name in SIZES or (name.startswith("gdn_d") and name[5:].isdecimal()):
        return size(name)
    if name in recipes.names() or name.endswith(".py") or ".py:" in name:
        return recipes.load(name).model
    if Path(name).is_dir():
        return stored_config(model_folder(name))
    known = nearest(name, {*SIZES, "gdn_d8", *recipes.names()})
    raise ConfigError(f'"{name}" is neither a folder with a model nor a known size or recipe.{known}')


def convert(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")],
    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")],
    *,
    to: Annotated[Family, tyro.conf.arg(metavar="NAME")],
    check: bool = False,
) -> int:
    """Convert a checkpoint between this package, transformers, flash-linear-attention and the official code: gdn convert SRC DST --to NAME.

    Names: gdn (for transformers), run (as a training run writes it), qwen3_5_text, qwen3_next, olmo_hybrid, nvlabs, and FLA's
    gated_deltanet, delta_net, gated_deltaproduct, kda, gla, gsa, retnet, hgrn2, mamba2.

    Args:
        source: A training directory, or a folder of any of those families.
        target: A new folder.
        to: The family to write. What it cannot express is an error that names it.
        check: Open the result and compare logits, then convert it back and compare bytes.
    """
    from gdn.core.errors import require
    from gdn.models.store import checkpoint_folder, expect_new

    checkpoint_folder(source)
    expect_new(target)
    require("transformers", "hf", "gdn convert")
    from gdn.hf.convert import convert as converted

    done = converted(source, target, to)
    left_out = f"; left out {len(done.unused)} that belong to no language model" if done.unused else ""
    print(f"{done.source} -> {done.target}: {done.tensors} tensors, {done.bytes / 1e6:,.1f} MB{left_out}")
    if not check:
        return 0
    from gdn.hf.verify import verify

    found = verify(source, target, done.source, done.target)
    print(f"opened by {found.opened_by}: largest difference of logits {found.logits_error:.1e} of the largest")
    moved = f" but for {found.moved} norms, which are stored around another constant and mean the same" if found.moved else ""
    changed = f"{len(found.changed)} changed, the first {found.changed[0]}" if found.changed else f"the same bytes{moved}"
    print(f"converted back to {done.source}: {found.compared} tensors, {changed}")
    return int(found.logits_error > 1e-4)


def doctor(*, device: str = "auto", seconds: float = 55) -> int:
    """Which implementations can run here, why others cannot, the error of each against float64, and its time.

    Args:
        device: "auto", "cpu" or "cuda".
        seconds: Begin no operator after that many seconds; 0 is no limit.
    """
    from gdn.testing.doctor import examine

    return examine(device, seconds)


def check(
    model: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")],
    *,
    accelerate: bool = False,
    length: int = 96,
    seed: int = 0,
    device: str = "auto",
) -> int:
    """Whether packing, padding, split prefill, stepping and rollback leak in a model, ours or of transformers.

    Reads random tokens in ways that must give the same logits, and prints the largest relative difference beside what rounding explains.
    The exit status is 1 when something leaks.

    Args:
        model: A training directory or model folder of gdn, or a folder or name that transformers loads.
        accelerate: Run a transformers model on gdn's operators (gdn.accelerate).
        length: Tokens of a row, at least 24.
        seed: Seed of the tokens.
        device: "auto", "cpu" or "cuda".
    """
    from gdn.core.device import named_device
    from gdn.testing.model_checks import load_any, report

    loaded = load_any(model, named_device(device))
    if accelerate:
        import gdn

        gdn.accelerate(loaded)
    return report(loaded, title=f"{model}{', accelerated' if accelerate else ''}", length=length, seed=seed)


def _bench(arguments: list[str]) -> int:
    """Time the gated delta rule on the CPU beside transformers', correctness first: gdn bench ops [options]."""
    targets = {"ops": "The gated delta rule on the CPU beside transformers'."}
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: gdn bench {{{','.join(targets)}}} [options]        (gdn bench NAME --help for its options)\n")
        print("\n".join(f"  {name:<12}{about}" for name, about in targets.items()))
        return 0
    if arguments[0] not in targets:
        raise ConfigError(f'no benchmark "{arguments[0]}".{nearest(arguments[0], targets)}')
    from gdn.testing.bench import bench_ops

    return tyro.cli(bench_ops, args=arguments[1:], prog="gdn bench ops")


def experiment(
    names: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[NAME ...]")] = (),
    *,
    toy: bool = False,
    only: str = "",
    directory: Path | None = None,
    device: str = "auto",
    jobs: int = 1,
    lanes: int | None = None,
    budget: float | None = None,
) -> int:
    """Test claims on generated tasks: train the models they compare, then a table and a picture. Without a name: list them.

    Args:
        names: Some of those listed, or "all". The same command again goes on with the runs that are missing.
        toy: A few steps of tiny models, to see that it works; results go to runs/experiments/NAME-toy.
        only: Do only the models whose name contains this.
        directory: Where results.jsonl, table.md and plot.png go; with several names each has a folder there. Default: experiments/NAME.
        device: "auto", "cpu" or "cuda"; with several jobs "cuda" is every GPU.
        jobs: Processes that the runs are spread over.
        lanes: Runs that each process advances in turns, on a GPU no more than its memory holds. Default: one, on a GPU 16.
        budget: Seconds after which what is not finished is dropped. First seeds come before second ones.
    """
    if not names:
        from gdn import experiments

        print("\n".join(f"{each:<20}{experiments.load(each).claim}" for each in experiments.names()))
        return 0
    from gdn.experiments.command import experiments as carry_out

    carry_out(names, toy=toy, only=only, directory=directory, device=device, jobs=jobs, lanes=lanes, budget=budget)
    return 0


def _command(function: Callable[..., int], name: str) -> Callable[[list[str]], int]:
    def run(arguments: list[str]) -> int:
        return tyro.cli(function, args=arguments, prog=f"gdn {name}")

    run.__doc__ = function.__doc__
    return run


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": _train,
    "generate": _command(generate, "generate"),
    "eval": _eval,
    "drift": _command(drift, "drift"),
    "bench": _bench,
    "convert": _command(convert, "convert"),
    "tokenizer": _command(tokenizer, "tokenizer"),
    "tokens": _command(tokens, "tokens"),
    "info": _info,
    "doctor": _command(doctor, "doctor"),
    "experiment": _command(experiment, "experiment"),
    "check": _command(check, "check"),
}

if __name__ == "__main__":
    sys.exit(main())
