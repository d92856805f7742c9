"""Signatures on bundles, with the library model-signing (OpenSSF), where it is installed.

The signature lies in the bundle's folder as `model.sig`, the name that the library's own command
`model_signing` uses. It signs every other file there, the manifest among them. Neither the manifest
nor the bundle's digest knows of it, so a bundle is the same signed and unsigned.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from types import ModuleType

from gan.bundle import SIGNATURE, verify_bundle
from gan.errors import UserError


class SigningError(UserError):
    """A bundle that cannot be signed, or whose signature does not hold."""


def sign_bundle(folder: Path, key: Path) -> Path:
    """Sign a bundle, once it is verified; returns the signature's path.

    Args:
        folder: the bundle.
        key: an unencrypted private key on the curve P-256, P-384 or P-521, in PEM.

    Raises:
        BundleError: the bundle is not whole.
        SigningError: model-signing is not installed, or the key or the folder will not do.
    """
    library = _import_library()
    verify_bundle(folder)
    for path in folder.iterdir():
        if path.is_symlink() and path.name != SIGNATURE:
            raise SigningError(
                f"{path} is a link, and only files are signed; put a copy of the file in its place"
            )
    try:
        signer = library.signing.Config().use_elliptic_key_signer(private_key=key)
    except Exception as error:  # the library raises whatever the parsing of a key does
        raise SigningError(f"{key} is no unencrypted private key on a NIST curve in PEM") from error
    signer.set_hashing_config(_what_is_signed(library))
    try:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
            signer.sign(folder, Path(scratch) / SIGNATURE)
            return (Path(scratch) / SIGNATURE).replace(folder / SIGNATURE)
    except OSError as error:
        raise SigningError(f"cannot write {folder / SIGNATURE}: {error.strerror}") from error


def verify_signature(folder: Path, key: Path) -> None:
    """Check that every file of a bundle is what the owner of a key signed, and none was added.

    Args:
        folder: the bundle.
        key: the public key that belongs to the private one, in PEM.

    Raises:
        SigningError: model-signing is not installed, the key will not do, there is no signature,
            another key made it, or it was made for other files.
    """
    library = _import_library()
    if not (folder / SIGNATURE).is_file():
        raise SigningError(f"{folder} is not signed: it has no {SIGNATURE}")
    try:
        verifier = library.verifying.Config().use_elliptic_key_verifier(public_key=key)
    except Exception as error:
        raise SigningError(f"{key} is no public key on a NIST curve in PEM") from error
    verifier.set_hashing_config(_what_is_signed(library))
    try:
        verifier.verify(folder, folder / SIGNATURE)
    except Exception as error:
        reason = "another key made it, or files were changed, added or taken away since"
        raise SigningError(f"the signature of {folder} does not hold: {reason}") from error


def _import_library() -> ModuleType:
    try:
        import model_signing  # noqa: PLC0415
    except ImportError as error:
        raise SigningError(
            "signatures need the extra `signing`: pip install 'mnist-gan-pipeline[signing]'"
        ) from error
    return model_signing


def _what_is_signed(library: ModuleType) -> object:
    """Everything in the folder but the signature itself."""
    return library.hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
