"""The command `gan`: what people do with the generators that are registered.

Each subcommand imports what it needs when it runs, so that `gan --help` answers at once.
"""

# ruff: noqa: PLC0415, T201

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from io import TextIOWrapper
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from flows.explanation import ended_by_a_sentence

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from gan.networks import Generator

BUNDLE_NAME = "mnist-gan-generator"
"""The folder that a generator is pulled to if none is named."""
MAX_IMAGES = 10_000
"""The most images on a sheet: as many as a served generator draws at once."""
SCORES = ("frechet_distance", "coverage", "digit_as_asked")
"""The tags of a version that are listed."""
ANY_DIGIT = -1
NUM_SEEDS = 2**32
"""As in `gan.sampling` and `gan.config`, which take a second to import."""
HEADINGS = ("version", "aliases", "recipe", "Frechet", "coverage", "as asked", "when, UTC", "from")
PLAIN_WIDTH = 160
"""The width of a table that goes to a file or another program."""


def main() -> None:
    """Run a subcommand; what the user can mend ends it with one sentence."""
    # As Ctrl-C does, so that nothing half done is left.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # A server that is gone would be asked for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        # The name of a folder, or a tag, may have what the encoding of the output has not.
        sys.stdout.reconfigure(errors="backslashreplace")
    with ended_by_a_sentence():
        try:
            arguments = _parse()
            arguments.run(arguments)
        finally:
            _flush()


def _flush() -> None:
    """Have what was printed arrive: as Python ends, it is too late for a sentence."""
    if sys.stdout is None:
        return  # it was closed from the start
    try:
        sys.stdout.flush()
    except OSError as error:
        # Python would try again as it ends, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise OSError(error.errno, error.strerror, "standard output") from None


def pull(arguments: argparse.Namespace) -> None:
    """Have a generator's bundle in a folder."""
    from tasks.pulling import pull as pull_bundle

    if arguments.source is None:
        _check_registry()
    pulled = pull_bundle(arguments.version, arguments.to, arguments.source)
    print(f"{pulled.folder}: version {pulled.version}, {pulled.origin}, sha256 {pulled.digest}")


def sample(arguments: argparse.Namespace) -> None:
    """Draw a sheet of digits into a PNG file."""
    import torch
    from PIL import Image

    from gan.sampling import SamplingError, draw, interpolate, tile

    generator = _load_generator(arguments.version, arguments.bundle)
    wish: dict[str, Any] = {"num": arguments.num, "seed": arguments.seed}
    if arguments.to_seed is None:
        images = draw(generator, [arguments.digit], temperature=arguments.temperature, **wish)
    else:
        images = interpolate(generator, arguments.digit, to_seed=arguments.to_seed, **wish)
    columns = math.ceil(math.sqrt(arguments.num))
    blank = torch.zeros(-arguments.num % columns, 28, 28, dtype=torch.uint8)
    sheet = Image.fromarray(tile(torch.cat([images, blank]), columns=columns).numpy())
    out = arguments.out
    try:
        with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
            whole = Path(scratch) / out.name
            sheet.save(whole)
            whole.replace(out)
    except OSError as error:
        raise SamplingError(f"cannot write {out}: {error.strerror or error}") from None
    print(f"{out}: {sheet.width} x {sheet.height} pixels")


