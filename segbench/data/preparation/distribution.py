"""How data sets are distributed: in which archives, where, and what a person has to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Archive:
    """A file that holds a data set, or a part of it.

    Attributes:
        file: its name.
        folder: the folder in it that is wanted; it appears at the same path below the root.
        whole: the folder is the whole data set, so that it may be elsewhere already.
        only: the folders in ``folder`` that are needed; all if empty.
        url: where it is downloaded; empty if a person has to.
        algorithm: of the hash: ``md5`` or ``sha1``.
        digest: the hash, in hexadecimal digits; an archive without one is a ZIP file, which has checksums inside.
        bytes: its size, roughly, and the space that its files need: pictures do not become smaller in an archive.
    """

    file: str
    folder: str
    whole: bool = False
    only: tuple[str, ...] = ()
    url: str = ""
    algorithm: str = ""
    digest: str = ""
    bytes: int = 0


SBD_PAGE = "http://home.bharathh.info/pubs/codes/SBD/download.html"
SBD = Archive(
    file="benchmark.tgz",
    folder="benchmark_RELEASE",
    url="https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
    algorithm="md5",
    digest="82b4d87ceb2ed10f6038a1cba92111cb",
    bytes=1_420_000_000,
)
ARCHIVES: Mapping[str, tuple[Archive, ...]] = {
    "pascal_voc": (
        Archive(
            file="VOCtrainval_11-May-2012.tar",
            folder="VOCdevkit/VOC2012",
            whole=True,
            url="https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
            algorithm="md5",
            digest="6cd6e144f989b92b3379bac3b3de84fd",
            bytes=2_000_000_000,
        ),
    ),
    "ade20k": (
        Archive(
            file="ADEChallengeData2016.zip",
            folder="ADEChallengeData2016",
            whole=True,
            url="http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",  # there is no https
            algorithm="sha1",
            digest="219e1696abb36c8ba3a3afe7fb2f4b4606a897c7",
            bytes=970_000_000,
        ),
    ),
    "cityscapes": (
        Archive(file="leftImg8bit_trainvaltest.zip", folder="leftImg8bit", only=("val", "train")),
        Archive(file="gtFine_trainvaltest.zip", folder="gtFine", only=("val", "train")),
    ),
    "camvid": (
        Archive(file="701_StillsRaw_full.zip", folder="701_StillsRaw_full"),
        Archive(file="LabeledApproved_full.zip", folder="LabeledApproved_full"),
    ),
}
BY_HAND = {
    "cityscapes": "Cityscapes needs a login, so you have to download it: register at {url}, download {files}",
    "camvid": "CamVid is not downloaded for you: put the layout of SegNet there, or download {files} from {url}",
}
