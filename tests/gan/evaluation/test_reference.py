import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gan.data import Mnist
from gan.evaluation.judge import Judge, load_judge
from gan.evaluation.reference import Reference, load_reference
from tests.gan.evaluation.conftest import part


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge()


@pytest.fixture(scope="module")
def tiny(mnist: Mnist) -> Mnist:
    return Mnist(train=part(mnist.train, 0, 40), test=part(mnist.test, 0, 20))


def require_equal(ours: Reference, theirs: Reference) -> None:
    for name, value in vars(theirs).items():
        assert torch.equal(vars(ours)[name], value)


def test_real_images_are_looked_at_once(small: Mnist, tmp_path: Path) -> None:
    judge = load_judge()
    first = load_reference(judge, small, tmp_path)
    (kept,) = tmp_path.iterdir()
    kept_at = kept.stat().st_mtime_ns
    again, fresh = load_reference(judge, small, tmp_path), load_reference(judge, small)
    assert kept.stat().st_mtime_ns == kept_at
    for name, value in vars(first).items():
        assert torch.equal(vars(again)[name], value)
        assert torch.equal(vars(fresh)[name], value)


def test_other_images_or_another_judge_are_looked_at_anew(small: Mnist, tmp_path: Path) -> None:
    judge = load_judge()
    load_reference(judge, small, tmp_path)
    load_reference(judge, replace(small, test=part(small.test, 0, 500)), tmp_path)
    with torch.no_grad():
        judge.head.bias.add_(1)
    load_reference(judge, small, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


def flip(payload: bytes, at: int) -> bytes:
    damaged = bytearray(payload)
    damaged[at] ^= 1
    return bytes(damaged)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda payload: b"",
    "cut in the header": lambda payload: payload[:100],
    "cut in the tensors": lambda payload: payload[:-1],
    "without its digest": lambda payload: payload.replace(b"sha256", b"sha-25"),
    "other names": lambda payload: payload.replace(b"test_reach", b"test_beach"),
    "a bit of the last tensor": lambda payload: flip(payload, -1),
    "a bit of the first tensor": lambda payload: flip(payload, len(payload) // 2),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_noticed_and_made_anew(
    damage: str, judge: Judge, tiny: Mnist, tmp_path: Path
) -> None:
    first = load_reference(judge, tiny, tmp_path)
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(DAMAGES[damage](whole))
    require_equal(load_reference(judge, tiny, tmp_path), first)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [whole]


def test_any_byte_of_the_header_may_be_wrong(judge: Judge, tiny: Mnist, tmp_path: Path) -> None:
    first = load_reference(judge, tiny, tmp_path)
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    for at in range(whole.index(b"]}}"), 7):
        kept.write_bytes(flip(whole, at))
        require_equal(load_reference(judge, tiny, tmp_path), first)


def test_folder_that_cannot_be_written_only_costs_time(
    judge: Judge, tiny: Mnist, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    found = load_reference(judge, tiny, tmp_path / "file" / "cache")
    require_equal(found, load_reference(judge, tiny))


def test_full_disk_only_costs_time(
    judge: Judge, tiny: Mnist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(self: Path, payload: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", fill)
    found = load_reference(judge, tiny, tmp_path)
    require_equal(found, load_reference(judge, tiny))
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_when_the_same_is_written(
    judge: Judge, tiny: Mnist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[str] = []

    def stop(self: Path, payload: bytes) -> int:
        left.append(self.parent.name)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", stop)
        first = load_reference(judge, tiny, tmp_path)
    (tmp_path / left[0]).mkdir()
    (tmp_path / left[0] / "part").write_bytes(b"left by one that was killed")
    require_equal(load_reference(judge, tiny, tmp_path), first)
    assert len(list(tmp_path.iterdir())) == 1


def test_what_one_left_that_was_killed_beside_a_faster_one_goes_with_the_next_look(
    judge: Judge, tiny: Mnist, tmp_path: Path
) -> None:
    first = load_reference(judge, tiny, tmp_path)
    (kept,) = tmp_path.iterdir()
    left = tmp_path / f".{kept.name}-killed"
    left.mkdir()
    (left / kept.name).write_bytes(b"a part")
    require_equal(load_reference(judge, tiny, tmp_path), first)
    assert list(tmp_path.iterdir()) == [kept]


def test_one_that_is_overtaken_as_it_writes_leaves_the_other_ones_whole_file(
    judge: Judge, tiny: Mnist, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Path.write_bytes

    def be_overtaken(self: Path, payload: bytes) -> int:
        monkeypatch.setattr(Path, "write_bytes", write)
        written = self.write_bytes(payload)
        load_reference(judge, tiny, tmp_path)
        return written

    monkeypatch.setattr(Path, "write_bytes", be_overtaken)
    ours = load_reference(judge, tiny, tmp_path)
    (kept,) = tmp_path.iterdir()
    kept_at = kept.stat().st_mtime_ns
    require_equal(load_reference(judge, tiny, tmp_path), ours)
    assert kept.stat().st_mtime_ns == kept_at, "it was whole"
