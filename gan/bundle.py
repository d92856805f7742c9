"""A generator on disk: safetensors weights, a JSON config and a manifest of digests. No pickle.

generator.safetensors   the weights, float32
config.json             schema, architecture and its sizes, what the images are
manifest.json           sha256 of every other file; its own sha256 is the bundle's digest

These may come with it, and are in the manifest then:

model_card.md           what it is, how it was trained and how well it draws
samples.png             a hundred of its digits
generator.onnx          the same network for where torch does not run

A signature, `model.sig`, signs the others and the manifest, so it can be in neither: it is the one
file that may lie beside them unlisted.
"""

from __future__ import annotations

import hashlib
import json
import re
import reprlib
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from gan.config import ConfigError, ConvConfig, MlpConfig
from gan.errors import UserError
from gan.networks import Generator, build_generator

SCHEMA_VERSION = 4
SINCE = {"fine_layers": 2, "dots": 4}
"""The first schema that has a size. Older ones, which are still read, mean its default."""
WEIGHTS, CONFIG, MANIFEST = "generator.safetensors", "config.json", "manifest.json"
CARD, SAMPLES, ONNX = "model_card.md", "samples.png", "generator.onnx"
SIGNATURE = "model.sig"
PRETRAINED = Path(__file__).parent / "pretrained"
"""The bundle that comes with this package; its card says how it was made and how well it draws."""
MAX_BYTES = {
    WEIGHTS: 64 * 2**20,
    CONFIG: 2**16,
    CARD: 2**18,
    SAMPLES: 2**20,
    ONNX: 64 * 2**20,
    MANIFEST: 2**16,
}
"""Every file that a bundle may have, and the most bytes of it that are read."""
ARCHITECTURES: dict[str, type[MlpConfig] | type[ConvConfig]] = {
    "mlp": MlpConfig,
    "conv": ConvConfig,
}


class BundleError(UserError):
    """A bundle that is incomplete, altered or not understood."""


