"""``medgen check``: would the run of an args file begin? Asked before torchrun, whose own exit code says nothing."""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from medgen.errors import UserError, end_when_told, find_user_error

if TYPE_CHECKING:
    from monai.bundle import ConfigParser

__all__ = ["app", "check_args_file", "exit_code", "launched_processes"]

app = typer.Typer(add_completion=False, rich_markup_mode=None)

# what a volume or a network says that may answer the next time
PASSING = {
    *(errno.EIO, errno.ESTALE, errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ETIMEDOUT, errno.ENODEV, errno.ENXIO),
    *(errno.ENOTCONN, errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTUNREACH, errno.ENETUNREACH),
    *(errno.ENETDOWN, errno.EHOSTDOWN, errno.EREMOTEIO, errno.ENOMEM, errno.EMFILE, errno.ENFILE),
}
# what joins the other processes of a training, in multi_gpu_train.json: see `_check_shares`
JOINS = ("medgen.distributed.start(", "medgen.distributed.check_shards(")
# losses that read weights of their own
LOSSES = ("loss", "train#perceptual_loss")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def check(
    context: typer.Context,
    args_file: Annotated[Path, typer.Argument(metavar="ARGS_FILE", help="As for monai.bundle run --args_file.")],
) -> None:
    """See in the folder of a bundle whether what ARGS_FILE says would begin; more --NAME VALUE override it.

    Settings, data and weights are checked by one process, for the processes that PET_NNODES and PET_NPROC_PER_NODE
    announce. The output folder is made, but nothing is written there and no tracker hears of it. Ends with 0, with 78
    where a person must mend something, with 75 where the next attempt may succeed.
    """
    end_when_told()
    try:
        typer.echo(f"ok: {check_args_file(args_file, context.args)}")
        return
    except Exception as error:
        if os.environ.get("MEDGEN_TRACEBACK"):
            raise
        print(f"error: {_one_line(error)}", file=sys.stderr)
        code = exit_code(error)
    # not within the block: the command line takes an exception with a UserError behind it for that one
    raise typer.Exit(code)


def check_args_file(args_file: str | Path, overrides: Sequence[str] = ()) -> str:
    """Check the run of an args file, in the folder of its bundle.

    Args:
        args_file: JSON or YAML file of arguments of ``monai.bundle run``.
        overrides: further words of its command line, such as ``["--shard", "0/4"]``.

    Returns:
        What will run, in one line.

    Raises:
        UserError: a setting, the data or a file of weights is wrong.
        Exception: whatever else a broken config or volume leads to; see :func:`exit_code`.
    """
    from medgen.settings import check_names

    args_file = Path(args_file)
    if not args_file.is_file():
        raise UserError(f"ARGS_FILE must be a JSON file, there is none at {args_file}; name one that is there")
    arguments = {**_arguments(args_file), **_parse(overrides)}
    files = arguments["config_file"]
    for file in [files] if isinstance(files, str) else files:
        if not Path(file).is_file():
            raise UserError(
                f"{args_file} names {file}, there is none in {Path.cwd()}; run this in the folder of its bundle"
            )
    check_names(["medgen", "--args_file", str(args_file), *overrides])
    processes = launched_processes()
    with _as_it_was(), _announced(processes):
        parser = _read(arguments)
        _check_references(parser)
        about = [_names(arguments["config_file"])]
        if processes > 1:
            about.append(f"{processes} processes")
        _initialise(parser, str(arguments.get("init_id") or "initialize"))
        about += _check_data(parser, processes)
        _check_weights(parser)
        _check_checkpoint(parser)
        output = parser.get_parsed_content("output_dir") if "output_dir" in parser else None
    return ", ".join(about) + (f" -> {output}" if output else "")


def exit_code(error: BaseException) -> int:
    """EX_TEMPFAIL (75) where an error of a volume, of a network or of memory is behind it, else EX_CONFIG (78)."""
    for cause in _causes(error):
        if isinstance(cause, MemoryError | ConnectionError | TimeoutError):
            return os.EX_TEMPFAIL
        if isinstance(cause, OSError) and cause.errno in PASSING:
            return os.EX_TEMPFAIL
        # requests' and urllib3's own, which MLflow passes on
        if type(cause).__module__.partition(".")[0] in ("requests", "urllib3"):
            return os.EX_TEMPFAIL
    return os.EX_CONFIG


