"""`fastssl-eval RUN --data FOLDER`: frozen features judged by labels."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fastssl.cli import SAID

if TYPE_CHECKING:
    from fastssl.data.views import View
    from fastssl.distributed import World
    from fastssl.evaluation.encoder import Encoder
    from fastssl.evaluation.run import Options

NAME = "fastssl-eval"
USAGE = f"{NAME} [RUN | --model NAME --weights FILE] --data FOLDER|digits|photos [options]"
_FINE_TUNE_HELP = "as '{epochs: 10, lr: 5.0e-4, batch_size: 1024}', images of a step over all ranks"
DESCRIPTION = """\
Judge the frozen features of a run of fastssl-train (its folder), or of released weights. On several
GPUs: torchrun --nproc-per-node=8 -m fastssl.cli_eval ..."""

# What features do not depend on, and released encoders of masked autoencoders lack.
_NOT_JUDGED = ("decoder_", "mask_token")


class Parser(argparse.ArgumentParser):
    """Of a command that ends with one sentence and status 1, whatever is wrong."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


@dataclass(frozen=True)
class Subject:
    """What is judged: an encoder in evaluation mode, with what its images must look like.

    views: those that the method trains on. photos: the configured crops of photographs, as
    keywords of `build_datasets`.
    """

    encoder: Encoder
    name: str
    image_size: int | tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    views: tuple[View, ...]
    seed: int
    photos: dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 1 after an error, which is printed."""
    return run_command(build_parser, run, arguments)


def run_command(
    build: Callable[[], Parser],
    function: Callable[[argparse.Namespace], None],
    arguments: Sequence[str] | None,
) -> int:
    """Parse and call; an error is one sentence, or with --traceback what Python says of it."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = build()
    try:
        function(parser.parse_intermixed_args(arguments))
    except SAID as error:
        if "--traceback" in arguments:
            raise
        if _is_first_to_fail():
            remedy = isinstance(error, ModuleNotFoundError)
            message = f'{error}; pip install "fastssl[train]"' if remedy else str(error)
            # What a parser of YAML says has several lines.
            print(f"{parser.prog}: error: {' '.join(message.split())}", file=sys.stderr)
        return 1
    return 0


def _is_first_to_fail() -> bool:
    """Under torchrun the ranks mostly fail alike, and one of them tells."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        # In what all ranks do alike before they meet.
        return os.environ.get("LOCAL_RANK", "0") == "0"
    try:
        return dist.distributed_c10d._get_default_store().add("fastssl/failed", 1) == 1
    except RuntimeError:
        return True  # the store is gone


def add_encoder_arguments(parser: Parser) -> None:
    """The ways to name an encoder and to run it, the same for all commands."""
    add = parser.add_argument
    add("--model", metavar="NAME", help="released weights in place of RUN: a factory as model.name")
    add("--weights", metavar="FILE", help="the weights of --model")
    add("--model-args", metavar="YAML", default="{}", help="keywords, as '{patch_size: 14}'")
    add("--image-size", type=int, metavar="N", help="side of images; default: the run's, or 224")
    add("--batch-size", type=int, default=256, metavar="N", help="images of one forward, per rank")
    add("--num-workers", type=int, default=0, metavar="N", help="processes that decode, per rank")
    add("--device", default="auto", help="auto (CUDA where there is one), cpu or cuda")
    add("--traceback", action="store_true", help="show where an error came from")


def build_parser() -> Parser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=NAME, usage=USAGE, description=DESCRIPTION, formatter_class=raw)
    add = parser.add_argument
    add("words", nargs="*", metavar="RUN", help="a run's folder, with config.yaml and weights.pth")
    add(
        "--data",
        help="folder of train/<class>/ and val/<class>/ (or valid/, validation/, test/), or of "
        "<class>/, of which a fifth is held out; digits: scikit-learn's; photos: which of the "
        "bundled photographs",
    )
    add(
        "--measures",
        nargs="+",
        metavar="NAME",
        help="knn linear probe attentive low-shot fine-tune rankme alignment uniformity std; "
        "default: knn linear rankme std. attentive keeps all tokens in memory",
    )
    add("--json", metavar="FILE", help="write the numbers there too")
    add("--labels-per-class", type=int, nargs="+", metavar="N", help="of low-shot, as 1 5")
    add("--fractions", type=float, nargs="+", metavar="F", help="of low-shot, as 0.01 0.1")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="of low-shot's splits")
    add("--probe-args", metavar="YAML", default="{}", help="of probe and attentive: {epochs: 20}")
    add("--fine-tune-args", metavar="YAML", default="{}", help=_FINE_TUNE_HELP)
    add_encoder_arguments(parser)
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Judge, print a table and write JSON."""
    # Here, so that an installation without the trainer's packages gets to say what it lacks.
    from fastssl import distributed
    from fastssl.evaluation.datasets import build_evaluation
    from fastssl.evaluation.run import judge
    from fastssl.evaluation.table import for_json, table

    _check_data(arguments.data)
    options = _options(arguments)
    file = None if arguments.json is None else Path(arguments.json).expanduser()
    with distributed.session(arguments.device) as world:
        if file is not None:
            distributed.on_main(lambda: _check_json(file))
        subject = load_subject(arguments, _only(arguments.words, "RUN"), world)
        data = build_evaluation(
            arguments.data,
            image_size=subject.image_size,
            mean=subject.mean,
            std=subject.std,
            views=subject.views,
            seed=subject.seed,
            photos=subject.photos,
        )
        result = {
            "encoder": subject.name,
            "data": arguments.data,
            "image_size": subject.image_size,
            "classes": data.classes,
            **judge(subject.encoder, data, options, world),
        }
        if world.is_main:
            print(table(result), flush=True)
        if file is not None:
            text = json.dumps(for_json(result), indent=1, allow_nan=False)
            distributed.on_main(lambda: file.write_text(f"{text}\n", encoding="utf-8"))


