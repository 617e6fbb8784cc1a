"""Data sets: images in [0,1], labels, stable ids and a fingerprint."""

from __future__ import annotations

from segbench.data.catalogue import FAMILIES, load_dataset, load_whole
from segbench.data.dataset import Sample, SegmentationDataset
from segbench.data.protocols import DataProtocol, Window

__all__ = ["FAMILIES", "DataProtocol", "Sample", "SegmentationDataset", "Window", "load_dataset", "load_whole"]