def launched_processes() -> int:
    """Processes that torchrun will start by its PET_NNODES and PET_NPROC_PER_NODE; 1 where they do not say.

    ``gpu`` counts the GPUs that are here: a container that asks for none, such as an init container, sees none.

    Raises:
        UserError: torchrun would refuse them.
    """
    import torch
    from torch.distributed.run import determine_local_world_size, parse_min_max_nnodes

    nodes, per_node = os.environ.get("PET_NNODES", "1"), os.environ.get("PET_NPROC_PER_NODE", "1")
    try:
        per_node_count = (
            1 if per_node == "gpu" and not torch.cuda.is_available() else determine_local_world_size(per_node)
        )
        count = parse_min_max_nnodes(nodes)[1] * per_node_count
    except (ValueError, RuntimeError) as error:
        raise UserError(
            f"PET_NNODES and PET_NPROC_PER_NODE must be numbers, got {nodes!r} and {per_node!r}; set them as torchrun "
            "takes them"
        ) from error
    if count < 1:
        raise UserError(f"PET_NNODES and PET_NPROC_PER_NODE must be at least 1, got {nodes} and {per_node}; raise them")
    return count


def _arguments(args_file: Path) -> dict[str, Any]:
    """What an args file holds: settings by their names, the config's files among them."""
    from monai.bundle import ConfigParser

    try:
        arguments = ConfigParser.load_config_file(args_file)
    except ValueError as error:  # of JSON
        raise UserError(f"{args_file} must be a JSON file, got what is none ({error}); correct it") from error
    if not isinstance(arguments, dict) or not arguments.get("config_file"):
        raise UserError(
            f"{args_file} must hold settings by their names, with a config_file such as configs/train.json among them, "
            "it does not; add them"
        )
    return arguments


def _parse(words: Sequence[str]) -> dict[str, Any]:
    """``--name value`` as fire reads them for ``monai.bundle run``."""
    from fire import Fire

    return Fire(lambda **settings: settings, command=list(words), serialize=lambda _: None)


def _read(arguments: Mapping[str, Any]) -> ConfigParser:
    """The config with all overrides, without the handlers of a tracker, whose construction begins a run."""
    from monai.bundle import ConfigParser, ConfigWorkflow
    from monai.bundle.workflows import logger

    settings = dict(arguments)
    tracking = settings.pop("tracking", None)
    if isinstance(tracking, str) and tracking != "mlflow":
        for name, value in ConfigParser.load_config_file(tracking)["configs"].items():
            if name not in ("trainer", "validator", "evaluator"):
                settings.setdefault(name, value)
    settings.pop("logging_file", None)
    level = logger.level
    logger.setLevel(logging.ERROR)  # that no logging file is read
    try:
        workflow = ConfigWorkflow(logging_file=False, **settings)
    finally:
        logger.setLevel(level)
    if workflow.run_id not in workflow.parser:
        raise UserError(f"{_names(settings['config_file'])} has no {workflow.run_id!r} to run; set --run_id")
    parser = workflow.parser
    if "cache_rate" in parser:
        parser["cache_rate"] = 0.0  # to see one image, none need be kept
    parser.parse(reset=True)
    return parser


def _check_references(parser: ConfigParser) -> None:
    """See that every @NAME of the config exists: those that ``run`` alone uses would be missed hours later."""
    resolver = parser.ref_resolver
    for item_id, item in resolver.items.items():
        value = item.get_config()
        if not isinstance(value, str):
            continue
        for name in resolver.match_refs_pattern(value):
            if name not in resolver.items:
                raise UserError(f"{item_id} names @{name}, which the config does not have; correct or define it")


def _initialise(parser: ConfigParser, init_id: str) -> None:
    """The config's own checks, in their order, but for those that need the other processes."""
    steps = parser[init_id] if init_id in parser else []
    for number, step in enumerate(steps):
        if not any(name in str(step) for name in JOINS):
            parser.get_parsed_content(f"{init_id}::{number}")


def _check_data(parser: ConfigParser, processes: int) -> list[str]:
    """Read the datalists, and the first image of each split; returns how much there is, in words."""
    about = []
    if _has(parser, "samples"):  # seeds and prompts in place of images
        parser.get_parsed_content("samples")
    for split, prefix in {"training": "train::", "validation": "validate::", "": ""}.items():
        items = _items(parser, prefix)
        if items is None:
            continue
        _read_first(parser, prefix, items)
        _check_shares(parser, split, len(items), processes)
        about.append(f"{len(items)} {split or 'input'} images")
    return about


