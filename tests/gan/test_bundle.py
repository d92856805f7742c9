import copy
import hashlib
import json
import math
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from gan.bundle import (
    CARD,
    CONFIG,
    MANIFEST,
    MAX_BYTES,
    ONNX,
    SAMPLES,
    SIGNATURE,
    SINCE,
    WEIGHTS,
    BundleError,
    bundle_digest,
    load_bundle,
    parse_manifest,
    read_bundle,
    save_bundle,
    verify_bundle,
)
from gan.config import ConvConfig, MlpConfig
from gan.networks import Generator, build_generator
from gan.sampling import draw

SMALL = ConvConfig(latent_dim=2, width=1)
ATTACHMENTS = {CARD: b"# A card\n", SAMPLES: b"\x89PNG", ONNX: b"\x08\x0a"}
FILES = (WEIGHTS, CONFIG, *ATTACHMENTS, MANIFEST)
CONFIG_OF: dict[MlpConfig | ConvConfig, dict[str, Any]] = {
    SMALL: {
        "schema_version": 4,
        "architecture": "conv",
        "networks": {
            "latent_dim": 2,
            "width": 1,
            "fine_layers": 0,
            "dots": 0,
            "num_classes": 10,
        },
        "num_classes": 10,
        "image_shape": [28, 28],
        "value_range": [0, 255],
    },
    MlpConfig(latent_dim=2): {
        "schema_version": 4,
        "architecture": "mlp",
        "networks": {"latent_dim": 2, "dropout": 0.3},
        "num_classes": 0,
        "image_shape": [28, 28],
        "value_range": [0, 255],
    },
}


def make(config: MlpConfig | ConvConfig, seed: int = 0) -> Generator:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_generator(config)


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A small bundle, with all that may come with it, as it was saved."""
    save_bundle(make(SMALL), tmp_path / "bundle", ATTACHMENTS)
    return tmp_path / "bundle"


@pytest.fixture(scope="module")
def shared_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small bundle for tests that write it anew each time."""
    folder = tmp_path_factory.mktemp("forgery") / "bundle"
    save_bundle(make(SMALL), folder)
    return folder


def forge(folder: Path, **payloads: bytes) -> None:
    """Write the files, which are named by their stem, and a manifest that vouches for all."""
    names = {"generator": WEIGHTS, "config": CONFIG}
    for stem, payload in payloads.items():
        (folder / names[stem]).write_bytes(payload)
    digests = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names.values()
    }
    (folder / MANIFEST).write_bytes(to_json({"files": digests}))


