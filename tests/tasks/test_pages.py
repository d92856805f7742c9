import errno
from pathlib import Path

import pytest

from tasks.pages import write_page

EMPTY = {"note": "", "charts": [], "scores": [], "differences": {}}


def test_full_disk_leaves_the_page_that_was_there_and_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(self: Path, text: str) -> int:
        self.write_bytes(text.encode()[:1000])
        raise OSError(errno.ENOSPC, "No space left on device")

    page = tmp_path / "comparison.html"
    page.write_text("the one before")
    monkeypatch.setattr(Path, "write_text", fill)
    with pytest.raises(OSError, match="No space left on device"):
        write_page(page, page.name, films=[], stops=["last"], **EMPTY)
    assert list(tmp_path.iterdir()) == [page]
    assert page.read_text() == "the one before"
