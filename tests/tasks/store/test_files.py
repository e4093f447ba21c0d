"""Files: whole or not at all, and hashes of bytes and of source code."""

import hashlib
import io
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from tasks.store import files
from tasks.store.rng import kernel


def test_sha256_file_is_the_standard_one(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert files.sha256_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()


def test_atomic_path_replaces_the_file_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "new" / "a.npy"
    for value in (1, 2):
        with files.atomic_path(target) as temporary:
            np.save(temporary, np.array(value))  # appends .npy to a name without it
            assert value == 1 or np.load(target) == 1
    assert np.load(target) == 2
    assert list(target.parent.iterdir()) == [target]


def test_atomic_path_keeps_the_old_file_when_writing_fails(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), files.atomic_path(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_source_code_is_hashed_whole_and_wherever_it_stands(tmp_path):
    """A plug-in of one file, and one that is a folder: every .py file of it counts."""
    for folder in ("here", "there"):
        (tmp_path / folder / "large").mkdir(parents=True)
        for name in ("one.py", "large/__init__.py", "large/helper.py"):
            (tmp_path / folder / name).write_text(f"# {name}")

    def digest(file):
        return files.source_sha256(SimpleNamespace(__file__=str(tmp_path / file)))

    one, large = digest("here/one.py"), digest("here/large/__init__.py")
    assert one == digest("there/one.py") and large == digest("there/large/__init__.py") != one
    (tmp_path / "here" / "large" / "helper.py").write_text("# edited")
    assert digest("here/large/__init__.py") != large and digest("here/one.py") == one
    shutil.move(tmp_path / "there" / "large" / "helper.py", tmp_path / "there" / "large" / "other.py")
    assert digest("there/large/__init__.py") != large


def test_shared_modules_that_a_source_is_made_of_are_part_of_its_hash(tmp_path, monkeypatch):
    package = tmp_path / "bricks"
    (package / "kiln").mkdir(parents=True)
    for name, text in (
        ("__init__", ""),
        ("kiln/__init__", ""),
        ("kiln/clay", "from bricks.kiln import sand"),
        ("kiln/sand", ""),
        ("kiln/other", ""),
    ):
        (package / f"{name}.py").write_text(text)
    (tmp_path / "wall.py").write_text("from bricks.kiln.clay import form")
    monkeypatch.syspath_prepend(str(tmp_path))
    wall = SimpleNamespace(__file__=str(tmp_path / "wall.py"))
    own, whole = files.source_sha256(wall), files.source_sha256(wall, "bricks.kiln")
    (package / "kiln" / "other.py").write_text("# edited")
    assert files.source_sha256(wall, "bricks.kiln") == whole != own
    (package / "kiln" / "sand.py").write_text("# edited")
    assert files.source_sha256(wall, "bricks.kiln") != whole and files.source_sha256(wall) == own


def test_messages_are_the_same_in_every_run(tmp_path):
    texts = {files.one_line(OSError(f"cannot identify {io.BytesIO(b'')!r}")) for _ in range(3)}
    assert texts == {"cannot identify <_io.BytesIO object>"}
    for _ in range(2):
        with pytest.raises(OSError) as caught, files.atomic_path(tmp_path) as path:
            path.write_text("x")
        texts.add(f"{caught.value.strerror}: {caught.value.filename}")
    assert len(texts) == 2 and str(tmp_path) in "".join(texts)


def test_kernels_compile_where_no_cache_can_be_written():
    scope = {}
    exec("def twice(x): return 2 * x", scope)  # no source file, so numba has no place beside it
    assert kernel(scope["twice"])(21) == 42
