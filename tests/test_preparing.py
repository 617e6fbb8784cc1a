"""Data sets brought to disk: small archives, downloaded from a server on loopback, or put there by hand."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import random
import signal
import stat
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from segbench import downloads
from segbench.data import load_dataset
from segbench.data.preparation import archives, distribution, preparing
from segbench.data.preparation.preparing import prepare
from segbench.data.sets import ade20k, camvid, cityscapes, pascal_voc
from segbench.downloads import Limits
from segbench.errors import DataError, DownloadError, SegbenchError, UnknownNameError, UsageError
from tests import servers
from tests.servers import Host, Resource
from tests.test_downloads import read_terminal, terminal, wait_until

COUNTS = {"val": 3, "train": 2, "trainval": 5, "test": 0}
FILE = "VOCtrainval_11-May-2012.tar"
IDS = {"val": ("2007_000001", "2007_000002", "2007_000003"), "train": ("2007_000004", "2007_000005")}


# Small data sets


def content(size: int = 20_000) -> bytes:
    return random.Random(size).randbytes(size)


def voc_files() -> dict[str, bytes]:
    base, files = "VOCdevkit/VOC2012", dict[str, bytes]()
    for split, ids in IDS.items():
        files[f"{base}/ImageSets/Segmentation/{split}.txt"] = "\n".join(ids).encode()
        for image_id in ids:
            files[f"{base}/JPEGImages/{image_id}.jpg"] = content()
            files[f"{base}/SegmentationClass/{image_id}.png"] = content(1000)
    return files


def sbd_files() -> dict[str, bytes]:
    base = "benchmark_RELEASE/dataset"
    files = {f"{base}/train.txt": b"2008_000001", f"{base}/val.txt": b"2007_000001", "benchmark_RELEASE/README": b"x"}
    for image_id in ("2008_000001", "2007_000001"):
        files |= {f"{base}/img/{image_id}.jpg": content(), f"{base}/cls/{image_id}.mat": content(1000)}
    return files


def ade_files() -> dict[str, bytes]:
    files = {}
    for split, folder in ade20k.FOLDERS.items():
        for number in range(COUNTS[split]):
            files[f"ADEChallengeData2016/images/{folder}/{number}.jpg"] = content()
            files[f"ADEChallengeData2016/annotations/{folder}/{number}.png"] = content(1000)
    return files


def cityscapes_files(kind: str) -> dict[str, bytes]:
    files = {"README": b"Read me", f"{kind}/test/bonn/bonn_0_0{cityscapes.IMAGE}.png": b"not needed"}
    ending = cityscapes.IMAGE if kind == "leftImg8bit" else cityscapes.MASK
    for split in ("val", "train"):
        files |= {f"{kind}/{split}/ulm/ulm_{number}_0{ending}.png": content(50) for number in range(COUNTS[split])}
    return files


def tar(files: dict[str, bytes], mode: str = "w:", *extra: tarfile.TarInfo) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for info in extra:
            archive.addfile(info)
    return stream.getvalue()


def zipped(files: dict[str, bytes], *extra: zipfile.ZipInfo, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        for info in extra:
            archive.writestr(info, b"/etc/passwd")
    return stream.getvalue()


VOC = tar(voc_files())
ADE = zipped(ade_files())
SBD = tar(sbd_files(), "w:gz")


def offer(name: str, data: bytes, url: str = "", **changes: Any) -> None:
    """Replaces an archive of the table by a small one at a link; used in this process and in children."""
    known = distribution.SBD if name == "sbd" else distribution.ARCHIVES[name][0]
    digest = hashlib.new(known.algorithm, data).hexdigest()
    archive = dataclasses.replace(known, **({"url": url or known.url, "digest": digest, "bytes": len(data)} | changes))
    if name == "sbd":
        preparing.SBD = archive
    else:
        preparing.ARCHIVES = {**preparing.ARCHIVES, name: (archive,)}


def shrink() -> None:
    """The data sets have a few images."""
    preparing.LIMITS = Limits(connect_s=5, read_s=5, total_s=60, attempts=3, pause_s=0.01)
    camvid.IMAGES.update(COUNTS)
    for module in (pascal_voc, ade20k, cityscapes):
        original = module.protocol
        module.protocol = lambda variant, original=original: dataclasses.replace(original(variant), images=COUNTS)


@pytest.fixture(autouse=True)
def _small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("HF_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("SEGBENCH_CACHE", str(tmp_path / "cache"))
    for module, name in ((preparing, "LIMITS"), (preparing, "SBD"), (preparing, "ARCHIVES")):
        monkeypatch.setattr(module, name, getattr(module, name))
    for module in (pascal_voc, ade20k, cityscapes):
        monkeypatch.setattr(module, "protocol", module.protocol)
    monkeypatch.setattr(camvid, "IMAGES", dict(camvid.IMAGES))
    shrink()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def host() -> Iterator[Host]:
    with servers.host() as running:
        yield running


def there(root: Path) -> dict[str, bytes]:
    """All files below a folder."""
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def by_hand(root: Path, name: str, data: bytes) -> Path:
    """An archive that a person put into the root."""
    root.mkdir(exist_ok=True)
    (root / name).write_bytes(data)
    return root / name


# Downloads


@pytest.mark.parametrize("dataset_id", ["pascal_voc", "pascal_voc/void-ignored"])
def test_a_fresh_download_then_nothing_to_do(host: Host, root: Path, dataset_id: str) -> None:
    offer("pascal_voc", VOC, host.file("/voc.tar", Resource(VOC)))
    lines = prepare(dataset_id, root)
    base = root / "VOCdevkit/VOC2012"
    size = downloads.folders.size(len(VOC))
    assert lines == [
        f"Downloaded {FILE} ({size}), its MD5 is right.",
        f"Unpacked 12 files to {base}.",
        f"Removed the archive {FILE}; --keep-archive keeps it.",
        f"Pascal VOC 2012 is in {base}: val has all its 3 images, train has all its 2 images.",
        "The data belong to their authors. Read the terms of use: http://host.robots.ox.ac.uk/pascal/VOC/voc2012/",
    ]
    assert there(root) == voc_files()
    assert [path.name for path in root.iterdir()] == ["VOCdevkit"]
    assert load_dataset(dataset_id, root).image_ids == IDS["val"]
    for place in (root, root / "VOCdevkit", base):
        assert prepare(dataset_id, place, offline=True) == ["Nothing to do: all is there already.", *lines[3:]]
    assert len(host.log) == 1
    assert there(root) == voc_files()


def test_the_table() -> None:
    voc, ade = distribution.ARCHIVES["pascal_voc"][0], distribution.ARCHIVES["ade20k"][0]
    assert {len(archive.digest) for archive in (voc, distribution.SBD)} == {32}
    assert len(ade.digest) == 40
    for family in distribution.ARCHIVES.values():
        for archive in family:
            assert archive.file.endswith(".zip") or archive.digest  # only ZIP files have checksums inside
            assert not archive.url or (archive.url.endswith(archive.file) and archive.bytes)
    assert set(distribution.BY_HAND) == {
        name for name, family in distribution.ARCHIVES.items() if not all(archive.url for archive in family)
    }


@pytest.mark.slow
def test_the_published_numbers_of_images(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    files, base = {}, "VOCdevkit/VOC2012"
    for split, number in {"val": 1449, "train": 1464}.items():
        ids = [f"{split}_{index}" for index in range(number)]
        files[f"{base}/ImageSets/Segmentation/{split}.txt"] = "\n".join(ids).encode()
        files |= {f"{base}/JPEGImages/{image_id}.jpg": b"" for image_id in ids}
        files |= {f"{base}/SegmentationClass/{image_id}.png": b"" for image_id in ids}
    monkeypatch.setattr(preparing, "ARCHIVES", preparing.ARCHIVES)
    data = tar(files)
    offer("pascal_voc", data)
    by_hand(root, FILE, data)
    assert "val has all its 1449 images, train has all its 1464 images" in prepare("pascal_voc", root, offline=True)[-2]


def test_the_archive_is_kept(host: Host, root: Path) -> None:
    offer("pascal_voc", VOC, host.file("/voc.tar", Resource(VOC)))
    assert f"Kept the archive: {root / FILE}" in prepare("pascal_voc", root, keep_archive=True)
    assert there(root) == {**voc_files(), FILE: VOC}


def test_sbd(host: Host, root: Path) -> None:
    offer("pascal_voc", VOC, host.file("/voc.tar", Resource(VOC)))
    offer("sbd", SBD, host.file("/benchmark.tgz", Resource(SBD)))
    prepare("pascal_voc", root)
    lines = prepare("pascal_voc", root, sbd=True)
    assert lines[1] == f"Unpacked 7 files to {root / 'benchmark_RELEASE'}."
    assert "train_aug has all its 4 images" in lines[-2]
    assert "SBD" in lines[-1]
    assert there(root) == voc_files() | sbd_files()
    assert len(load_dataset("pascal_voc", root, split="train_aug")) == 3  # without the one of val
    assert prepare("pascal_voc", root, sbd=True)[0] == "Nothing to do: all is there already."
    assert len(host.log) == 2


def test_sbd_with_a_root_that_is_voc2012(host: Host, root: Path) -> None:
    offer("pascal_voc", VOC, host.file("/voc.tar", Resource(VOC)))
    offer("sbd", SBD, host.file("/benchmark.tgz", Resource(SBD)))
    prepare("pascal_voc", root)
    prepare("pascal_voc", root / "VOCdevkit/VOC2012", sbd=True)
    assert (root / "VOCdevkit/VOC2012/benchmark_RELEASE/dataset/train.txt").exists()


def test_continues_after_a_cut_connection(host: Host, root: Path) -> None:
    offer("pascal_voc", VOC, host.file("/voc.tar", Resource(VOC, faults=[servers.cut(60_000)])))
    prepare("pascal_voc", root)
    assert [request.status for request in host.gets()] == [200, 206]


def test_continues_in_a_later_call(host: Host, root: Path) -> None:
    link = host.file("/voc.tar", Resource(VOC, faults=[servers.cut(90_000)]))
    offer("pascal_voc", VOC, link)
    preparing.LIMITS = Limits(attempts=1)
    with pytest.raises(DownloadError) as caught:
        prepare("pascal_voc", root)
    message = str(caught.value)
    assert message.startswith(f"{FILE} cannot be downloaded: 127.0.0.1:")
    assert "90.0 kB of" in message
    assert "run the command again to continue" in message
    assert message.endswith(
        f"By hand: open {link} in a browser, save it as {root / FILE}, and run the same command again:\n"
        f"  segbench data prepare pascal_voc --root {root}"
    )
    assert {path.name for path in root.iterdir()} == {".segbench-pascal_voc"}
    prepare("pascal_voc", root)
    assert host.gets()[-1].status == 206
    assert there(root) == voc_files()


def test_a_wrong_checksum(host: Host, root: Path) -> None:
    offer("pascal_voc", VOC, host.file("/voc.tar", Resource(VOC)), digest="0" * 32)
    found = hashlib.md5(VOC).hexdigest()
    with pytest.raises(
        DownloadError, match=f"not the file that is expected: its MD5 is {found}, not {'0' * 32}.\nBy hand"
    ):
        prepare("pascal_voc", root)
    assert list(root.iterdir()) == []


def test_not_there_any_more(host: Host, root: Path) -> None:
    offer("pascal_voc", VOC, host.url + "/gone.tar")
    with pytest.raises(
        DownloadError, match=r"answers 404 Not Found: there is no such file(.|\n)*By hand: open (.|\n)* --root"
    ):
        prepare("pascal_voc", root)
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_offline(host: Host, root: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    offer("pascal_voc", VOC, host.file("/voc.tar", Resource(VOC)))
    if by == "environment":
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        DownloadError, match=rf"network is not to be used .*\nBy hand: open .* save it as {root / FILE}"
    ):
        prepare("pascal_voc", root, offline=by == "argument")
    by_hand(root, FILE, VOC)
    prepare("pascal_voc", root, offline=by == "argument")
    assert host.log == []


def test_plain_http_is_followed_for_a_pinned_hash_only(host: Host, root: Path) -> None:
    """0.0.0.0 leads to the server here, and is not a loopback address."""
    link = host.file("/ade.zip", Resource(ADE)).replace("127.0.0.1", "0.0.0.0")
    offer("ade20k", ADE, link)
    assert f"Unpacked 10 files to {root / 'ADEChallengeData2016'}." in prepare("ade20k", root)
    with pytest.raises(DownloadError, match="is not encrypted"):
        downloads.fetch([{"type": "url", "url": link}], name="model", sha256="0" * 64)
    part = downloads.transfer.Part(root / "x.part")
    with pytest.raises(DownloadError, match="is not encrypted"):
        downloads.transfer.download(link, part, limits=Limits(), report=lambda done, total: None)


# Full and read-only disks


def test_no_space_for_the_download(host: Host, root: Path) -> None:
    offer("pascal_voc", VOC, host.file("/voc.tar", Resource(VOC)), bytes=1 << 60)
    with pytest.raises(
        DownloadError, match=r"are needed, .* are free\. Free some space, or give another folder as --root"
    ):
        prepare("pascal_voc", root)
    assert (host.log, list(root.iterdir())) == ([], [])


def test_no_space_for_the_files(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    offer("pascal_voc", VOC)
    by_hand(root, FILE, VOC)
    nearly_full = type("Usage", (), {"free": 100})
    monkeypatch.setattr(downloads.folders.shutil, "disk_usage", lambda folder: nearly_full)
    with pytest.raises(DownloadError, match=r"10[0-9.]+ kB are needed, 100 bytes are free"):
        prepare("pascal_voc", root)
    assert there(root) == {FILE: VOC}


@pytest.mark.slow
@pytest.mark.parametrize("limit", [50_000, 10_000])
def test_the_disk_becomes_full(host: Host, root: Path, limit: int) -> None:
    """A limit on the size of files, as a quota: while downloading, and while unpacking."""
    if limit == 10_000:
        by_hand(root, FILE, VOC)
    done = child(host.file("/voc.tar", Resource(VOC)), root, limit=limit).communicate(timeout=30)
    assert "is full (File too large). Free some space. Or give another folder as --root." in done[1]
    assert not (root / "VOCdevkit").exists()
    offer("pascal_voc", VOC, host.url + "/voc.tar")
    prepare("pascal_voc", root)
    assert there(root).items() >= voc_files().items()


def test_a_root_that_cannot_be_used(host: Host, tmp_path: Path) -> None:
    offer("pascal_voc", VOC, host.file("/voc.tar", Resource(VOC)))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is not a folder"):
        prepare("pascal_voc", tmp_path / "file")
    with pytest.raises(DownloadError, match=r"cannot write to .* Or give another folder as --root"):
        prepare("pascal_voc", tmp_path / "file" / "below")
    with pytest.raises(DataError, match="Write the folder out"):
        prepare("pascal_voc", Path("~nobody-of-this-name/x"))


# Killed, interrupted, two at once


def test_killed_while_downloading(host: Host, root: Path) -> None:
    never = threading.Event()
    link = host.file("/voc.tar", Resource(VOC, faults=[servers.hold(90_000, never)]))
    process = child(link, root)
    wait_until(lambda: any(path.stat().st_size >= 80_000 for path in root.rglob("*.part")))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    offer("pascal_voc", VOC, link)
    prepare("pascal_voc", root)
    assert host.gets()[-1].status == 206
    assert there(root) == voc_files()
    never.set()


@pytest.mark.slow
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("moment", ["writing", "before the move"])
def test_killed_while_unpacking(host: Host, root: Path, sign: signal.Signals, moment: str) -> None:
    link = host.file("/voc.tar", Resource(VOC))
    process = child(link, root, hold=moment)
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    process.send_signal(sign)
    process.communicate(timeout=30)
    assert process.returncode != 0
    assert {path.name for path in root.iterdir()} <= {".segbench-pascal_voc", ".segbench-pascal_voc.lock"}
    assert any(root.rglob("*.jpg")) == (sign == signal.SIGKILL)
    with pytest.raises(DataError, match="of 'pascal_voc' has no") as caught:
        load_dataset("pascal_voc", root)
    assert ".segbench" not in str(caught.value)  # nothing looks as if it were the data set
    offer("pascal_voc", VOC, link)
    assert prepare("pascal_voc", root)[0] == f"{FILE} had been downloaded already."
    assert len(host.log) == 1
    assert there(root) == voc_files()


@pytest.mark.slow
def test_two_at_once(host: Host, root: Path) -> None:
    go = threading.Event()
    link = host.file("/voc.tar", Resource(VOC, faults=[servers.hold(60_000, go)]))
    first = child(link, root)
    wait_until(lambda: host.log)
    second = child(link, root)
    assert second.stderr is not None
    assert "pascal_voc: waiting for another process" in second.stderr.readline()
    go.set()
    for process in (first, second):
        assert "Pascal VOC 2012 is in" in process.communicate(timeout=30)[0]
    assert len(host.gets()) == 1
    assert there(root) == voc_files()


@pytest.mark.slow
def test_bars_on_a_terminal_only(host: Host, root: Path) -> None:
    link = host.file("/voc.tar", Resource(VOC))
    outer, inner = terminal()
    process = child(link, root, stderr=inner)
    os.close(inner)
    drawn = read_terminal(outer)
    assert process.wait(30) == 0
    for words in (FILE, f"checking {FILE}", f"unpacking {FILE}"):
        assert words.encode() in drawn
    assert child(link, root).communicate(timeout=30)[1] == ""


# What is there already


def test_an_archive_put_there_by_hand(host: Host, root: Path) -> None:
    offer("pascal_voc", VOC, host.file("/voc.tar", Resource(VOC)))
    path = by_hand(root, FILE, VOC[:-20_000])
    with pytest.raises(
        DataError, match=rf"{path} is not the archive that is meant, or not all of it: its MD5 is .*Delete"
    ):
        prepare("pascal_voc", root)
    assert there(root) == {FILE: VOC[:-20_000]}
    path.write_bytes(VOC)
    assert prepare("pascal_voc", root)[0] == f"Used {path}."
    assert there(root) == {**voc_files(), FILE: VOC}
    assert host.log == []


def test_missing_files_are_put_in(root: Path) -> None:
    offer("pascal_voc", VOC)
    by_hand(root, FILE, VOC)
    prepare("pascal_voc", root)
    base = root / "VOCdevkit/VOC2012"
    (base / "JPEGImages/2007_000004.jpg").unlink()
    (base / "mine.txt").write_text("mine")
    (base / "SegmentationClass/2007_000001.png").write_bytes(b"?" * 1000)
    assert f"Unpacked 1 files to {base}; 11 were there already." in prepare("pascal_voc", root)
    expected = {**voc_files(), FILE: VOC, "VOCdevkit/VOC2012/mine.txt": b"mine"}
    assert there(root) == {**expected, "VOCdevkit/VOC2012/SegmentationClass/2007_000001.png": b"?" * 1000}


def test_missing_files_are_put_where_the_data_set_is(root: Path) -> None:
    offer("pascal_voc", VOC)
    by_hand(root, FILE, VOC)
    prepare("pascal_voc", root)
    (root / "VOCdevkit/VOC2012").rename(root / "VOC2012")
    (root / "VOC2012/JPEGImages/2007_000004.jpg").unlink()
    assert f"Unpacked 1 files to {root / 'VOC2012'}; 11 were there already." in prepare("pascal_voc", root)


@pytest.mark.parametrize("kind", ["shorter", "folder"])
def test_a_file_that_is_there_and_another(root: Path, kind: str) -> None:
    offer("pascal_voc", VOC)
    by_hand(root, FILE, VOC)
    target = root / "VOCdevkit/VOC2012/JPEGImages/2007_000001.jpg"
    target.parent.mkdir(parents=True)
    if kind == "folder":
        target.mkdir()
    else:
        target.write_bytes(b"cut off")
    before = there(root)
    with pytest.raises(DataError, match=rf"{target} is there, and is not the file of 20.0 kB .* Move it away"):
        prepare("pascal_voc", root)
    assert there(root) == before


def test_an_archive_that_does_not_make_it_complete(root: Path) -> None:
    files = voc_files()
    del files["VOCdevkit/VOC2012/JPEGImages/2007_000001.jpg"]
    offer("pascal_voc", tar(files))
    by_hand(root, FILE, tar(files))
    with pytest.raises(
        DataError, match=r"was unpacked below .*, but is not complete: 2007_000001 of val.txt has no image"
    ):
        prepare("pascal_voc", root)


# Archives that do harm


def tar_info(name: str, kind: bytes = tarfile.REGTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


def zip_info(name: str, mode: int = stat.S_IFREG) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, (mode | 0o644) << 16
    return info


NAMES = ["../evil", "VOCdevkit/../../evil", "/tmp/evil", "a/..", "..\\evil", "C:evil"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_paths_that_lead_out(root: Path, kind: str, name: str) -> None:
    if kind == "tar":
        refused("pascal_voc", FILE, tar(voc_files(), "w:", tar_info(name)), root, "could lead out of the folder")
    else:
        refused("ade20k", "ADEChallengeData2016.zip", zipped(ade_files(), zip_info(name)), root, "could lead out")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (tarfile.SYMTYPE, "is a link"),
        (tarfile.LNKTYPE, "is a link"),
        (tarfile.CHRTYPE, "is a device"),
        (tarfile.BLKTYPE, "is a device"),
        (tarfile.FIFOTYPE, "is a device"),
    ],
)
def test_links_and_devices_in_tar(root: Path, kind: bytes, words: str) -> None:
    info = tar_info("VOCdevkit/VOC2012/JPEGImages/x.jpg", kind)
    refused("pascal_voc", FILE, tar(voc_files(), "w:", info), root, f"its entry '{info.name}' {words}")


@pytest.mark.parametrize(
    ("mode", "words"), [(stat.S_IFLNK, "is a link"), (stat.S_IFCHR, "is a device"), (stat.S_IFIFO, "is a device")]
)
def test_links_and_devices_in_zip(root: Path, mode: int, words: str) -> None:
    info = zip_info("ADEChallengeData2016/x", mode)
    refused("ade20k", "ADEChallengeData2016.zip", zipped(ade_files(), info), root, words)


def test_a_file_below_a_file(root: Path) -> None:
    data = zipped({**ade_files(), "ADEChallengeData2016/x": b"", "ADEChallengeData2016/x/y": b""})
    refused("ade20k", "ADEChallengeData2016.zip", data, root, "'ADEChallengeData2016/x' is a file and a folder")


def test_bombs(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_BYTES", 10_000_000)
    monkeypatch.setattr(archives, "MAX_FILES", 100)
    zeros = {"VOCdevkit/VOC2012/x": bytes(20_000_000)}
    refused("sbd", "benchmark.tgz", tar(zeros, "w:gz"), root, "it would fill more than 10.0 MB")
    data = zipped({f"ADEChallengeData2016/{letter}": bytes(4_000_000) for letter in "abc"})
    assert len(data) < 20_000
    refused("ade20k", "ADEChallengeData2016.zip", data, root, "it would fill more than 10.0 MB")
    many = zipped({f"ADEChallengeData2016/{number}": b"" for number in range(101)})
    refused("ade20k", "ADEChallengeData2016.zip", many, root, "it has more than 100 entries")


def test_encrypted_and_unusual_zip(root: Path) -> None:
    locked = bytearray(zipped({"ADEChallengeData2016/x": b"x"}))
    locked[locked.index(b"PK\1\2") + 8] |= 1
    refused("ade20k", "ADEChallengeData2016.zip", bytes(locked), root, "is encrypted")
    data = zipped(ade_files(), compression=zipfile.ZIP_BZIP2)
    refused("ade20k", "ADEChallengeData2016.zip", data, root, "compressed in an unusual way")


@pytest.mark.parametrize("damage", ["cut", "changed", "not an archive", "another"])
def test_damaged(root: Path, damage: str) -> None:
    data = bytearray(ADE)
    if damage == "changed":
        data[len(data) // 3] ^= 1
    words = "is damaged or incomplete"
    if damage == "another":
        data, words = bytearray(zipped({"other/x": b"x"})), "has no folder ADEChallengeData2016"
    wrong = {"cut": data[:-30_000], "not an archive": b"<html>"}.get(damage, data)
    refused("ade20k", "ADEChallengeData2016.zip", bytes(wrong), root, words, nothing="")
    refused("pascal_voc", FILE, VOC[:50_000], root, "is damaged or incomplete", nothing="")
    refused("sbd", "benchmark.tgz", SBD[:20_000], root, "is damaged or incomplete", nothing="")


def refused(name: str, file: str, data: bytes, root: Path, words: str, nothing: str = "Nothing was written") -> None:
    """An archive whose hash is right is refused all the same, and leaves nothing behind."""
    offer(name, data)
    path = by_hand(root, file, data)
    before = there(root.parent)
    if name == "sbd":  # VOC itself is there
        offer("pascal_voc", VOC)
        by_hand(root, FILE, VOC)
        prepare("pascal_voc", root)
        before = there(root.parent)
    with pytest.raises(DataError) as caught:
        prepare("pascal_voc" if name == "sbd" else name, root, sbd=name == "sbd")
    assert words in str(caught.value)
    assert nothing in str(caught.value)
    assert str(path) in str(caught.value)
    assert there(root.parent) == before
    assert not any(path.name.startswith(".") for path in root.iterdir())
    path.unlink()


# Data sets that are not downloaded


def test_cityscapes(root: Path) -> None:
    with pytest.raises(DataError) as caught:
        prepare("cityscapes", root)
    message = str(caught.value)
    assert "Cityscapes needs a login" in message
    assert (
        "register at https://www.cityscapes-dataset.com/, download leftImg8bit_trainvaltest.zip and "
        f"gtFine_trainvaltest.zip, put them into {root}, and run the same command again:\n"
        f"  segbench data prepare cityscapes --root {root}"
    ) in message
    assert not root.exists()
    images, masks = (zipped(cityscapes_files(kind)) for kind in ("leftImg8bit", "gtFine"))
    by_hand(root, "leftImg8bit_trainvaltest.zip", images)
    with pytest.raises(DataError, match=r"download gtFine_trainvaltest\.zip, put"):
        prepare("cityscapes", root)
    by_hand(root, "gtFine_trainvaltest.zip", masks)
    lines = prepare("cityscapes/512x1024", root)
    assert lines[0] == f"Used {root / 'leftImg8bit_trainvaltest.zip'}."
    assert lines[1] == f"Unpacked 5 files to {root / 'leftImg8bit'}."
    assert "val has all its 3 images, train has all its 2 images" in lines[-2]
    assert {path.name for path in root.iterdir()} == {
        "leftImg8bit", "gtFine", "leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip",
    }  # fmt: skip
    assert {path.name for path in (root / "gtFine").iterdir()} == {"val", "train"}  # test is not needed
    assert prepare("cityscapes", root)[0] == "Nothing to do: all is there already."
    for path in [*root.glob("*.zip"), *root.glob("*/train/ulm/*0_0*")]:
        path.unlink()
    lines = prepare("cityscapes", root)
    assert lines[0] == f"Cityscapes, fine annotations is in {root}: val has all its 3 images."
    assert "train is not complete: train in" in lines[2]
    assert "register at" in lines[3]


def test_camvid(root: Path) -> None:
    with pytest.raises(DataError, match=r"put the layout of SegNet there, or download 701_StillsRaw_full\.zip and"):
        prepare("camvid", root)
    names = ["0016E5_07959", "0016E5_07961", "0016E5_08159", "0001TP_006690", "0006R0_f00930"]
    stills = {f"701_StillsRaw_full/{name}.png": content(50) for name in names}
    masks = {f"{name}_L.png": content(50) for name in names}  # this archive has no folder of its own
    masks["__MACOSX/._x.png"] = b"x"
    by_hand(root, "701_StillsRaw_full.zip", zipped(stills))
    by_hand(root, "LabeledApproved_full.zip", zipped(masks))
    lines = prepare("camvid", root)
    assert f"Unpacked 5 files to {root / 'LabeledApproved_full'}." in lines
    assert "val has all its 3 images, train has all its 2 images" in lines[-2]
    assert len(load_dataset("camvid/original", root)) == 3


def test_nothing_to_prepare(root: Path) -> None:
    assert prepare("shapes", root) == ["shapes is embedded in segbench: nothing to prepare, and it needs no root."]
    for name in ("folder", "folder/mine"):
        with pytest.raises(
            DataError, match=r"of your own: put it there yourself\.\nLayout:\n<data root>/\n  dataset.yaml"
        ):
            prepare(name, root)
    with pytest.raises(UnknownNameError, match="Did you mean 'ade20k'"):
        prepare("ade20", root)
    with pytest.raises(UsageError, match="SBD belongs to pascal_voc, not to ade20k"):
        prepare("ade20k", root, sbd=True)
    assert not root.exists()


# Another process


def child(
    link: str, root: Path, *, hold: str = "", limit: int = 0, stderr: int = subprocess.PIPE
) -> subprocess.Popen[str]:
    """Prepares VOC in a process of its own, which stops at a moment or may not write large files."""
    options = json.dumps({"link": link, "root": str(root), "hold": hold, "limit": limit})
    return subprocess.Popen(
        [sys.executable, "-c", "from tests.test_preparing import main; main()", options],
        stdout=subprocess.PIPE, stderr=stderr, text=True, cwd=Path(__file__).parents[1],
    )  # fmt: skip


def main() -> None:
    """What `child` runs."""
    import resource

    options = json.loads(sys.argv[1])
    shrink()
    offer("pascal_voc", VOC, options["link"])

    def wait(*_: Any) -> None:
        print("holding", flush=True)
        time.sleep(60)

    if options["hold"] == "before the move":
        archives.os.sync = wait
    elif options["hold"] == "writing":
        unpack = preparing.unpack
        preparing.unpack = lambda *args, **named: unpack(
            *args, **{**named, "report": lambda done, total: wait() if done > total / 2 else None}
        )
    if options["limit"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (options["limit"], options["limit"]))
    try:
        print("\n".join(prepare("pascal_voc", Path(options["root"]))))
    except SegbenchError as error:
        sys.exit(str(error))


def test_a_file_named_like_the_wanted_folder_is_not_its_content() -> None:
    entry = archives.Entry("leftImg8bit", "file", 3, lambda: io.BytesIO(b"abc"))
    assert archives.below({PurePosixPath("leftImg8bit"): entry}, "leftImg8bit", only=("val", "train")) == {}