def _read_first(parser: ConfigParser, prefix: str, items: Sequence[Mapping[str, Any]]) -> None:
    """One image as the run will see it: a dataset may add to an item what its transforms need."""
    if _has(parser, f"{prefix}dataset::_target_"):
        items, transform = parser.get_parsed_content(f"{prefix}dataset"), None
    elif _has(parser, f"{prefix}preprocessing"):  # a dataset that would write a cache
        transform = parser.get_parsed_content(f"{prefix}preprocessing")
    else:
        return
    if len(items):  # a shard may have none, and one that is done has none left
        first = items[0]
        if transform is not None:
            transform(first)


def _check_shares(parser: ConfigParser, split: str, images: int, processes: int) -> None:
    """See that every process gets its share: of each step, and of the validation (``check_shards``)."""
    loader = parser["train"]["dataloader"] if _has(parser, "train::dataloader") else {}
    if split == "training" and loader.get("_target_") == "medgen.data.ResumableDataLoader":
        batch_size = parser.get_parsed_content("train::dataloader::batch_size")
        if batch_size * processes > images:
            raise UserError(
                f"a training step takes {batch_size * processes} images (batch_size {batch_size} × {processes} "
                f"processes), the training split holds {images}; lower --batch_size"
            )
    if split == "validation" and images < processes:
        raise UserError(
            f"the validation split holds {images} images for {processes} processes; start fewer processes or enlarge "
            "the split"
        )


def _check_weights(parser: ConfigParser) -> None:
    """See that weights and models named are files that are there."""
    from medgen.sources import find_weights

    for name in parser.get():
        if name != "weights" and not name.endswith("_weights") and name != "text_encoder":
            continue
        source = parser.get_parsed_content(name)
        if source in (None, "", "null"):
            continue
        path = Path(source) if name == "text_encoder" else find_weights(source, name)
        if not path.exists():
            setting = "model_path" if name == "weights" else name.replace("autoencoder_weights", "autoencoder_path")
            raise UserError(f"{setting} must name a file that is there, got {path}; copy it there, or set --{setting}")
    for name in LOSSES:
        if _has(parser, name):
            parser.get_parsed_content(name)


def _check_checkpoint(parser: ConfigParser) -> None:
    """See that a training which goes on can: the likeliest mistake is a setting that was changed in between."""
    for number, handler in enumerate(parser["train::handlers"] if _has(parser, "train::handlers") else []):
        if isinstance(handler, dict) and handler.get("_target_") == "medgen.handlers.TrainingCheckpoint":
            parser.get_parsed_content(f"train::handlers::{number}").check()


def _items(parser: ConfigParser, prefix: str) -> Sequence[Mapping[str, Any]] | None:
    """The items of a split as the datalist has them; None where the config reads none, or makes its own."""
    if _has(parser, f"{prefix}items"):
        return parser.get_parsed_content(f"{prefix}items")
    is_read = _has(parser, f"{prefix}dataset::data") and isinstance(parser[f"{prefix}dataset::data"], dict)
    if is_read or (not prefix and _has(parser, "store::datalist")):  # encode.json's, of the items without latents
        return parser.get_parsed_content(f"{prefix}dataset::data")
    return None


def _has(parser: ConfigParser, name: str) -> bool:
    """Whether a config has an id with something in it; what stands behind a reference is not looked into."""
    value: Any = parser.get()
    for part in name.split("::"):
        if not isinstance(value, dict) or value.get(part) is None:
            return False
        value = value[part]
    return True


@contextmanager
def _announced(processes: int) -> Iterator[None]:
    """WORLD_SIZE as torchrun will set it, for the checks that read it."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(processes)
    try:
        yield
    finally:
        del os.environ["WORLD_SIZE"]
        if before is not None:
            os.environ["WORLD_SIZE"] = before


@contextmanager
def _as_it_was() -> Iterator[None]:
    """A config's ``initialize`` sets the hook for errors; this module prints its own line."""
    hook = sys.excepthook
    try:
        yield
    finally:
        sys.excepthook = hook


def _names(files: str | Sequence[str]) -> str:
    return files if isinstance(files, str) else " + ".join(files)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _one_line(error: BaseException) -> str:
    """A UserError's message, or kind and first line of what is at the bottom of the chain."""
    message = find_user_error(error)
    if message is not None:
        return message
    causes = list(_causes(error))
    if any(isinstance(cause, json.JSONDecodeError) for cause in causes):
        return f"a config file is no JSON: {next(cause for cause in causes if isinstance(cause, json.JSONDecodeError))}"
    first = (str(causes[-1]).strip().splitlines() or [""])[0]
    return f"{type(causes[-1]).__name__}: {first}; with MEDGEN_TRACEBACK=1 the whole trace is shown"