def _check_data(data: str | None) -> None:
    choices = "a folder of labelled images, digits or photos"
    if data is None:
        raise ValueError(f"--data must be given: {choices}")
    if data not in ("digits", "photos") and not Path(data).expanduser().is_dir():
        raise ValueError(f"--data must be {choices}, got {data}, which is none of them")


def _check_json(file: Path) -> None:
    """Before the work rather than after it."""
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ValueError(f"--json must be a file in a folder that exists, got {file}")


def _only(words: Sequence[str], name: str) -> str | None:
    if len(words) > 1:
        raise ValueError(f"{name} must be one folder, got {' '.join(words)}")
    return words[0] if words else None


def _options(arguments: argparse.Namespace) -> Options:
    from fastssl.evaluation import FineTuneOptions, SGDOptions
    from fastssl.evaluation.run import Options

    measures = Options.measures if arguments.measures is None else arguments.measures
    per_class, fractions = arguments.labels_per_class, arguments.fractions
    if per_class is None and fractions is None:
        per_class, fractions = Options.labels_per_class, Options.fractions
    return Options(
        measures=tuple(measures),
        labels_per_class=tuple(per_class or ()),
        fractions=tuple(fractions or ()),
        seeds=tuple(arguments.seeds),
        probe=_from_yaml("--probe-args", arguments.probe_args, SGDOptions),
        fine_tune=_from_yaml("--fine-tune-args", arguments.fine_tune_args, FineTuneOptions),
        batch_size=arguments.batch_size,
        num_workers=arguments.num_workers,
    )


def _from_yaml(flag: str, text: str, build: Callable[..., Any]) -> Any:
    """`build(**text)`, with errors that speak of the flag."""
    from omegaconf import OmegaConf

    try:
        values = OmegaConf.to_container(OmegaConf.create(text))
    except Exception as error:
        raise ValueError(f"{flag} must be YAML that can be read, got {text!r}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{flag} must be keys and values as {{key: value}}, got {text!r}")
    try:
        return build(**values)
    except TypeError as error:
        raise ValueError(f"{flag}: {error}") from error


def load_subject(arguments: argparse.Namespace, run: str | None, world: World) -> Subject:
    """The encoder that the command line names, on world.device.

    Raises:
        ValueError: it names none or two, or the weights do not fit.
        OSError: a file is missing.
    """
    from fastssl.kernels.common.checks import check_int

    if (run is None) == (arguments.model is None):
        came = "neither" if run is None else "both"
        raise ValueError(f"one of RUN and --model must be given, got {came}")
    if arguments.image_size is not None:
        check_int("image-size", arguments.image_size, 1)
    if run is None:
        subject = _released(arguments, world)
    else:
        if arguments.weights is not None:
            raise ValueError("--weights goes with --model; RUN has weights of its own")
        subject = _of_run(Path(run).expanduser(), arguments.image_size, world)
    subject.encoder.to(world.device).eval()
    return subject


def _of_run(folder: Path, image_size: int | None, world: World) -> Subject:
    """What a run's weights.pth holds, in the method that its config.yaml describes."""
    import torch

    from fastssl.evaluation.encoder import Encoder
    from fastssl.training import setup
    from fastssl.training.trained import load_trained

    # Its own resolution stays: at another one the positions are resampled as images come.
    config, method = load_trained(folder)
    size = config.views.image_size
    views = setup.kinds_of_views(config)
    dtype = torch.bfloat16 if setup.uses_bf16(config, world.device) else None
    return Subject(
        encoder=Encoder(method.model, method.features, dtype),
        name=f"{folder} ({config.method.name}, {config.model.name})",
        image_size=image_size or (tuple(size) if isinstance(size, list) else size),
        mean=tuple(config.views.mean),
        std=tuple(config.views.std),
        views=views if image_size is None else _resized(views, image_size),
        seed=config.seed,
        photos={
            "eval_scale": tuple(config.eval.scale),
            "eval_crops": config.eval.crops,
            "max_eval_images": config.eval.max_images,
        },
    )


def _resized(views: Sequence[View], image_size: int) -> tuple[View, ...]:
    return tuple(replace(view, size=(image_size, image_size)) for view in views)


def _released(arguments: argparse.Namespace, world: World) -> Subject:
    from fastssl.data import IMAGENET_MEAN, IMAGENET_STD
    from fastssl.data.views import View
    from fastssl.evaluation.encoder import Encoder
    from fastssl.methods import build_encoder
    from fastssl.models import load_pretrained

    if arguments.weights is None:
        raise ValueError("--model needs --weights, the file to load into it")
    size = arguments.image_size or 224
    model_args = _from_yaml("--model-args", arguments.model_args, dict)
    model = build_encoder(arguments.model, model_args, image_size=size)
    report = load_pretrained(model, arguments.weights, quiet=True)
    if any(not key.startswith(_NOT_JUDGED) for key in report.missing):
        raise ValueError(f"--weights must hold all of the encoder: {report}")
    if world.is_main and not report.complete:
        print(report, file=sys.stderr)
    return Subject(
        encoder=Encoder(model),
        name=f"{arguments.model}, {arguments.weights}",
        image_size=size,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        views=(View((size, size)),),
        seed=0,
        photos={},
    )


if __name__ == "__main__":
    sys.exit(main())