def to_json(value: Any) -> bytes:
    """The one spelling that a bundle's files have."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def safetensors(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_refused(folder: Path, match: str | None = None) -> None:
    for look in (load_bundle, verify_bundle):
        with pytest.raises(BundleError, match=match) as refusal:
            look(folder)
        assert str(refusal.value).isprintable()


@pytest.mark.parametrize("config", [SMALL, MlpConfig(latent_dim=3), ConvConfig()])
def test_what_is_saved_is_what_is_loaded(config: MlpConfig | ConvConfig, tmp_path: Path) -> None:
    generator = make(config)
    with torch.no_grad():  # moves the batch-norm statistics from where they start
        generator(torch.randn(8, config.latent_dim), torch.arange(8))
    digest = save_bundle(generator, tmp_path / "one")
    random_state = torch.get_rng_state()
    loaded = load_bundle(tmp_path / "one")
    assert torch.equal(torch.get_rng_state(), random_state)

    assert loaded.config == config
    assert type(loaded) is type(generator)
    before, after = generator.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for name, values in before.items():
        assert after[name].dtype == values.dtype
        assert torch.equal(after[name], values)
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(draw(loaded, [-1], num=20, seed=0), draw(generator, [-1], num=20, seed=0))

    assert save_bundle(loaded, tmp_path / "two") == digest
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "two")


def test_the_digest_stands_for_the_weights(tmp_path: Path) -> None:
    digest = save_bundle(make(SMALL), tmp_path / "a")
    assert digest == bundle_digest(tmp_path / "a")
    assert digest == hashlib.sha256((tmp_path / "a" / MANIFEST).read_bytes()).hexdigest()
    assert save_bundle(make(SMALL), tmp_path / "b") == digest
    assert save_bundle(make(SMALL, seed=1), tmp_path / "c") != digest


def test_a_bundle_holds_readable_text_and_no_pickle(bundle: Path) -> None:
    assert bytes_of(bundle).keys() == set(FILES)
    assert (bundle / CONFIG).read_bytes() == to_json(CONFIG_OF[SMALL])
    assert load((bundle / WEIGHTS).read_bytes()).keys() == make(SMALL).state_dict().keys()


def test_all_files_are_read_the_manifest_last(bundle: Path) -> None:
    files = read_bundle(bundle)
    assert files == bytes_of(bundle)
    assert files.items() >= ATTACHMENTS.items()
    assert list(files)[-1] == MANIFEST
    assert parse_manifest(files.pop(MANIFEST)) == {
        name: hashlib.sha256(payload).hexdigest() for name, payload in files.items()
    }


def test_a_whole_bundle_is_verified(bundle: Path, shared_bundle: Path) -> None:
    assert verify_bundle(bundle) == bundle_digest(bundle)
    assert verify_bundle(shared_bundle) != verify_bundle(bundle)


def test_what_comes_with_the_weights_is_in_the_digest_and_changes_no_drawing(
    bundle: Path, tmp_path: Path
) -> None:
    assert save_bundle(make(SMALL), tmp_path / "bare") != bundle_digest(bundle)
    assert save_bundle(load_bundle(bundle), tmp_path / "again", ATTACHMENTS) == bundle_digest(
        bundle
    )
    bare = load_bundle(tmp_path / "bare")
    assert torch.equal(
        draw(load_bundle(bundle), [8], num=9, seed=1), draw(bare, [8], num=9, seed=1)
    )


@pytest.mark.parametrize("name", ["", WEIGHTS, MANIFEST, SIGNATURE, "../card.md", "/etc/passwd"])
def test_nothing_else_can_be_attached(name: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="a bundle holds no"):
        save_bundle(make(SMALL), tmp_path / "bundle", {name: b""})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ATTACHMENTS)
def test_an_attachment_that_nobody_could_read_back_is_not_saved(name: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=f"{name} is larger than"):
        save_bundle(make(SMALL), tmp_path / "bundle", {name: bytes(MAX_BYTES[name] + 1)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", FILES)
def test_a_changed_byte_anywhere_is_noticed(name: str, bundle: Path) -> None:
    whole = (bundle / name).read_bytes()
    places = range(0, len(whole), max(1, len(whole) // 100))
    for place in (*places, len(whole) - 1):
        altered = bytearray(whole)
        altered[place] ^= 1 << place % 8
        (bundle / name).write_bytes(altered)
        assert_refused(bundle, f"was altered|{MANIFEST}")


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_grown_file_is_noticed(name: str, bundle: Path) -> None:
    whole = (bundle / name).read_bytes()
    for altered in (b"", whole[:1], whole[: len(whole) // 2], whole[:-2], whole + b"x"):
        (bundle / name).write_bytes(altered)
        assert_refused(bundle)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(name: str, bundle: Path) -> None:
    (bundle / name).unlink()
    assert_refused(bundle, f"is not a whole bundle: it has no {name}")
    (bundle / name).mkdir()
    assert_refused(bundle, f"is not a whole bundle: it has no {name}")


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_never_ends_is_not_read(name: str, bundle: Path) -> None:
    (bundle / name).unlink()
    os.mkfifo(bundle / name)
    assert_refused(bundle)
    (bundle / name).unlink()
    (bundle / name).symlink_to("/dev/zero")
    assert_refused(bundle)


@pytest.mark.parametrize("name", FILES)
def test_a_file_too_large_is_not_read(name: str, bundle: Path) -> None:
    with (bundle / name).open("r+b") as file:
        file.truncate(MAX_BYTES[name] + 1)
    assert_refused(bundle, f"{name} is larger than {MAX_BYTES[name]} bytes")


def test_a_place_without_a_bundle_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("absent", "file", "loop", "", "long" * 1000, "nul\0"):
        with pytest.raises(BundleError):
            load_bundle(tmp_path / name)


def test_a_link_is_followed_but_vouched_for_by_nothing_but_its_digest(
    bundle: Path, tmp_path: Path
) -> None:
    (bundle / WEIGHTS).rename(tmp_path / "elsewhere")
    (bundle / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    load_bundle(bundle)
    (bundle / WEIGHTS).unlink()
    (bundle / WEIGHTS).symlink_to("/etc/passwd")
    assert_refused(bundle, "was altered")


NOTHING = hashlib.sha256(b"").hexdigest()
STRANGE_NAMES = [
    "",
    ".",
    "../x",
    "/etc/passwd",
    "a/b",
    "a\\b",
    "C:x",
    "\0",
    "\n",
    "\ud800",
    "x" * 9999,
]


@pytest.mark.parametrize(
    "name", [*STRANGE_NAMES, MANIFEST, SIGNATURE, "readme.md", "generator.pt"], ids=ascii
)
def test_a_manifest_that_names_more_is_refused(name: str, bundle: Path) -> None:
    files = json.loads((bundle / MANIFEST).read_bytes())["files"]
    (bundle / MANIFEST).write_bytes(to_json({"files": files | {name: NOTHING}}))
    assert_refused(bundle, f"{MANIFEST} names .* which no bundle holds")


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
def test_a_manifest_that_names_less_is_refused(name: str, bundle: Path) -> None:
    files = json.loads((bundle / MANIFEST).read_bytes())["files"]
    del files[name]
    (bundle / MANIFEST).write_bytes(to_json({"files": files}))
    assert_refused(bundle, f"{MANIFEST} does not name {name}")


@pytest.mark.parametrize(
    "digest", [None, 0, [], {}, "", "0" * 63, "0" * 65, "G" * 64, "0" * 64 + "\n", NOTHING.upper()]
)
def test_a_manifest_with_what_is_no_digest_is_refused(digest: Any, bundle: Path) -> None:
    files = json.loads((bundle / MANIFEST).read_bytes())["files"]
    for name in files:
        (bundle / MANIFEST).write_bytes(to_json({"files": files | {name: digest}}))
        assert_refused(bundle, f"{MANIFEST} has no sha256 for {name}")


def test_there_is_one_spelling_of_a_manifest(bundle: Path) -> None:
    whole = (bundle / MANIFEST).read_bytes()
    manifest = json.loads(whole)
    for other in (
        json.dumps(manifest).encode(),
        to_json(manifest | {"comment": ""}),
        to_json({"files": dict(reversed(manifest["files"].items()))}).strip(),
        whole.replace(b'"files"', b'"files": {}, "files"'),
        whole.replace(b"\n", b"\r\n"),
        whole.replace(b"config", b"\\u0063onfig"),
        b"\xef\xbb\xbf" + whole,
        whole.decode().encode("utf-16"),
        whole + b" ",
    ):
        (bundle / MANIFEST).write_bytes(other)
        assert_refused(bundle, MANIFEST)


@pytest.mark.parametrize("name", ATTACHMENTS)
def test_a_file_that_nothing_vouches_for_is_noticed(name: str, bundle: Path) -> None:
    files = json.loads((bundle / MANIFEST).read_bytes())["files"]
    del files[name]
    (bundle / MANIFEST).write_bytes(to_json({"files": files}))
    with pytest.raises(BundleError, match=f"holds '{name}', which its {MANIFEST} does not name"):
        verify_bundle(bundle)
    (bundle / name).unlink()
    verify_bundle(bundle)


def test_a_signature_alone_may_lie_beside_the_files(bundle: Path) -> None:
    (bundle / SIGNATURE).write_text("signed")
    assert verify_bundle(bundle) == bundle_digest(bundle)
    (bundle / "notes.txt").write_text("")
    with pytest.raises(BundleError, match=r"holds 'notes.txt'"):
        verify_bundle(bundle)


def test_files_swapped_for_another_bundles_are_noticed(bundle: Path, tmp_path: Path) -> None:
    save_bundle(
        make(SMALL, seed=1), tmp_path / "other", {n: p + b"x" for n, p in ATTACHMENTS.items()}
    )
    for name in (WEIGHTS, *ATTACHMENTS):
        whole = (bundle / name).read_bytes()
        (bundle / name).write_bytes((tmp_path / "other" / name).read_bytes())
        assert_refused(bundle, f"{name} was altered")
        (bundle / name).write_bytes(whole)
    (bundle / MANIFEST).write_bytes((tmp_path / "other" / MANIFEST).read_bytes())
    assert_refused(bundle, "was altered")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_refused(value: float, bundle: Path) -> None:
    state = make(SMALL).state_dict()
    forge(bundle, generator=save(state | {"layers.9.bias": torch.tensor([value])}))
    assert_refused(bundle, "its weights are not all numbers")


def test_weights_that_draw_no_numbers_are_noticed(bundle: Path) -> None:
    state = make(SMALL).state_dict()
    huge = {name: v * 1e38 if v.is_floating_point() else v for name, v in state.items()}
    forge(bundle, generator=save(huge))
    with pytest.raises(BundleError, match="its weights are out of all bounds"):
        verify_bundle(bundle)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
NOT_JSON = [
    b"",
    b"{",
    b"\xff\xfe",
    b"[" * 60_000,
    b'{"files":' * 7_000,
    b"NaN",
    b"9" * 5000,
    b"null",
    b"[]",
    b'"files"',
]


@pytest.mark.parametrize("payload", NOT_JSON, ids=lambda payload: payload[:8].decode("latin-1"))
def test_what_is_not_a_json_object_is_refused(payload: bytes, bundle: Path) -> None:
    forge(bundle, config=payload)
    assert_refused(bundle, "config.json is not")
    (bundle / MANIFEST).write_bytes(payload)
    assert_refused(bundle, "manifest.json is not")


@given(
    names=st.dictionaries(
        st.sampled_from([WEIGHTS, CONFIG, CARD, ONNX, MANIFEST]) | st.text(max_size=9),
        st.just(NOTHING) | st.text("0123456789abcdefg", min_size=63, max_size=65) | json_values,
    ),
    beside=st.dictionaries(st.text(max_size=5), json_values, max_size=1),
)
@example(names={WEIGHTS: NOTHING, CONFIG: NOTHING, CARD: "0" * 64}, beside={})
def test_a_manifest_is_names_and_digests_or_is_refused(
    names: dict[str, Any], beside: dict[str, Any]
) -> None:
    content = beside | {"files": names}
    if (
        content.keys() == {"files"}
        and {WEIGHTS, CONFIG} <= names.keys() <= {*FILES} - {MANIFEST}
        and all(re.fullmatch("[0-9a-f]{64}", str(digest)) for digest in names.values())
    ):
        assert parse_manifest(to_json(content)) == names
    else:
        with pytest.raises(BundleError, match=MANIFEST) as refusal:
            parse_manifest(to_json(content))
        assert str(refusal.value).isprintable()


@given(payload=st.binary() | st.text().map(str.encode) | json_values.map(to_json))
def test_no_bytes_do_more_to_the_manifest_than_be_refused(payload: bytes) -> None:
    with pytest.raises(BundleError, match=MANIFEST):
        parse_manifest(payload)


@given(
    network=st.sampled_from([SMALL, MlpConfig(latent_dim=2)]),
    key=st.sampled_from([*CONFIG_OF[SMALL], "networks", "latent_dim", "width", "self", "\ud800"]),
    value=json_values,
    nested=st.booleans(),
)
def test_no_config_does_more_than_be_refused(
    network: MlpConfig | ConvConfig, key: str, value: Any, nested: bool, shared_bundle: Path
) -> None:
    config = copy.deepcopy(CONFIG_OF[network])
    (config["networks"] if nested else config)[key] = value
    weights = save(make(network).state_dict())
    forge(shared_bundle, generator=weights, config=to_json(config))
    if to_json(config) == to_json(CONFIG_OF[network]):
        load_bundle(shared_bundle)
    else:
        assert_refused(shared_bundle)


ABSURD = [10**9, 10**12, 10**300, -1, 0, 1.5, 1.0, "16", "", True, False, None, [], {}]


@pytest.mark.parametrize(
    ("size", "value"),
    [
        (size, value)
        for size in ("width", "latent_dim", "fine_layers", "dots", "num_classes")
        for value in (*ABSURD, float("nan"), float("inf"))
        if (size, value) not in (("fine_layers", 0), ("dots", 0))
    ],
    ids=str,
)
def test_absurd_sizes_are_refused_before_any_memory_is_taken(
    size: str, value: Any, bundle: Path
) -> None:
    networks = {**CONFIG_OF[SMALL]["networks"], size: value}
    forge(bundle, config=to_json(CONFIG_OF[SMALL] | {"networks": networks}))
    assert_refused(bundle, f"does not describe a network: {size} must be")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"schema_version": 5}, "has schema 5; this code reads 1 to 4"),
        ({"schema_version": True}, "has schema True; this code reads 1 to 4"),
        ({"schema_version": None}, "has schema None; this code reads 1 to 4"),
        ({"schema_version": 0}, "has schema 0; this code reads 1 to 4"),
        ({"schema_version": 1}, "does not give the sizes"),
        ({"schema_version": "9" * 60_000}, r"has schema '9{12}\.\.\.9{13}'; this code reads 1 to"),
        ({"schema_version": 2}, "has schema 2, whose convolutional generators this code cannot"),
        ({"schema_version": 3}, "has schema 3, whose convolutional generators this code cannot"),
        ({"architecture": "diffusion"}, "names no known architecture; known: mlp, conv"),
        ({"architecture": ["conv"]}, "names no known architecture"),
        ({"architecture": "mlp"}, "does not give the sizes of its architecture"),
        ({"networks": []}, "names no known architecture"),
        ({"networks": {}}, "does not give the sizes"),
        ({"networks": {"latent_dim": 2, "width": 1, "num_classes": 10, "x": 1}}, "does not give"),
        ({"num_classes": 0}, "says more or other"),
        ({"image_shape": [32, 32]}, "says more or other"),
        ({"value_range": [0, 1]}, "says more or other"),
        ({"code": "print()"}, "says more or other"),
    ],
)
def test_a_config_that_this_code_does_not_know_is_refused(
    change: dict[str, Any], match: str, bundle: Path
) -> None:
    forge(bundle, config=to_json(CONFIG_OF[SMALL] | change))
    assert_refused(bundle, match)


@pytest.mark.parametrize(
    ("config", "schema"), [(SMALL, 1), *((MlpConfig(latent_dim=2), schema) for schema in (1, 2, 3))]
)
def test_a_bundle_of_an_older_schema_draws_what_it_drew(
    config: MlpConfig | ConvConfig, schema: int, tmp_path: Path
) -> None:
    generator = make(config)
    save_bundle(generator, tmp_path / "bundle")
    content = CONFIG_OF[config]
    sizes = {k: v for k, v in content["networks"].items() if SINCE.get(k, 1) <= schema}
    older = content | {"schema_version": schema, "networks": sizes}
    forge(tmp_path / "bundle", config=to_json(older))
    loaded = load_bundle(tmp_path / "bundle")
    assert loaded.config == config
    assert torch.equal(draw(loaded, [-1], num=9, seed=0), draw(generator, [-1], num=9, seed=0))


def drop(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if k != "project.weight"}


@pytest.mark.parametrize(
    "change",
    [
        lambda state: {},
        drop,
        lambda state: state | {"extra": torch.zeros(1)},
        lambda state: {f"module.{k}": v for k, v in state.items()},
        lambda state: {k: v.double() if v.is_floating_point() else v for k, v in state.items()},
        lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
        lambda state: {k: v.int() for k, v in state.items()},
        lambda state: {k: v.to(torch.complex64) for k, v in state.items()},
        lambda state: {k: v.unsqueeze(0) for k, v in state.items()},
        lambda state: {k: v.flatten() for k, v in state.items()},
        lambda state: state | {"project.weight": state["project.weight"].T.contiguous()},
        lambda state: state | {"project.weight": torch.zeros(0, 10**18)},
        lambda state: make(ConvConfig(latent_dim=2, width=2)).state_dict(),
        lambda state: make(MlpConfig(latent_dim=2)).state_dict(),
    ],
)
def test_weights_of_another_network_are_refused(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], bundle: Path
) -> None:
    forge(bundle, generator=save(change(make(SMALL).state_dict())))
    assert_refused(bundle, "does not hold the weights of its config")


def entry(dtype: Any = "F32", shape: Any = (1,), end: Any = 4) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"x",
        struct.pack("<Q", 2**64 - 1),
        struct.pack("<Q", 10**8) + b"{}",
        safetensors([]),
        safetensors(None),
        safetensors(b"[" * 50_000),
        safetensors(b"\xff\xff"),
        safetensors({"a": entry(shape=[2**62, 4], end=0)}),
        safetensors({"a": entry(shape=[10**12], end=4 * 10**12)}, b"1234"),
        safetensors({"a": entry(shape=[0, 2**63], end=0)}),
        safetensors({"a": entry(shape=[0, 2**62, 2**62], end=0)}),
        safetensors({"a": entry(shape=[-1])}, b"1234"),
        safetensors({"a": entry(shape=["1"])}, b"1234"),
        safetensors({"a": entry(shape=[1.5])}, b"1234"),
        safetensors({"a": entry(end=8)}, b"12345678"),
        safetensors({"a": entry(end=-4)}, b"1234"),
        safetensors({"a": entry()}, b"12"),
        safetensors({"a": entry(), "b": entry()}, b"1234"),
        safetensors({"a": entry(dtype="F4", shape=[2], end=1)}, b"1"),
        safetensors({"a": entry(dtype="F8_E8M0", end=1)}, b"1"),
        safetensors({"a": entry(dtype="OBJECT")}, b"1234"),
        safetensors({"a": entry(dtype=None)}, b"1234"),
        safetensors({"a": {}}),
        safetensors({"__metadata__": {"a": 1}}),
        b"PK\x03\x04" + bytes(100),  # a zip, as torch.save writes
        b"\x80\x04cos\nsystem\n(S'exit 1'\ntR.",  # a pickle
    ],
)
def test_what_is_not_safetensors_is_refused(payload: bytes, bundle: Path) -> None:
    forge(bundle, generator=payload)
    assert_refused(bundle, "is not a safetensors file")


@given(
    header=st.dictionaries(
        st.sampled_from(["project.weight", "layers.12.bias", "layers.1.num_batches_tracked", "a"]),
        st.builds(
            entry,
            dtype=st.sampled_from(["F32", "I64", "BF16", "BOOL", "F4", "C64", "U16", "x"]),
            shape=st.lists(st.integers(-1, 3) | st.integers(2**31, 2**65), max_size=4),
            end=st.integers(0, 16),
        )
        | json_values,
        max_size=3,
    ),
    body=st.binary(max_size=16),
    cut=st.integers(0, 8),
)
def test_no_weights_file_does_more_than_be_refused(
    header: dict[str, Any], body: bytes, cut: int, shared_bundle: Path
) -> None:
    payload = safetensors(header, body)
    forge(
        shared_bundle,
        generator=payload[: len(payload) - cut],
        config=to_json(CONFIG_OF[SMALL]),
    )
    assert_refused(shared_bundle)


def test_saving_replaces_a_bundle_and_leaves_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "deep" / "bundle"
    save_bundle(make(SMALL), folder)
    digest = save_bundle(make(SMALL, seed=1), folder)
    assert bundle_digest(folder) == digest
    load_bundle(folder)
    assert list(folder.parent.iterdir()) == [folder]


def test_saving_fills_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "bundle").mkdir()
    save_bundle(make(SMALL), tmp_path / "bundle")
    load_bundle(tmp_path / "bundle")


def test_saving_never_replaces_what_is_not_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("cat")
    (tmp_path / "letter").write_text("dear")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / MANIFEST).write_text('{"name": "a web site has one, too"}')
    save_bundle(make(SMALL), tmp_path / "annotated")
    (tmp_path / "annotated" / "notes.txt").write_text("mine")
    for name in ("photos", "letter", "site", "annotated"):
        with pytest.raises(OSError, match=name):
            save_bundle(make(SMALL), tmp_path / name)
    assert (tmp_path / "photos" / "cat.png").read_text() == "cat"
    assert (tmp_path / "letter").read_text() == "dear"
    assert [path.name for path in (tmp_path / "site").iterdir()] == [MANIFEST]
    assert (tmp_path / "annotated" / "notes.txt").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", range(len(FILES)))
def test_an_interrupted_save_leaves_what_was_there(
    error: BaseException, after: int, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = bytes_of(bundle)
    write = Path.write_bytes
    written: list[str] = []

    def write_until(path: Path, payload: bytes) -> int:
        if len(written) == after:
            write(path, payload[:1])
            raise error
        written.append(path.name)
        return write(path, payload)

    monkeypatch.setattr(Path, "write_bytes", write_until)
    for folder in (bundle, bundle.with_name("fresh")):
        written.clear()
        with pytest.raises(type(error)):
            save_bundle(make(SMALL, seed=1), folder, ATTACHMENTS)
    assert bytes_of(bundle) == before
    assert list(bundle.parent.iterdir()) == [bundle]


def test_at_every_move_of_a_save_the_folder_holds_a_whole_bundle_or_nothing(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    rename, remove = Path.rename, shutil.rmtree

    def look() -> None:
        seen.append(bundle.exists())
        if bundle.exists():
            load_bundle(bundle)

    def looking_rename(path: Path, target: Path) -> Path:
        look()
        moved = rename(path, target)
        look()
        return moved

    def looking_remove(path: str, *args: Any, **options: Any) -> None:
        look()
        remove(path, *args, **options)

    monkeypatch.setattr(Path, "rename", looking_rename)
    monkeypatch.setattr(shutil, "rmtree", looking_remove)
    save_bundle(make(SMALL, seed=1), bundle)
    assert seen[0]
    assert seen[-1]
    assert seen.count(False) == 2  # after the old one went, before the new one came
