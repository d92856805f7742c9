import shutil
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gan.data import (
    DATASET_DIGEST,
    FILES,
    DataError,
    Split,
    has_digest,
    load_mnist,
    parse_idx,
)


@st.composite
def idx_files(draw: st.DrawFn) -> tuple[list[int], bytes, bytes]:
    """The shape, the values and the IDX file of labels or images."""
    shape = draw(st.lists(st.integers(0, 6), min_size=1, max_size=1)) + draw(
        st.sampled_from([[], [3, 5], [28, 28], [1, 1]])
    )
    size = torch.Size(shape).numel()
    values = draw(st.binary(min_size=size, max_size=size))
    header = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    return shape, values, header + values


@given(idx_files())
def test_an_idx_file_is_read_as_it_was_written(file: tuple[list[int], bytes, bytes]) -> None:
    shape, values, payload = file
    tensor = parse_idx(payload)
    assert tensor.dtype == torch.uint8
    assert list(tensor.shape) == shape
    assert bytes(tensor.flatten().tolist()) == values


@given(idx_files(), st.data())
def test_a_truncated_idx_file_is_refused_at_any_length(
    file: tuple[list[int], bytes, bytes], data: st.DataObject
) -> None:
    payload = file[2]
    with pytest.raises(DataError):
        parse_idx(payload[: data.draw(st.integers(0, len(payload) - 1))])


@given(idx_files(), st.binary(min_size=1, max_size=9))
def test_an_oversized_idx_file_is_refused(
    file: tuple[list[int], bytes, bytes], surplus: bytes
) -> None:
    with pytest.raises(DataError, match="oversized"):
        parse_idx(file[2] + surplus)


@given(idx_files(), st.integers(0, 3), st.integers(1, 255))
def test_a_changed_magic_number_is_refused(
    file: tuple[list[int], bytes, bytes], position: int, change: int
) -> None:
    payload = bytearray(file[2])
    payload[position] ^= change
    # Read with the other's rank, labels are cut off in the header, images are too long.
    with pytest.raises(DataError):
        parse_idx(bytes(payload))


@pytest.mark.parametrize("rank", [0, 2, 4, 255])
def test_a_rank_that_is_neither_labels_nor_images_is_refused(rank: int) -> None:
    with pytest.raises(DataError, match=f"rank {rank}"):
        parse_idx(bytes([0, 0, 8, rank]) + bytes(4 * rank))


def test_a_header_that_promises_more_than_any_memory_is_refused() -> None:
    with pytest.raises(DataError, match="truncated"):
        parse_idx(bytes([0, 0, 8, 3]) + b"\xff" * 12)


IMAGES = torch.zeros(3, 28, 28, dtype=torch.uint8)
LABELS = torch.tensor([0, 4, 9])


@pytest.mark.parametrize(
    ("images", "labels", "reason"),
    [
        (IMAGES[:2], LABELS, "2 images but 3 labels"),
        (IMAGES, torch.tensor([0, 4, 10]), "not a digit"),
        (IMAGES, torch.tensor([0, -1, 9]), "not a digit"),
        (IMAGES[:, 1:], LABELS, r"images must be uint8 \[n, 28, 28\]"),
        (IMAGES.flatten(1), LABELS, r"not uint8 \[3, 784\]"),
        (IMAGES.float(), LABELS, "not float32"),
        (IMAGES, LABELS.to(torch.uint8), "labels must be int64"),
        (IMAGES, LABELS[:, None], r"not int64 \[3, 1\]"),
    ],
)
def test_a_mislabelled_split_is_refused(
    images: torch.Tensor, labels: torch.Tensor, reason: str
) -> None:
    with pytest.raises(DataError, match=reason):
        Split(images=images, labels=labels)


def test_mnist_is_the_published_one(mnist_dir: Path) -> None:
    mnist = load_mnist(mnist_dir)
    assert (len(mnist.train), len(mnist.test)) == (60_000, 10_000)
    assert mnist.train.labels[:5].tolist() == [5, 0, 4, 1, 9]
    assert mnist.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    # The mean and deviation that are quoted everywhere, 0.1307 and 0.3081.
    pixels = mnist.train.images.double() / 255
    assert pixels.mean().item() == pytest.approx(0.1307, abs=1e-4)
    assert pixels.std().item() == pytest.approx(0.3081, abs=1e-4)


@pytest.fixture
def copy(mnist_dir: Path, tmp_path: Path) -> Path:
    for name in FILES:
        shutil.copyfile(mnist_dir / name, tmp_path / name)
    return tmp_path


def test_one_flipped_bit_is_noticed(copy: Path) -> None:
    path = copy / "train-images-idx3-ubyte"
    with path.open("r+b") as file:
        file.seek(1_000_000)
        value = file.read(1)[0]
        file.seek(1_000_000)
        file.write(bytes([value ^ 1]))
    with pytest.raises(DataError, match="train-images-idx3-ubyte has the wrong digest"):
        load_mnist(copy)


def test_a_missing_file_is_named(copy: Path) -> None:
    (copy / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(DataError, match=r"t10k-labels-idx1-ubyte \(No such file"):
        load_mnist(copy)


def test_files_under_each_others_names_are_refused(copy: Path) -> None:
    (copy / "t10k-labels-idx1-ubyte").replace(copy / "train-labels-idx1-ubyte")
    with pytest.raises(DataError, match="train-labels-idx1-ubyte has the wrong digest"):
        load_mnist(copy)


def test_a_digest_belongs_to_its_name(mnist_dir: Path) -> None:
    payload = (mnist_dir / "t10k-labels-idx1-ubyte").read_bytes()
    assert has_digest(payload, "t10k-labels-idx1-ubyte")
    assert not has_digest(payload, "train-labels-idx1-ubyte")


def test_the_id_of_the_dataset_stays() -> None:
    # Recorded with every run and every registered version, so it must never drift.
    assert DATASET_DIGEST == (
        "sha256:2a00db9d084f604523af047de2ac5c8d25cbfa719c1c2e91c0f80db74fa07083"
    )
