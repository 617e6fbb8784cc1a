"""From a comparison of attacks to an external evaluation beside an entry: the best known score. Torch-free."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

from segbench import entries, evidence, schemas
from segbench.engine.rundir.store import FIX, Store
from segbench.entries import additions
from segbench.errors import ContentError, RunError
from segbench.evidence import CLEAN, Evidence
from segbench.files import write_results
from segbench.protocol import COMPARISON, TOLERANCES

EVIDENCE = "comparison.parquet"  # of a finished comparison, in its run directory


def add_external(run: Path, entry_path: Path, *, author: str, url: str, name: str = "sea_plus") -> Path:
    """Writes what a comparison found beyond the protocol's own attacks beside an entry of the same model.

    Args:
        run: directory of a finished comparison.
        entry_path: the entry; its evidence lies beside it.
        author: who made the comparison.
        url: https link to where the attacks are described.
        name: of both files, in ``<model id>.external``.

    Raises:
        RunError: not a finished comparison.
        ContentError: it is of another model or other images, has no other attacks, or the name is taken.
    """
    store = Store.open(run)
    if store.manifest["protocol"]["name"] != COMPARISON or not (run / EVIDENCE).exists():
        raise RunError(
            f"{run} is not a finished comparison. Make one: segbench attack compare --model MODEL --out {run}"
        )
    entry = entries.read_entry(entry_path)
    stored = entries.evidence_of(entry_path, entry)
    if store.manifest["identity"]["weights"] != entry["model"]["weights_sha256"]:
        raise ContentError(
            f"{run} compares attacks on {store.manifest['model']['id']}, with other weights than the entry's "
            f"{entry['model']['id']}. Nothing was written."
        )
    found = evidence.from_bytes((run / EVIDENCE).read_bytes(), source=str(run / EVIDENCE))
    _same_images(run, stored, found, entry["protocol"]["name"])
    radii = {row["strength"] for row in entry["results"]}
    protocol, own = store.manifest["protocol"], stored.metadata["protocol"]
    again = (protocol["iterations"], protocol["seed"]) != (own["iterations"], own["seed"])
    groups = {}
    for (eps, attack), group in found.groups.items():
        theirs = (eps, attack) in stored.groups
        if eps in radii and (again or not theirs):
            groups[eps, f"{attack}_{protocol['iterations']}_seed{protocol['seed']}" if theirs else attack] = group
    if not groups:
        raise ContentError(
            f"{run} has no attack beyond the entry's own at its radii. Add some with the command that made it, --out "
            f"{run} and --attacks mce_bal mce js tsallis square."
        )
    attacks = ", ".join(sorted({key[1] for key in groups}))
    said = f"segbench attack compare, {protocol['iterations']} iterations, seed {protocol['seed']}: {attacks}"
    document, data = additions.build_external(
        entry, stored, groups, name=name, description=said[:500], author=author, url=url,
        date=datetime.now(timezone.utc).date().isoformat(),
    )  # fmt: skip
    path = additions.folder_of(entry_path, additions.EXTERNAL) / f"{name}.json"
    if path.exists():
        raise ContentError(
            f"{path} is there already, of {additions.read_addition(path)['author']}. Give another --name."
        )
    write_results({path.with_suffix(".parquet"): data, path: schemas.dump(document).encode()}, FIX)
    return path


def _same_images(run: Path, stored: Evidence, found: Evidence, protocol: str) -> None:
    """The same ids and labels are not enough: the clean predictions must be the entry's, up to another processor."""
    clean = Evidence({CLEAN: found.groups[CLEAN]}, found.metadata)
    if not all(row["agrees"] for row in additions.compare(stored, clean, TOLERANCES[protocol])):
        raise ContentError(
            f"{run} attacks other images than the entry's: the model sees the clean ones otherwise. Nothing was "
            "written."
        )
