"""A model of the zoo as a repository of the Hugging Face Hub: weights, config, and a model card for people."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch

import segbench
from segbench import schemas
from segbench.cards import ModelCard, fetch_weights
from segbench.errors import SegbenchError, UsageError
from segbench.files import sha256_bytes, write_results
from segbench.models.sources import card as card_source
from segbench.models.weights import is_safetensors

WEIGHTS, CONFIG, README = FILES = ("model.safetensors", "config.json", "README.md")


@dataclass(frozen=True)
class Prepared:
    """A folder that is ready to be uploaded.

    Attributes:
        folder: holds `FILES`, and perhaps other files, which are not uploaded.
        sha256: of the weights.
    """

    folder: Path
    sha256: str


def prepare(
    card: ModelCard,
    repo: str,
    folder: Path,
    *,
    found: Sequence[Mapping[str, Any]] = (),
    licence: str | None = None,
    offline: bool = False,
    progress: bool = True,
) -> Prepared:
    """Writes weights, config and model card of a model into ``folder``. Nothing is uploaded.

    Weights that are safetensors already stay as they are, byte for byte, so that their hash and all entries remain
    valid; others are read, checked against the architecture, and written as safetensors in segbench's layout.

    Args:
        card: its weights are fetched if need be.
        repo: ``user/name`` on the Hub.
        folder: made if need be.
        found: entries of the model, whose scores go into the model card.
        licence: instead of the card's.
        offline: never use the network.
        progress: show a bar while downloading.

    Raises:
        UsageError: ``repo`` is no name of a repository.
        ModelError, DownloadError: the weights cannot be had or do not fit.
    """
    if problem := _repo_problem(repo):
        raise UsageError(problem)
    if licence is not None and not (licence.isprintable() and 0 < len(licence) <= 200):
        raise UsageError(f"{licence[:50]!r} is not the name of a licence, like MIT or cc-by-4.0.")
    module, _ = card_source.build(card, offline=offline, progress=progress)  # whatever is published can be loaded
    fetched = fetch_weights(card, offline=True, progress=False)
    weights = fetched.path.read_bytes()
    if not is_safetensors(weights):
        state = module.state_dict()
        weights = safetensors.torch.save({key: value.contiguous() for key, value in state.items()})
    files = {
        folder / WEIGHTS: weights,
        folder / CONFIG: schemas.dump(_config(card)).encode(),
        folder / README: _readme(card, repo, found, licence or card.licence).encode(),
    }
    write_results(files, "Give another folder with --out.")
    return Prepared(folder, sha256_bytes(weights))


def upload(prepared: Prepared, repo: str, *, private: bool = False) -> dict[str, str]:
    """Uploads a prepared folder, in one commit, and returns the ``hub`` source for the card.

    Raises:
        SegbenchError: the Hub refuses, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    # HTTPError of requests, httpx or httpx2, whichever this version of the client is built on.
    transport: type[Exception] = HfHubHTTPError.__bases__[0]
    api = HfApi(library_name="segbench", library_version=segbench.__version__)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=prepared.folder,
            allow_patterns=list(FILES),
            commit_message=f"Weights, config and card, written by segbench {segbench.__version__}",
        )
    except (HfHubHTTPError, LocalTokenNotFoundError) as error:
        raise SegbenchError(
            f"The Hub refused {repo}: {_first_line(error)} Log in with a token that may write (hf auth login, or "
            f"HF_TOKEN). What was to be uploaded is kept in {prepared.folder}."
        ) from error
    except (transport, OSError, ValueError, RuntimeError) as error:
        raise SegbenchError(
            f"The Hub cannot be reached, or does not answer as the Hub does: {_first_line(error)} "
            f"What was to be uploaded is kept in {prepared.folder}; try again."
        ) from error
    return {"type": "hub", "repo": repo, "revision": commit.oid, "file": WEIGHTS}


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def _repo_problem(repo: str) -> str | None:
    """What is wrong with the name of a repository, by the rule that cards have."""
    source = {"type": "hub", "repo": repo, "revision": "0" * 40, "file": WEIGHTS}
    found = schemas.source_problems(source)
    return f"{repo!r} is not user/name: --repo your-name/model-name" if found else None


