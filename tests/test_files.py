"""Files that are there whole or not at all."""

import os
import threading

import pytest

from fsefs_nnunet.files import ABANDONED_SECONDS, PART, replacing, write_atomically


def test_a_failed_write_leaves_the_old_content(tmp_path):
    file = tmp_path / "a.json"
    write_atomically(file, "old")
    with pytest.raises(RuntimeError), replacing(file) as part:
        part.write_text("ne")
        raise RuntimeError
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_several_writers_at_once(tmp_path):
    """Each writes beside the others; whoever reads sees one content or another, and nothing is left over."""
    file, contents = tmp_path / "a.txt", [str(i) * 100_000 for i in range(8)]
    file.write_text(contents[0])
    seen = set()

    def write(content: str) -> None:
        for _ in range(20):
            write_atomically(file, content)

    writers = [threading.Thread(target=write, args=(content,)) for content in contents]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        seen.add(file.read_text())
    for writer in writers:
        writer.join()
    assert seen <= set(contents) and file.read_text() in contents
    assert os.listdir(tmp_path) == ["a.txt"]


def test_what_killed_processes_left_is_deleted_after_a_day(tmp_path):
    file = tmp_path / "a[1].txt"
    fresh, old, other = (tmp_path / f".{name}.1-0{PART}" for name in ("a[1].txt", "a[1].txt.", "a1.txt"))
    for part in (fresh, old, other):
        part.write_text("cut")
    then = old.stat().st_mtime - ABANDONED_SECONDS - 10
    for part in (old, other):
        os.utime(part, (then, then))
    write_atomically(file, "new")
    assert fresh.exists() and other.exists() and not old.exists()
