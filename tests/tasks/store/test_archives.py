"""Archives: what is wanted comes out under its own name, and nothing an archive holds can reach further."""

import bz2
import gzip
import io
import lzma
import shutil
import tarfile

import numpy as np
import pytest

from tasks.base import SourceError
from tasks.store import archives

WANTED = ("train/pos/*.txt", "data_batch_?")


def member(name, kind=tarfile.REGTYPE, **fields):
    """A header."""
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in fields.items():
        setattr(info, key, value)
    return info


def pack(*members, kind=tarfile.PAX_FORMAT):
    """A tar archive of names with contents, and of headers."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
        for entry in members:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry, io.BytesIO(bytes(entry.size)))
            else:
                name, content = entry
                tar.addfile(member(name, size=len(content)), io.BytesIO(content))
    return buffer.getvalue()


GOOD = [("aclImdb/train/pos/0_9.txt", b"good"), ("aclImdb/train/unsup/0_0.txt", b"?"), ("a/data_batch_1", b"")]


@pytest.fixture
def extract(tmp_path):
    """Extract an archive of these bytes; returns {path: content}. On an error nothing outside is touched."""

    def run(content, wanted=WANTED):
        path, into = tmp_path / "a.tar.gz", tmp_path / "into"
        path.write_bytes(content)
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir()
        try:
            archives.extract(path, into, wanted)
        finally:
            assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar.gz", "into"]
        files = (p for p in into.rglob("*") if not p.is_dir())
        return {p.relative_to(into).as_posix(): p.read_bytes() for p in files}

    return run


@pytest.fixture
def refused(extract, tmp_path):
    """The one line that refuses an archive; it names the file."""

    def run(content):
        with pytest.raises(SourceError) as caught:
            extract(content)
        message = str(caught.value)
        assert "\n" not in message and str(tmp_path / "a.tar.gz") in message and len(message) < 400
        return message

    return run


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_wanted_members_come_out_under_the_last_parts_of_their_names(extract, compress, kind):
    content = compress(pack(*GOOD, ("./train/pos/1_8.txt", b"more"), kind=kind))
    expected = {"train/pos/0_9.txt": b"good", "train/pos/1_8.txt": b"more", "data_batch_1": b""}
    assert extract(content) == expected


def test_patterns_stand_for_whole_names(extract):
    near = ["train/pos/x/1.txt", "train/pos/1.txt.bak", "data_batch_1.bin", "xdata_batch_1", "strain/pos/1.txt"]
    assert extract(pack(*((name, b"x") for name in near)), ("train/pos/*.txt", "data_batch_?")) == {}


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_are_read(extract, kind):
    name = "folder/" * 40 + "train/pos/0_9.txt"
    assert extract(pack((name, b"x"), kind=kind)) == {"train/pos/0_9.txt": b"x"}


HOSTILE = {
    "absolute": (("/train/pos/1.txt", b"x"), "AbsolutePathError"),
    "absolute, unwanted": (("/etc/passwd", b"x"), "AbsolutePathError"),
    "climbing": (("a/../../train/pos/1.txt", b"x"), "OutsideDestinationError"),
    "control characters": (("train/pos/\n1.txt", b"x"), "its name"),
    "absolute link": (member("train", tarfile.SYMTYPE, linkname="/etc"), "AbsoluteLinkError"),
    "relative link": (member("a/train", tarfile.SYMTYPE, linkname="../../b"), "LinkOutsideDestinationError"),
    "hard link": (member("pos/1.txt", tarfile.LNKTYPE, linkname="../secret"), "LinkOutsideDestinationError"),
    "absolute hard link": (member("1.txt", tarfile.LNKTYPE, linkname="/etc/shadow"), "AbsoluteLinkError"),
    "device": (member("train/pos/1.txt", tarfile.CHRTYPE, devmajor=1, devminor=5), "SpecialFileError"),
    "block device": (member("dev", tarfile.BLKTYPE), "SpecialFileError"),
    "pipe": (member("train/pos/1.txt", tarfile.FIFOTYPE), "SpecialFileError"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_member_that_reaches_out_condemns_the_archive(refused, name):
    entry, says = HOSTILE[name]
    assert f"is refused ({says})" in refused(gzip.compress(pack(*GOOD, entry)))


def test_a_climbing_name_that_ends_inside_lands_inside(extract, tmp_path):
    assert extract(pack(("a/../train/pos/1.txt", b"x"))) == {"train/pos/1.txt": b"x"}


def test_links_inside_are_neither_made_nor_followed(extract):
    inner = member("b/train", tarfile.SYMTYPE, linkname="../aclImdb/train")
    hard = member("train/pos/9.txt", tarfile.LNKTYPE, linkname="aclImdb/train/pos/0_9.txt")
    assert set(extract(pack(*GOOD, inner, hard))) == {"train/pos/0_9.txt", "data_batch_1"}


@pytest.fixture
def strict(monkeypatch):
    """Limits that small archives reach."""
    monkeypatch.setattr(archives, "FREE_BYTES", 1 << 18)


@pytest.mark.parametrize("name", ["train/pos/1.txt", "unwanted"])
@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_a_bomb_is_refused_before_it_has_unpacked(refused, strict, tmp_path, name, compress):
    assert "decompression bomb" in refused(compress(pack(*GOOD, (name, bytes(1 << 22)))))
    assert sum(p.stat().st_size for p in (tmp_path / "into").rglob("*.txt")) <= 1 << 20


def test_a_bomb_after_the_last_member_is_refused(refused, strict):
    assert "decompression bomb" in refused(gzip.compress(pack(*GOOD) + bytes(1 << 22)))


def test_a_bomb_in_a_header_is_refused(refused, strict):
    long_name = gzip.compress(pack(member("x", pax_headers={"comment": "!" * (1 << 22)})))
    assert "decompression bomb" in refused(long_name)


def test_no_archive_may_unpack_to_more_than_the_most(refused, monkeypatch):
    monkeypatch.setattr(archives, "MAX_BYTES", 1 << 12)
    assert "more than 4,096 bytes" in refused(pack(*GOOD, ("train/pos/7.txt", bytes(1 << 12))))


def test_a_sparse_file_is_refused(refused):
    content = bytearray(pack(("train/pos/1.txt", b"x"), kind=tarfile.GNU_FORMAT))
    content[156:157] = tarfile.GNUTYPE_SPARSE
    content[483:495] = b"%011o " % (1 << 30)  # the size it would expand to
    content[148:156] = b"%06o\0 " % (sum(content[:148]) + 8 * 32 + sum(content[156:512]))
    assert "sparse" in refused(bytes(content))


def test_the_same_file_twice_is_refused(refused):
    assert "0_9.txt occurs twice" in refused(pack(*GOOD, ("copy/train/pos/0_9.txt", b"other")))


def test_of_two_copies_the_inner_one_is_read(tmp_path, capsys):
    outer, inner = (("lra_release/" * depth + "x/a.tsv", content) for depth, content in ((1, b"outer"), (2, b"inner")))
    for order, twice in ((outer, inner), "differ"), ((inner, outer), "differ"), ((inner, (outer[0], b"inner")), ""):
        (tmp_path / "a.tar").write_bytes(pack(*order))
        archives.extract(tmp_path / "a.tar", tmp_path / "out", ["x/*.tsv"])
        assert (tmp_path / "out" / "x" / "a.tsv").read_bytes() == b"inner"
        assert ("of two different a.tsv the one in lra_release/lra_release" in capsys.readouterr().err) == bool(twice)
        assert [path.name for path in (tmp_path / "out" / "x").iterdir()] == ["a.tsv"]
        shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("compress", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_an_archive_cut_short_anywhere_is_refused(refused, compress):
    noise = np.random.default_rng(0).bytes(3000)
    whole = pack(*GOOD, ("train/pos/7.txt", noise))
    end = len(whole.rstrip(b"\0")) // 512 * 512 + 512
    content = compress(whole[: end + 1024])
    blocks = [0, 1, 511, 512, 1024, 2048, 2560, len(content) - 1025, len(content) // 2]
    cuts = blocks if compress is bytes else [1, 9, 60, len(content) // 2, len(content) - 9, len(content) - 1]
    for cut in cuts:
        assert "fetch it again" in refused(content[:cut]), cut


@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_a_damaged_archive_is_refused(refused, compress):
    content = pack(*GOOD)
    damaged = content[:1024] + b"\x01" + content[1025:]  # in the second header: tarfile takes it for the end
    assert "damaged or cut short after byte 1,024" in refused(compress(damaged))
    assert "fetch it again" in refused(b"not an archive at all " * 99)


def test_a_flipped_bit_of_a_compressed_archive_is_refused(refused):
    noise = np.random.default_rng(0).bytes(3000)
    content = bytearray(gzip.compress(pack(*GOOD, ("train/pos/7.txt", noise))))
    content[2000] ^= 1
    assert "fetch it again" in refused(bytes(content))


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_headers_of_any_content_are_refused_in_one_line_or_read(extract, tmp_path, kind):
    """Random bytes in headers whose checksums are right, so that they are looked at."""
    rng = np.random.default_rng(1)
    sparse = member("train/pos/4.txt", size=512, pax_headers={"GNU.sparse.map": "0,1", "GNU.sparse.name": "x"})
    whole = bytearray(pack(*GOOD, ("folder/" * 40 + "train/pos/5.txt", b"x"), sparse, kind=kind))
    outcomes = set()
    for _ in range(150):
        content = whole.copy()
        start = 512 * int(rng.integers(0, 12))
        for at in rng.integers(0, 512, 4):
            content[start + at] = rng.choice([0, 32, 48, 55, 61, 83, 120, 128, 255])
        header = content[start : start + 512]
        checksum = sum(header[:148]) + 8 * 32 + sum(header[156:])
        content[start + 148 : start + 156] = b"%06o\0 " % checksum
        try:
            extract(bytes(content))
            outcomes.add("read")
        except SourceError as error:
            assert "\n" not in str(error)
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}


def test_a_full_disk_is_one_line(refused, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archives.shutil, "copyfileobj", full)
    assert "0_9.txt cannot be written ([Errno 28] No space left on device); free space" in refused(pack(*GOOD))
