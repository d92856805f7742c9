import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from gan.bundle import CARD, MANIFEST, SIGNATURE, BundleError, save_bundle, verify_bundle
from gan.config import ConvConfig
from gan.networks import build_generator
from tasks.signing import SigningError, sign_bundle, verify_signature

pytest.importorskip("model_signing", reason="the extra signing is not installed")


def write_pair(
    folder: Path,
    name: str,
    key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey,
    encryption: KeySerializationEncryption | None = None,
) -> None:
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption or NoEncryption())
    public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (folder / f"{name}.pem").write_bytes(private)
    (folder / f"{name}.pub").write_bytes(public)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with key pairs: `ours`, `theirs`, and some that will not do."""
    folder = tmp_path_factory.mktemp("keys")
    write_pair(folder, "ours", ec.generate_private_key(ec.SECP256R1()))
    write_pair(folder, "theirs", ec.generate_private_key(ec.SECP384R1()))
    write_pair(folder, "rsa", rsa.generate_private_key(65537, 2048))
    write_pair(folder, "bitcoin", ec.generate_private_key(ec.SECP256K1()))
    secret = BestAvailableEncryption(b"secret")
    write_pair(folder, "encrypted", ec.generate_private_key(ec.SECP256R1()), secret)
    (folder / "noise.pem").write_bytes(b"\x00\xff noise")
    (folder / "noise.pub").write_bytes(b"\x00\xff noise")
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_bundle(build_generator(ConvConfig(width=1)), tmp_path / "bundle", {CARD: b"a card"})
    return tmp_path / "bundle"


@pytest.fixture
def signed(bundle: Path, keys: Path) -> Path:
    sign_bundle(bundle, keys / "ours.pem")
    return bundle


def test_what_was_signed_verifies_and_is_the_same_bundle(bundle: Path, keys: Path) -> None:
    digest = verify_bundle(bundle)
    assert sign_bundle(bundle, keys / "ours.pem") == bundle / SIGNATURE
    verify_signature(bundle, keys / "ours.pub")
    assert verify_bundle(bundle) == digest
    assert [path.name for path in bundle.parent.iterdir()] == ["bundle"]


def test_a_copy_under_another_name_verifies_too(
    signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(signed, signed.with_name("copy"))
    verify_signature(signed.with_name("copy"), keys / "ours.pub")
    monkeypatch.chdir(signed.parent)
    verify_signature(Path("copy"), keys / "ours.pub")


def test_signing_again_replaces_the_signature(signed: Path, keys: Path) -> None:
    sign_bundle(signed, keys / "theirs.pem")
    verify_signature(signed, keys / "theirs.pub")
    with pytest.raises(SigningError, match="does not hold"):
        verify_signature(signed, keys / "ours.pub")


def test_the_librarys_own_command_agrees(signed: Path, keys: Path) -> None:
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(signed)]
    command += ["--signature", str(signed / SIGNATURE), "--public_key", str(keys / "ours.pub")]
    subprocess.run([*command, "--ignore-paths", str(signed / SIGNATURE)], check=True)


@pytest.mark.parametrize("name", ["generator.safetensors", "config.json", CARD, MANIFEST])
def test_a_changed_byte_is_noticed(name: str, signed: Path, keys: Path) -> None:
    altered = bytearray((signed / name).read_bytes())
    altered[len(altered) // 2] ^= 1
    (signed / name).write_bytes(altered)
    with pytest.raises(SigningError, match="does not hold: another key made it, or files were"):
        verify_signature(signed, keys / "ours.pub")


@pytest.mark.parametrize("name", ["notes.txt", ".gitignore", ".git/config"])
def test_a_file_that_was_added_is_noticed(name: str, signed: Path, keys: Path) -> None:
    (signed / name).parent.mkdir(exist_ok=True)
    (signed / name).write_text("x")
    with pytest.raises(SigningError, match="does not hold"):
        verify_signature(signed, keys / "ours.pub")


def test_a_missing_file_is_noticed(signed: Path, keys: Path) -> None:
    (signed / CARD).unlink()
    with pytest.raises(SigningError, match="does not hold"):
        verify_signature(signed, keys / "ours.pub")


def test_another_bundles_signature_is_noticed(signed: Path, keys: Path) -> None:
    other = signed.with_name("other")
    save_bundle(build_generator(ConvConfig(width=1)), other)
    shutil.copy(signed / SIGNATURE, other)
    with pytest.raises(SigningError, match="does not hold"):
        verify_signature(other, keys / "ours.pub")


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"verificationMaterial": {}}'])
def test_what_is_no_signature_is_noticed(content: bytes, signed: Path, keys: Path) -> None:
    (signed / SIGNATURE).write_bytes(content)
    with pytest.raises(SigningError, match="does not hold"):
        verify_signature(signed, keys / "ours.pub")


def test_a_bundle_without_a_signature_is_not_signed(bundle: Path, keys: Path) -> None:
    with pytest.raises(SigningError, match=f"is not signed: it has no {SIGNATURE}"):
        verify_signature(bundle, keys / "ours.pub")


@pytest.mark.parametrize("name", ["rsa", "bitcoin", "noise", "absent"])
def test_keys_that_will_not_do_are_named(name: str, signed: Path, keys: Path) -> None:
    before = (signed / SIGNATURE).read_bytes()
    with pytest.raises(SigningError, match=f"{name}.pem is no unencrypted private key"):
        sign_bundle(signed, keys / f"{name}.pem")
    with pytest.raises(SigningError, match=f"{name}.pub is no public key"):
        verify_signature(signed, keys / f"{name}.pub")
    assert (signed / SIGNATURE).read_bytes() == before


@pytest.mark.parametrize("name", ["encrypted.pem", "ours.pub"])
def test_only_a_bare_private_key_signs(name: str, bundle: Path, keys: Path) -> None:
    with pytest.raises(SigningError, match=f"{name} is no unencrypted private key"):
        sign_bundle(bundle, keys / name)
    assert not (bundle / SIGNATURE).exists()


def test_a_bundle_that_is_not_whole_is_not_signed(bundle: Path, keys: Path) -> None:
    (bundle / CARD).write_text("another card")
    with pytest.raises(BundleError, match="was altered"):
        sign_bundle(bundle, keys / "ours.pem")
    assert not (bundle / SIGNATURE).exists()


def test_a_link_is_not_signed(bundle: Path, keys: Path) -> None:
    (bundle / CARD).rename(bundle.with_name("card"))
    (bundle / CARD).symlink_to(bundle.with_name("card"))
    with pytest.raises(SigningError, match=f"{CARD} is a link, and only files are signed; .*$"):
        sign_bundle(bundle, keys / "ours.pem")
    assert not (bundle / SIGNATURE).exists()


def test_without_the_library_the_extra_is_named(
    bundle: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    for refused in (lambda: sign_bundle(bundle, keys), lambda: verify_signature(bundle, keys)):
        with pytest.raises(SigningError, match=r"pip install 'mnist-gan-pipeline\[signing\]'"):
            refused()
