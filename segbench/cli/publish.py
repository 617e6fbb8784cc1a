"""``publish``."""

from __future__ import annotations

from pathlib import Path

import click

from segbench.cli.app import note, print_json
from segbench.errors import UsageError


@click.command()
@click.argument("model")
@click.option("--repo", required=True, help="user/name on the Hugging Face Hub; made if it does not exist.")
@click.option("--out", type=click.Path(path_type=Path), help="Where the files are written.  [default: publish/<id>]")
@click.option("--licence", help="Licence of the weights, instead of the card's: MIT, apache-2.0, cc-by-4.0, ...")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--dry-run", is_flag=True, help="Write the files and upload nothing.")
@click.option("--offline", is_flag=True, help="With --dry-run: never use the network.")
def publish(
    model: str, repo: str, out: Path | None, licence: str | None, private: bool, dry_run: bool, offline: bool
) -> None:
    """Put MODEL (an id, or the path of a card) on the Hugging Face Hub, and print the source for its card.

    Writes model.safetensors, config.json and README.md (the Hub's model card, with licence, data set and results), then
    uploads them in one commit. Needs a token that may write: hf auth login, or HF_TOKEN.
    """
    from segbench import cards, entries, publishing

    if offline and not dry_run:
        raise UsageError("--offline uploads nothing: add --dry-run, or leave it out.")
    card = cards.read_card(Path(model)) if model.endswith(".json") else cards.get_card(model)
    if not (licence or card.licence) and not dry_run:
        raise UsageError(
            f"The card of {card.id} names no licence, so nobody may know whether its weights can be passed on. "
            "Ask their authors, then give --licence."
        )
    found = [  # no variants, and no numbers of a paper
        entry
        for entry in entries.entries_of(card)
        if entry["dataset"]["id"] == card.dataset and entry["evidence"] is not None
    ]
    prepared = publishing.prepare(
        card, repo, out or Path("publish") / card.id, found=found, licence=licence, offline=offline
    )
    note(f"{prepared.folder}: {', '.join(publishing.FILES)}")
    if dry_run:
        note(f"Nothing was uploaded (--dry-run). SHA-256 of the weights: {prepared.sha256}")
        return
    source = publishing.upload(prepared, repo, private=private)
    note("Put this into the card, in place of its `sources` and `sha256`:")
    print_json({"sources": [source], "sha256": prepared.sha256})
