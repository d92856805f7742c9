"""A generator on disk: safetensors weights, a JSON config and a manifest of digests. No pickle.

generator.safetensors   the weights, float32
config.json             schema, architecture and its sizes, what the images are
manifest.json           sha256 of every other file; its own sha256 is the bundle's digest
"""

from __future__ import annotations

import hashlib
import json
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

SCHEMA_VERSION = 1
WEIGHTS, CONFIG, MANIFEST = "generator.safetensors", "config.json", "manifest.json"
MAX_BYTES = {WEIGHTS: 64 * 2**20, CONFIG: 2**16, MANIFEST: 2**16}
ARCHITECTURES: dict[str, type[MlpConfig] | type[ConvConfig]] = {
    "mlp": MlpConfig,
    "conv": ConvConfig,
}


class BundleError(UserError):
    """A bundle that is incomplete, altered or not understood."""


def save_bundle(generator: Generator, folder: Path) -> str:
    """Write the generator to `folder`, which appears whole or not at all; returns its digest.

    The same weights give the same bytes. A bundle that is there already is replaced.

    Raises:
        OSError: what is there already is not a bundle, or the disk refuses.
    """
    state = {k: v.detach().cpu().contiguous() for k, v in generator.state_dict().items()}
    files = {WEIGHTS: save(state), CONFIG: _to_json(_describe(generator.config))}
    manifest = _manifest_of(files)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        whole = Path(scratch) / folder.name
        whole.mkdir()
        for name, payload in {**files, MANIFEST: manifest}.items():
            (whole / name).write_bytes(payload)
        # Aside in one move, deleted with the scratch folder: never half a bundle at `folder`.
        if (folder / MANIFEST).is_file():
            folder.rename(Path(scratch) / "replaced")
        whole.rename(folder)
    return _sha256(manifest)


def load_bundle(folder: Path, device: torch.device | str = "cpu") -> Generator:
    """Read a generator, checking every file's digest and every tensor's shape before it is used.

    Raises:
        BundleError: a file is missing, altered, too large, or says what this code does not know.
    """
    files = read_bundle(folder)
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
    generator.load_state_dict(state, assign=True)
    return generator.requires_grad_(False).eval().to(device)


def read_bundle(folder: Path) -> dict[str, bytes]:
    """Read the weights and the config of a bundle, verified against its manifest.

    Raises:
        BundleError: a file is missing, altered or too large.
    """
    files = {name: _read(folder, name) for name in (WEIGHTS, CONFIG)}
    # The manifest follows from the files, so that there is nothing in it to parse.
    if _read(folder, MANIFEST) != _manifest_of(files):
        raise BundleError(f"{folder} was altered: its files are not those of its {MANIFEST}")
    return files


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


def _parse_config(payload: bytes) -> MlpConfig | ConvConfig:
    config = _parse_json(payload)
    schema = config.get("schema_version")
    if schema != SCHEMA_VERSION:
        raise BundleError(f"{CONFIG} has schema {schema!r}; this code reads {SCHEMA_VERSION}")
    networks = config.get("networks")
    kind = ARCHITECTURES.get(str(config.get("architecture")))
    if kind is None or not isinstance(networks, dict):
        raise BundleError(
            f"{CONFIG} names no known architecture; known: {', '.join(ARCHITECTURES)}"
        )
    if networks.keys() != {field.name for field in fields(kind)}:
        raise BundleError(f"{CONFIG} does not give the sizes of its architecture")
    try:
        parsed = kind(**networks)
    except ConfigError as error:
        raise BundleError(f"{CONFIG} does not describe a network: {error}") from error
    if payload != _to_json(_describe(parsed)):
        raise BundleError(f"{CONFIG} says more or other than its network is")
    return parsed


def name_architecture(config: MlpConfig | ConvConfig) -> str:
    """The name in `ARCHITECTURES` of the pair that a config makes."""
    return next(name for name, kind in ARCHITECTURES.items() if isinstance(config, kind))


def _describe(config: MlpConfig | ConvConfig) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "architecture": name_architecture(config),
        "networks": asdict(config),
        "num_classes": config.num_classes,
        "image_shape": [28, 28],
        "value_range": [0, 255],
    }


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {name: (values.shape, values.dtype) for name, values in state.items()}


def _parse_json(payload: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{CONFIG} is not JSON") from error
    if not isinstance(parsed, dict):
        raise BundleError(f"{CONFIG} is not a JSON object")
    return parsed


def _manifest_of(files: Mapping[str, bytes]) -> bytes:
    return _to_json({"files": {name: _sha256(payload) for name, payload in files.items()}})


def _to_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _sha256(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()