def _config(card: ModelCard) -> dict[str, Any]:
    fields = ("id", "title", "architecture", "num_classes", "parameters", "dataset", "preprocessing", "training")
    document = card.document()
    return {"library": "segbench", "version": segbench.__version__, **{key: document[key] for key in fields}}


def _readme(card: ModelCard, repo: str, found: Sequence[Mapping[str, Any]], licence: str | None) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="image-segmentation",
            dataset_type=card.dataset,
            dataset_name=card.dataset,
            metric_type=kind,
            metric_name=name,
            metric_value=round(100 * value, 2),
        )
        for name, kind, value in _scores(card, found)
    ]
    known = (licence or "").lower() in LICENCES
    data = ModelCardData(
        model_name=card.id,
        library_name="segbench",
        pipeline_tag="image-segmentation",
        license=(licence or "").lower() if known else "other",
        license_name=None if known else licence or "unknown",
        datasets=[card.dataset],
        tags=["adversarial-robustness", "semantic-segmentation", card.architecture["name"]],
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_body(card, repo, found, licence)}"


# Licences that the Hub knows by these names (its documentation, "Licenses"); others are "other" with their name.
LICENCES = (
    "apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
    "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "openrail",
)  # fmt: skip


def _scores(card: ModelCard, found: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, str, float]]:
    """Name, kind and value of each score: of the entries where there are some, else the card's clean ones."""
    for metric, kind in (("aacc", "accuracy"), ("miou", "mean_iou")):
        label = {"aacc": "aAcc", "miou": "mIoU"}[metric]
        clean = found[0]["clean"][metric] if found else (card.expected or {}).get(metric)
        if clean is not None:
            yield f"clean {label}", kind, clean
        for entry in found:
            for row in entry["results"]:
                yield f"{label} under {entry['protocol']['name']}, ε = {row['strength']:g}/255", kind, row[metric]


def _table(card: ModelCard, found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Clean and worst-case scores in percent, a row for each ε."""
    yield from ("| | aAcc | mIoU |", "| :-- | --: | --: |")
    rows = [("clean", found[0]["clean"] if found else card.expected or {"aacc": None, "miou": None})]
    for entry in found:
        name = entry["protocol"]["name"]
        rows += [(f"worst case under {name}, ε = {row['strength']:g}/255", row) for row in entry["results"]]
    for label, row in rows:
        cells = ("–" if row[metric] is None else f"{100 * row[metric]:.1f}" for metric in ("aacc", "miou"))
        yield f"| {label} | {' | '.join(cells)} |"


def _body(card: ModelCard, repo: str, found: Sequence[Mapping[str, Any]], licence: str | None) -> str:
    training = {
        key: value for key, value in card.training.items() if key not in ("recipe", "log") and value is not None
    }
    lines = [
        f"# {card.title}",
        "",
        f"`{card.id}`: semantic segmentation, {card.num_classes} classes of `{card.dataset}`. "
        "Images (N,3,H,W) in [0,1], logits (N,K,H,W) at the size of the images; no normalisation outside.",
        "",
        "```python",
        "import segbench  # pip install segbench",
        "",
        f'model = segbench.load_model("{card.id}")',
        "```",
        "",
        *_table(card, found),
        "",
        f"Preprocessing: {card.preprocessing}.",
        "",
        f"Architecture: `{card.architecture['name']}` {json.dumps(card.architecture['arguments'])}.",
        "",
        f"Training: {', '.join(f'{key} {value}' for key, value in training.items())}.",
        "",
        f"Licence: {licence or 'unknown'}. Repository: {repo}.",
    ]
    if card.paper:
        paper = card.paper
        lines += ["", f"Paper: [{paper['title']}]({paper['url']}), {', '.join(paper['authors'])}, {paper['year']}."]
        lines += ["", "```bibtex", paper["bibtex"].rstrip(), "```"] if paper["bibtex"] else []
    return "\n".join(lines) + "\n"
