"""Documents and evidence from files of strangers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from segbench import evidence, schemas
from segbench.errors import ContentError
from segbench.evidence import Evidence
from segbench.files import sha256_bytes

MAX_EVIDENCE_BYTES = 5_000_000  # of a published file: 2000 images of ADE20K at three radii fit


def read_document(schema: str, path: Path) -> dict[str, Any]:
    """A JSON document that fits its schema.

    Raises:
        ContentError: missing, not a plain file, not JSON, or against the schema.
    """
    try:
        if path.is_symlink():
            raise OSError("it is a link; put the file itself there")
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ContentError(f"Cannot read the {schema} {path}: {error}") from error
    document = schemas.parse(text, source=str(path))
    stated = document.get("schema_version") if isinstance(document, dict) else None
    if isinstance(stated, int) and stated != (current := schemas.version(schema)):
        # What lies beside an entry, in a folder of its own, names the evidence of the entry.
        folder = path.parent if schema == "entry" else path.parent.parent
        raise ContentError(schemas.other_version(str(path), stated, current, str(folder)))
    if wrong := schemas.problems(schema, document):
        raise ContentError(f"The {schema} {path} is not valid:\n  " + "\n  ".join(wrong[:10]))
    found: dict[str, Any] = document
    return found


def read_evidence(path: Path, sha256: str, *, most: int | None = None) -> Evidence:
    """The evidence of a document, its hash checked; ``most`` is the largest size in bytes.

    Raises:
        ContentError: missing, too large, changed, or not evidence.
    """
    try:
        if path.is_symlink():
            raise OSError("it is a link; put the file itself there")
        if most is not None and (size := path.stat().st_size) > most:
            raise ContentError(f"{path.name} has {size} bytes; evidence of at most {most} is accepted.")
        data = path.read_bytes()
    except OSError as error:
        raise ContentError(f"its evidence cannot be read: {error}. Put the file beside the entry.") from error
    if sha256_bytes(data) != sha256:
        raise ContentError(
            f"evidence.sha256 is not the hash of {path.name}: the evidence was changed or swapped. Restore it."
        )
    return evidence.from_bytes(data, source=path.name)
