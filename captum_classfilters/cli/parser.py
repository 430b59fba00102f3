"""The options of each command. Imports nothing heavy, so that ``--help`` answers at once."""

import argparse
from collections.abc import Callable
from pathlib import Path

SELECTORS = (
    "histogram", "mean_activation", "weight", "contribution", "weight_and_activation", "margin", "ablation",
    "correlation", "random",
)  # fmt: skip

METHODS = (
    "mahalanobis", "relative_mahalanobis", "class_gaussian", "nearest_neighbours", "vim", "react", "energy",
    "max_logit", "max_softmax",
)  # fmt: skip

_WRITES = {
    "attribute": """\
Find the class filters of your network on your images. Writes into DIR: filters.safetensors (ClassFilters.load reads
it), top.csv, class_filters.png, overlap.png; with --judge accuracy_curve.csv and .png; of several selectors each has
its own files.

  captum-classfilters attribute resnet18 pets/train --weights pets.pt --judge pets/val --out found
""",
    "decompose": """\
The same network with a head that reads only k features for each class. Writes into DIR: small.safetensors, a state
dict (how to load it again is printed); decompose.json; the filters and moments it took; with --judge accuracy.csv.

  captum-classfilters decompose resnet18 pets/train --weights pets.pt --k 5 --refit omp --judge pets/val --out small
""",
    "report": """\
One HTML file that anybody can open: your classes, their channels with pictures, why images are confused (set channels
to 0 and see), and suspects, channels that look like shortcuts. It needs no network, no server and no installation.

  captum-classfilters report resnet18 pets/train --weights pets.pt --judge pets/val --out report.html
""",
    "watch": """\
Which of these images are unlike those that the network was trained on? The share of false alarms is promised, from
other images that are clean. Writes into DIR: scores.csv (strangeness, p-value and alarm of each image), alarms.png (the
strangest images, where, and by which channels), detector.skops (FamiliarityDetector.load reads it), watch.json.

  captum-classfilters watch resnet18 pets/train --weights pets.pt --calibrate pets/val --images inbox --out watched
""",
}
_MODEL = """\
MODEL is one of
  torchvision:resnet50, timm:resnet50   a classifier of that package, with --weights FILE, --pretrained, or
  resnet50                              (for trying out) --random-weights; a bare name: torchvision first, then timm
  package.module:callable               called without arguments, returns an nn.Module; the current folder is importable

DATA is one of
  a folder with one folder of images for each class: the classes are the folders' names, sorted
  fashion_mnist:ROOT, cifar10:ROOT, imagenet:ROOT   as torchvision keeps them (nothing is downloaded)

Exit status: 0 done; 1 an error, in words on stderr; 2 options that were not understood; 130 Ctrl-C and
143 SIGTERM, then what was counted so far is kept in a file *.partial.safetensors.
"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(prog="captum-classfilters", description="Which channels work for which class?")
    commands = parser.add_subparsers(dest="command", required=True)
    _demo(commands.add_parser("demo", help="a trained ResNet-20, real images: table, pictures, a saved file"))
    for name, add, about in (
        ("attribute", _attribute, "your network, your images: class filters in a file, a table, pictures"),
        ("decompose", _decompose, "the same network with a head that reads only k features for each class"),
        ("report", _report, "one HTML file: classes, channels, confusions, suspects, for anybody to open"),
        ("watch", _watch, "alarms for images unlike those that your network was trained on"),
    ):
        command = commands.add_parser(
            name,
            help=about,
            description=_WRITES[name],
            epilog=_MODEL,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _shared(command, judge=name != "watch", out="FILE" if name == "report" else "DIR")
        add(command)
    return parser


def _demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for the pictures (default: demo)")
    _debug(parser)


def _attribute(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--selector",
        type=_selectors,
        default=["histogram"],
        metavar="NAME[,NAME...]",
        help=f"how channels are chosen, several from the same pass: {', '.join(SELECTORS)} (default: histogram)",
    )
    parser.add_argument("--k", type=_count, default=5, help="channels shown for each class (default: 5)")
    _k1(parser)


def _decompose(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--k", type=_count, default=5, help="features kept for each class (default: 5)")
    parser.add_argument("--filters", type=Path, metavar="FILE", help="a table saved by attribute; else from a pass")
    parser.add_argument(
        "--selector", choices=SELECTORS, help="without --filters (default: histogram; with a refit from labels its own)"
    )
    _k1(parser)
    parser.add_argument(
        "--refit",
        choices=("none", "least_squares", "omp", "discriminant", "logistic", "binary"),
        default="none",
        help="new weights for the kept features, from one more pass: least_squares and omp copy the network's logits, "
        "discriminant, logistic and binary learn from the labels; omp, and the three without --filters and --selector, "
        "choose the features, too (default: none)",
    )
    parser.add_argument(
        "--backend",
        choices=("auto", "dense", "csr", "bag", "gather"),
        default="auto",
        help="form of the small head (default: auto, sparse where that is faster)",
    )
    parser.add_argument(
        "--unseen", choices=("refuse", "dense"), default="refuse", help="classes without images: dense keeps all theirs"
    )


def _watch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--calibrate",
        required=True,
        metavar="DATA3",
        help="clean images that the network was not trained on, as many as you can: a folder, classes do not matter",
    )
    parser.add_argument("--images", required=True, metavar="DATA4", help="the images to watch: a folder, at any depth")
    parser.add_argument(
        "--method", choices=METHODS, default="mahalanobis", help="how strangeness is measured (default: mahalanobis)"
    )
    parser.add_argument(
        "--alpha", type=_share, default=0.05, metavar="X", help="share of clean images that may raise a false alarm"
    )
    parser.add_argument("--most", type=_count, default=12, metavar="N", help="images in the picture (default: 12)")
    parser.set_defaults(k=1, judge=None, judge_split=None)


def _report(parser: argparse.ArgumentParser) -> None:
    judged = [name for name in SELECTORS if name != "random"]
    parser.add_argument("--selector", choices=judged, default="histogram", help="how channels are chosen")
    parser.add_argument(
        "--k", type=_count, default=5, help="channels of each class that a page opens with (default: 5)"
    )
    parser.add_argument("--title", help="of the page (default: the network)")
    parser.add_argument(
        "--max-mb",
        type=_positive,
        default=25,
        metavar="X",
        help="largest size; what does not fit is said (default: 25)",
    )
    parser.add_argument(
        "--folder", action="store_true", help="a folder instead of one file: no limit, no scripts inside the page"
    )
    parser.add_argument("--methods", action="store_true", help="also a page with all methods side by side (slower)")


def _k1(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--k1", type=_count, help="features each image votes for; selectors that vote only (default: sqrt(K))"
    )


def _shared(parser: argparse.ArgumentParser, judge: bool, out: str) -> None:
    parser.add_argument("model", metavar="MODEL", help="see below")
    parser.add_argument("data", metavar="DATA", help="see below; training images")
    written = "the page; with --folder the folder" if out == "FILE" else "folder for what comes out"
    parser.add_argument("--out", type=Path, required=True, metavar=out, help=written)
    if judge:
        parser.add_argument(
            "--judge",
            metavar="DATA2",
            help="other images, same classes: accuracy with k channels, and a random control",
        )

    model = parser.add_argument_group("model")
    source = model.add_mutually_exclusive_group()
    source.add_argument("--weights", type=Path, metavar="FILE", help=".safetensors, or a checkpoint of tensors")
    model.add_argument("--checkpoint-key", metavar="KEY", help="of several state dicts in FILE: the one under KEY")
    source.add_argument("--pretrained", action="store_true", help="the published weights (downloaded once)")
    source.add_argument("--random-weights", action="store_true", help="for trying out: the result means nothing")
    model.add_argument("--layer", metavar="NAME", help="the head, where it cannot be found: its dotted name")
    model.add_argument("--num-classes", type=_count, metavar="N", help="outputs of a torchvision or timm network")
    model.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps, or auto (default): cuda where there is one"
    )

    data = parser.add_argument_group("images")
    data.add_argument("--split", metavar="NAME", help="of DATA: train, test, val; of a folder: the folder below it")
    if judge:
        data.add_argument("--judge-split", metavar="NAME", help="of DATA2 (default: test or val; of a folder: none)")
    data.add_argument(
        "--classes", type=Path, metavar="FILE", help="the network's classes in its order, one a line, by folder names"
    )
    data.add_argument("--limit", type=_count, metavar="N", help="at most the first N images of each class, everywhere")
    data.add_argument(
        "--image-size", type=_count, metavar="N", help="side of the centre crop (default: 224; or theirs)"
    )
    data.add_argument("--resize", type=_count, metavar="N", help="shorter side before that (default: 8/7 of it)")
    data.add_argument("--mean", type=float, nargs="+", metavar="X", help="subtracted from pixels in [0, 1]")
    data.add_argument("--std", type=_positive, nargs="+", metavar="X", help="and divided by")
    data.add_argument("--exif", action="store_true", help="turn photographs as EXIF says; else as torchvision, not")
    data.add_argument("--batch-size", type=_count, default=64, metavar="N", help="default: 64")
    data.add_argument("--workers", type=_natural, default=0, metavar="N", help="processes that read (default: 0)")
    data.add_argument("--strict", action="store_true", help="an unreadable image is an error, not skipped")

    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="one JSON document on stdout instead of prose")
    output.add_argument("--quiet", action="store_true", help="no progress bars, no prose; warnings and errors only")
    _debug(output)


def _debug(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _selectors(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    wrong = [name for name in names if name not in SELECTORS]
    if wrong or not names:
        raise argparse.ArgumentTypeError(f"expected names among {', '.join(SELECTORS)}, got {text!r}")
    return list(dict.fromkeys(names))


def _number(kind: Callable[[str], float], least: float, words: str) -> Callable[[str], float]:
    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = least - 1
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"expected {words}, got {text!r}")
        return value

    return convert


_count = _number(int, 1, "a whole number of at least 1")
_natural = _number(int, 0, "a whole number of at least 0")
_positive = _number(float, 1e-12, "a number above 0")


def _share(text: str) -> float:
    value = _positive(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1, got {text!r}")
    return value