def save_bundle(
    generator: Generator, folder: Path, attachments: Mapping[str, bytes] | None = None
) -> str:
    """Write the generator to `folder`, which appears whole or not at all; returns its digest.

    The same weights and attachments give the same bytes. A bundle that is there already is
    replaced.

    Args:
        generator: the network to keep.
        folder: where; made if need be.
        attachments: the bytes of `model_card.md`, `samples.png` and `generator.onnx`, or some.

    Raises:
        BundleError: an attachment of another name, or too large.
        OSError: what is there already is not a bundle, or the disk refuses.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in generator.state_dict().items()}
    files = {WEIGHTS: save(state), CONFIG: _to_json(_describe(generator.config))}
    for name, payload in (attachments or {}).items():
        if name not in (CARD, SAMPLES, ONNX):
            raise BundleError(f"a bundle holds no {name!r}")
        if len(payload) > MAX_BYTES[name]:
            raise BundleError(f"{name} is larger than {MAX_BYTES[name]} bytes")
        files[name] = payload
    manifest = _to_json({"files": {name: _sha256(payload) for name, payload in files.items()}})

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        whole = Path(scratch) / folder.name
        whole.mkdir()
        for name, payload in {**files, MANIFEST: manifest}.items():
            (whole / name).write_bytes(payload)
        # Aside in one move, deleted with the scratch folder: never half a bundle at `folder`.
        if folder.is_dir() and holds_bundle(folder):
            folder.rename(Path(scratch) / "replaced")
        whole.rename(folder)
    return _sha256(manifest)


def load_bundle(folder: Path, device: torch.device | str = "cpu") -> Generator:
    """Read a generator, checking every file's digest and every tensor's shape before it is used.

    Raises:
        BundleError: a file is missing, altered, too large, or says what this code does not know; or
            a weight is no number.
    """
    return _build(read_bundle(folder), folder).to(device)


def verify_bundle(folder: Path) -> str:
    """Check all there is to check, a test draw and surplus files included; returns the digest.

    Raises:
        BundleError: as `load_bundle`; or the generator draws no numbers, or something lies in the
            folder that the manifest does not vouch for.
    """
    files = read_bundle(folder)
    generator = _build(files, folder)
    noise = torch.randn(10, generator.config.latent_dim, generator=torch.Generator().manual_seed(0))
    if not generator(noise, torch.arange(10)).isfinite().all():
        raise BundleError(f"{folder / WEIGHTS} draws no image: its weights are out of all bounds")
    surplus = {path.name for path in folder.iterdir()} - files.keys() - {SIGNATURE}
    if surplus:
        raise BundleError(f"{folder} holds {min(surplus)!r}, which its {MANIFEST} does not name")
    return _sha256(files[MANIFEST])


def read_bundle(folder: Path) -> dict[str, bytes]:
    """Read all files of a bundle, verified against the manifest, which comes last.

    Raises:
        BundleError: a file is missing, altered or too large.
    """
    manifest = _read(folder, MANIFEST)
    files = {}
    for name, digest in parse_manifest(manifest).items():
        files[name] = _read(folder, name)
        if _sha256(files[name]) != digest:
            raise BundleError(f"{folder / name} was altered: it is not the file of {MANIFEST}")
    return {**files, MANIFEST: manifest}


def holds_bundle(folder: Path) -> bool:
    """Whether a bundle, whole or damaged, is all that lies in a folder: then it may be replaced.

    A manifest alone does not say so, as other programs have a file of that name, too.

    Raises:
        OSError: the folder cannot be listed.
    """
    names = {path.name for path in folder.iterdir()}
    return {WEIGHTS, MANIFEST} <= names <= {*MAX_BYTES, SIGNATURE}


def parse_manifest(payload: bytes) -> dict[str, str]:
    """The sha256, as 64 hexadecimal digits, of each file of a bundle but the manifest itself.

    Names are those of this module alone, so none leads out of a folder. There is one spelling of
    a manifest, so that equal bundles have equal digests.

    Raises:
        BundleError: it is not a manifest that `save_bundle` writes.
    """
    digests = _parse_json(payload, MANIFEST).get("files")
    if not isinstance(digests, dict):
        raise BundleError(f"{MANIFEST} names no files")
    for name, digest in digests.items():
        if name not in MAX_BYTES or name == MANIFEST:
            raise BundleError(f"{MANIFEST} names {reprlib.repr(name)}, which no bundle holds")
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise BundleError(f"{MANIFEST} has no sha256 for {name}")
    for name in (WEIGHTS, CONFIG):
        if name not in digests:
            raise BundleError(f"{MANIFEST} does not name {name}")
    if payload != _to_json({"files": digests}):
        raise BundleError(f"{MANIFEST} says more than names and digests, or in another spelling")
    return digests


def bundle_digest(folder: Path) -> str:
    """The sha256 of the manifest, which holds the digests of all other files."""
    return _sha256(_read(folder, MANIFEST))


def _read(folder: Path, name: str) -> bytes:
    path = folder / name
    try:
        if not path.is_file():
            raise BundleError(f"{folder} is not a whole bundle: it has no {name}")
        with path.open("rb") as file:
            payload = file.read(MAX_BYTES[name] + 1)
    except OSError as error:
        raise BundleError(f"cannot read {path}: {error.strerror}") from error
    if len(payload) > MAX_BYTES[name]:
        raise BundleError(f"{path} is larger than {MAX_BYTES[name]} bytes")
    return payload


def _build(files: Mapping[str, bytes], folder: Path) -> Generator:
    """The generator in these files of a folder, on the CPU, ready to draw."""
    config = _parse_config(files[CONFIG])
    # On the meta device a network takes no memory, whatever sizes the config claims.
    with torch.device("meta"):
        generator = build_generator(config)
    try:
        state = load(files[WEIGHTS])
    except Exception as error:  # a forged header raises half a dozen different ones
        raise BundleError(f"{folder / WEIGHTS} is not a safetensors file") from error
    if _shapes(state) != _shapes(generator.state_dict()):
        raise BundleError(f"{folder / WEIGHTS} does not hold the weights of its config")
    if not all(values.isfinite().all() for values in state.values()):
        raise BundleError(f"{folder / WEIGHTS} draws no image: its weights are not all numbers")
    generator.load_state_dict(state, assign=True)
    return generator.requires_grad_(False).eval()


def _parse_config(payload: bytes) -> MlpConfig | ConvConfig:
    config = _parse_json(payload, CONFIG)
    schema = config.get("schema_version")
    if type(schema) is not int or not 1 <= schema <= SCHEMA_VERSION:
        raise BundleError(
            f"{CONFIG} has schema {reprlib.repr(schema)}; this code reads 1 to {SCHEMA_VERSION}"
        )
    networks = config.get("networks")
    kind = ARCHITECTURES.get(str(config.get("architecture")))
    if kind is None or not isinstance(networks, dict):
        raise BundleError(
            f"{CONFIG} names no known architecture; known: {', '.join(ARCHITECTURES)}"
        )
    if kind is ConvConfig and schema in (2, 3):
        raise BundleError(
            f"{CONFIG} has schema {schema}, whose convolutional generators this code cannot build"
        )
    if networks.keys() != _sizes(kind, schema):
        raise BundleError(f"{CONFIG} does not give the sizes of its architecture")
    try:
        parsed = kind(**networks)
    except ConfigError as error:
        raise BundleError(f"{CONFIG} does not describe a network: {error}") from error
    if payload != _to_json(_describe(parsed, schema)):
        raise BundleError(f"{CONFIG} says more or other than its network is")
    return parsed


def name_architecture(config: MlpConfig | ConvConfig) -> str:
    """The name in `ARCHITECTURES` of the pair that a config makes."""
    return next(name for name, kind in ARCHITECTURES.items() if isinstance(config, kind))


def _sizes(kind: type[MlpConfig] | type[ConvConfig], schema: int) -> set[str]:
    return {field.name for field in fields(kind) if SINCE.get(field.name, 1) <= schema}


def _describe(config: MlpConfig | ConvConfig, schema: int = SCHEMA_VERSION) -> dict[str, Any]:
    sizes = _sizes(type(config), schema)
    return {
        "schema_version": schema,
        "architecture": name_architecture(config),
        "networks": {name: size for name, size in asdict(config).items() if name in sizes},
        "num_classes": config.num_classes,
        "image_shape": [28, 28],
        "value_range": [0, 255],
    }


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (values.shape, values.dtype) for name, values in state.items()}


def _parse_json(payload: bytes, name: str) -> dict[str, Any]:
    try:
        parsed = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{name} is not JSON") from error
    if not isinstance(parsed, dict):
        raise BundleError(f"{name} is not a JSON object")
    return parsed


def _to_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()