def versions(arguments: argparse.Namespace) -> None:
    """List the registered versions, the newest first."""
    from mlflow import MlflowClient
    from rich.console import Console
    from rich.table import Table

    from tasks.aliases import find_holders
    from tasks.tracking import MODEL_NAME

    _check_registry()
    client = MlflowClient()
    holders = find_holders(client)
    found = client.search_model_versions(f"name = '{MODEL_NAME}'")
    if not found:
        print(f"{MODEL_NAME} has no version yet")
        return
    table = Table(*HEADINGS, box=None, header_style="bold", pad_edge=False)
    for version in sorted(found, key=lambda each: int(each.version), reverse=True):
        number, tags = int(version.version), version.tags
        when = datetime.fromtimestamp(version.creation_timestamp / 1000, UTC)
        cells = (
            str(number),
            ", ".join(alias for alias, holder in holders.items() if holder == number),
            *(tags.get(name, "") for name in ("recipe", *SCORES)),
            f"{when:%Y-%m-%d %H:%M}",
            "\n".join(_origins(client, version)),
        )
        table.add_row(*map(_printable, cells))
    console = Console(markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = PLAIN_WIDTH
    console.print(table)


def verify(arguments: argparse.Namespace) -> None:
    """Check a bundle: digests, config, a test draw and, if a key is given, the signature."""
    from gan.bundle import verify_bundle

    digest = verify_bundle(arguments.folder)
    print(f"{arguments.folder}: whole, sha256 {digest}")
    if arguments.key is not None:
        from tasks.signing import verify_signature

        verify_signature(arguments.folder, arguments.key)
        print(f"{arguments.folder}: signed with the key that belongs to {arguments.key}")


def sign(arguments: argparse.Namespace) -> None:
    """Sign a bundle."""
    from tasks.signing import sign_bundle

    print(f"{sign_bundle(arguments.folder, arguments.key)}: the signature")


def rollback(arguments: argparse.Namespace) -> None:
    """Make the previous champion champion again."""
    from prefect.logging import disable_run_logger

    from tasks.aliases import roll_back
    from tasks.settings import load_settings
    from tasks.storage import StorageError
    from tasks.versions import point_to_champion

    _check_registry()
    done = roll_back()
    instead = "" if done.previous is None else f", instead of version {done.previous}"
    print(f"version {done.champion} is @champion again{instead}")
    if destination := load_settings().publish_to:
        with disable_run_logger():
            try:
                address = point_to_champion.fn(destination)
            except StorageError as error:
                raise StorageError(
                    f"{error}; the registry is rolled back, so do not do that again: "
                    "`python -m flows.publish_generator` has champion.json follow"
                ) from None
        print(f"champion.json of {destination}: {address or 'left, as this one is not there'}")


def compare(arguments: argparse.Namespace) -> None:
    """Put 2 to 6 runs or versions side by side on one page."""
    from tasks.comparison_page import compare as write_page

    _check_registry()
    print(f"{write_page(arguments.runs, arguments.out, arguments.log)}: open it in a browser")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="gan", description="Registered generators of digits.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def add(run: Callable[[argparse.Namespace], None]) -> argparse.ArgumentParser:
        what = (run.__doc__ or "").rstrip(".")
        command = commands.add_parser(
            run.__name__, help=what[:1].lower() + what[1:], description=what, allow_abbrev=False
        )
        command.set_defaults(run=run)
        return command

    version: dict[str, Any] = {
        "type": _version,
        "default": "champion",
        "metavar": "N|ALIAS",
        "help": "the version's number or alias (default: champion)",
    }
    command = add(pull)
    command.add_argument("--version", **version)
    command.add_argument(
        "--to",
        type=Path,
        default=Path(BUNDLE_NAME),
        metavar="DIR",
        help=f"the folder, made if need be (default: {BUNDLE_NAME})",
    )
    command.add_argument(
        "--from",
        dest="source",
        metavar="S3",
        help="s3://bucket/prefix that versions were published to (default: MLflow's registry)",
    )

    command = add(sample)
    command.epilog = "As long as nothing is registered, the generator of the package itself draws."
    command.add_argument(
        "--digit", type=_whole_number(0, 9), default=ANY_DIGIT, help="0 to 9 (default: any)"
    )
    command.add_argument(
        "--num", type=_whole_number(1, MAX_IMAGES), default=16, help="images (default: 16)"
    )
    command.add_argument(
        "--seed", type=_whole_number(0, NUM_SEEDS - 1), default=0, help="decides which (default: 0)"
    )
    way = command.add_mutually_exclusive_group()
    way.add_argument(
        "--temperature",
        type=_temperature,
        default=1.0,
        help="0 to 2; below 1 more typical and less varied (default: 1)",
    )
    way.add_argument(
        "--to-seed",
        type=_whole_number(0, NUM_SEEDS - 1),
        metavar="SEED",
        help="draw the way from one seed's digit to another's",
    )
    command.add_argument(
        "--out",
        type=_png_file,
        default=Path("digits.png"),
        metavar="FILE",
        help="a PNG file, overwritten if it is there (default: digits.png)",
    )
    generator = command.add_mutually_exclusive_group()
    generator.add_argument("--version", **version | {"default": None})
    generator.add_argument("--bundle", type=Path, metavar="DIR", help="a bundle in the place of it")

    add(versions)

    command = add(verify)
    command.add_argument("folder", type=Path, metavar="DIR", help="a bundle")
    command.add_argument("--key", type=Path, metavar="PUB", help="the signer's public key, in PEM")

    command = add(sign)
    command.add_argument("folder", type=Path, metavar="DIR", help="a bundle")
    command.add_argument(
        "--key", type=Path, metavar="PRIVATE", required=True, help="your private key, in PEM"
    )

    add(rollback)

    command = add(compare)
    command.add_argument(
        "runs", nargs="+", metavar="RUN", help="an MLflow run's id, a version's number or @alias"
    )
    command.add_argument(
        "--out",
        type=Path,
        default=Path("comparison.html"),
        metavar="FILE",
        help="the page, overwritten if it is there (default: comparison.html)",
    )
    command.add_argument("--log", action="store_true", help="also log it to each run in MLflow")
    return parser.parse_args()


def _version(text: str) -> int | str:
    text = text.removeprefix("@")
    if re.fullmatch("[1-9][0-9]{0,8}", text):
        return int(text)
    if re.fullmatch("[a-z][a-z0-9-]*", text):
        return text
    raise argparse.ArgumentTypeError(f"{text!r} is neither a version's number nor an alias")


def _whole_number(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if re.fullmatch("[0-9]{1,19}", text) and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(f"a whole number, {least} to {most}, not {text!r}")

    return parse


def _temperature(text: str) -> float:
    if re.fullmatch(r"[0-9]*\.?[0-9]+", text) and float(text) <= 2:
        return float(text)
    raise argparse.ArgumentTypeError(f"a number, 0 to 2, not {text!r}")


def _png_file(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} does not end in .png, and only PNG is written")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {path.parent}")
    return path


def _check_registry() -> None:
    """See that the registry is there, before MLflow waits for it or makes an empty one."""
    from tasks.services import ServiceError

    if file := _missing_registry():
        raise ServiceError(
            f"there is no registry yet: no file {file}; train a generator here, or set "
            "MLFLOW_TRACKING_URI to another store"
        )


def _missing_registry() -> str:
    """The registry's file if there is none yet; one that is a server has to answer."""
    import mlflow

    from tasks.services import check, find_services

    address = mlflow.get_tracking_uri()
    for name, url in find_services({"MLFLOW_TRACKING_URI": address}).items():
        check(name, url)
    file = address.partition("?")[0].removeprefix("sqlite:///")
    return "" if not address.startswith("sqlite:///") or Path(file).is_file() else file


def _load_generator(version: int | str | None, bundle: Path | None) -> Generator:
    from gan.bundle import PRETRAINED, load_bundle

    if bundle is not None:
        return load_bundle(bundle)
    if version is not None:
        _check_registry()
    elif _nothing_registered():
        print("nothing is registered yet: the generator that comes with this package draws")
        return load_bundle(PRETRAINED)
    from tasks.pulling import pull as pull_bundle

    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / BUNDLE_NAME
        return load_bundle(pull_bundle(version or "champion", folder).folder)


def _nothing_registered() -> bool:
    if _missing_registry():
        return True
    from mlflow import MlflowClient

    from tasks.tracking import MODEL_NAME

    return not MlflowClient().search_model_versions(f"name = '{MODEL_NAME}'")


def _origins(client: MlflowClient, version: ModelVersion) -> Iterator[str]:
    """The run's name, the flow run's id and the address in S3, as far as they are known."""
    from mlflow.exceptions import MlflowException

    if version.run_id:
        try:
            yield client.get_run(version.run_id).info.run_name or ""
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # the run was deleted for good
                raise
    if flow_run := version.tags.get("prefect_flow_run_id"):
        yield f"flow run {flow_run}"
    if address := version.tags.get("s3"):
        yield address


def _printable(text: str) -> str:
    """Without what a terminal would obey: names and tags are anybody's text."""
    return "".join(each for each in text if each.isprintable() or each == "\n")
