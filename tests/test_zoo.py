"""The zoo as shipped: its cards can be built and say what was published; the commands that show it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import segbench
from segbench import cards, entries, leaderboard, schemas
from segbench.models.architectures import ARCHITECTURES
from tests import samples

ROOT = Path(__file__).parents[1]
RELEASED = {
    "pirat_convnext_t_voc", "pirat_convnext_s_voc", "pirat_convnext_t_ade20k", "pirat_convnext_s_ade20k",
    "pirat_vit_s_ade20k",
}  # fmt: skip
CLASSES = {"pascal_voc": 21, "ade20k": 151, "shapes": 8}
CARDS = cards.list_models()


@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.id)
def test_a_card_builds_what_it_says(card):
    assert card.num_classes == CLASSES[card.dataset]
    assert card.preprocessing
    if not card.sources and card.architecture["name"] not in ARCHITECTURES:
        return  # the code of a model without published weights need not be ours
    with torch.device("meta"):
        module = ARCHITECTURES[card.architecture["name"]].build(
            num_classes=card.num_classes, **card.architecture["arguments"]
        )
    found = sum(parameter.numel() for parameter in module.parameters())
    assert card.parameters in (None, found)
    assert card.parameters == found or card.id in (
        "ddcat_resnet50_voc",
        "at_resnet50_voc",
        "clean_convnext_t_voc",
    )  # their stem is not published


def test_every_published_row_has_a_card_and_the_released_ones_a_source():
    published = [card for card in CARDS if card.dataset in ("pascal_voc", "ade20k")]
    assert len(published) == 21
    assert {card.id for card in published if card.sources} == RELEASED
    for card in published:
        assert card.paper["url"].startswith("https://arxiv.org/abs/")
        assert card.sha256 is None  # nobody has hashed what the links give: no hash is invented
        assert [source["type"] for source in card.sources] in ([], ["url"])
    assert segbench.get_card("pirat_convnext_t_voc").expected == {"aacc": 0.927, "miou": 0.752}


def test_the_cards_say_what_was_published():
    """tests/golden/published.json: the rows of Tables 2, 3 and 6 of arXiv 2306.12941v2 that a card repeats."""
    rows = json.loads((ROOT / "tests" / "golden" / "published.json").read_text())
    only_table_1 = {"clean_convnext_t_voc"}
    assert {row["id"] for row in rows} | only_table_1 == {card.id for card in CARDS if card.dataset != "shapes"}
    for row in rows:
        card = segbench.get_card(row["id"])
        training = card.training
        assert (card.dataset, training["method"], training["initialisation"], training["attack_steps"]) == (
            row["dataset"], row["method"], row["initialisation"], row["attack_steps"],
        ), card.id  # fmt: skip
        assert training["epochs"] == row["epochs"], card.id
        assert [source["url"] for source in card.sources] == ([row["checkpoint"]] if row["checkpoint"] else []), card.id
        assert card.expected["miou"] == pytest.approx(row["miou"] / 100, abs=1e-9), card.id
        assert card.expected["aacc"] == (row["aacc"] and pytest.approx(row["aacc"] / 100, abs=1e-9)), card.id
        assert card.title.startswith(row["architecture"]), card.id
        assert row["backbone"].partition("+")[0] in card.title, card.id
        assert row["backbone"] == card.backbone, card.id


def test_filters():
    def ids(*args, **filters):
        return [card.id for card in segbench.list_models(*args, **filters)]

    assert set(ids(available=True)) == RELEASED | {
        "at_convnext_mini_shapes", "clean_convnext_mini_shapes", "pirat_convnext_mini_shapes", "pirat_vit_mini_shapes"
    }  # fmt: skip
    assert set(ids("pirat_*", dataset="pascal_voc", available=True)) == {"pirat_convnext_t_voc", "pirat_convnext_s_voc"}
    assert set(ids(architecture="vit-s")) == {"at_vit_s_ade20k", "pirat_vit_s_ade20k", "pirat_32ep_vit_s_ade20k"}
    assert ids(method="ddc-at") == ["ddcat_resnet50_voc"]
    assert ids(dataset="nothing") == []


def test_models_prints_columns_and_json(cli):
    code, out, _ = cli("models", "*_voc", "--method", "DDC-AT", "--columns", "id", "miou", "weights", "year,paper")
    assert code == 0
    header, row = [line for line in out.splitlines() if line.strip(" ─")]
    assert header.split() == ["id", "clean", "mIoU", "weights", "year", "paper"]
    assert row.split() == ["ddcat_resnet50_voc", "75.9", "not", "published", "2021", "https://arxiv.org/abs/2003.06555"]
    assert {card["id"] for card in json.loads(cli("models", "--available", "--json")[1])} >= RELEASED
    assert "Did you mean 'miou'" in cli("models", "--columns", "miu")[2]
    code, out, err = cli("models", "nothing*")
    assert (code, out, "No model fits" in err) == (0, "", True)
    assert "3 ids hold it: segbench models '*vit_s*'" in cli("models", "vit_s")[2]
    assert json.loads(cli("models", "nothing*", "--json")[1]) == []


def test_models_says_what_is_on_this_machine(cli):
    _, out, _ = cli("models", "--columns", "id", "cached")
    lines = {line.split()[0]: line.split()[-1] for line in out.splitlines() if "_" in line}
    assert lines["at_convnext_mini_shapes"] == "yes"
    assert lines["pirat_convnext_t_voc"] == "no"
    assert lines["at_convnext_t_voc"] == "–"


def test_show_tells_where_weights_come_from(cli):
    code, out, _ = cli("show", "pirat_convnext_t_voc")
    assert code == 0
    for text in ("https://nc.mlcloud.uni-tuebingen.de/index.php/s/zSFgoAngcm47FZm", "not pinned", "Naman D. Singh",
                 "segbench show pirat_convnext_t_voc --download", "aAcc 92.7, mIoU 75.2", "5 steps"):  # fmt: skip
        assert text in " ".join(out.split()), text
    code, out, _ = cli("show", "at_convnext_t_voc")
    assert "not published" in out
    code, out, _ = cli("show", "at_convnext_mini_shapes", "--json")
    found = json.loads(out)
    assert found["cached"].endswith("at_convnext_mini_shapes.safetensors")
    assert [entry["protocol"]["name"] for entry in found["entries"]] == ["sea-v1", "sea-v2"]


def test_show_takes_the_path_of_a_card(cli, tmp_path):
    document = segbench.get_card("pirat_convnext_t_voc").document()
    (tmp_path / "mine.json").write_text("\ufeff" + json.dumps(document))  # an editor's mark at the start
    code, out, _ = cli("show", "mine.json")
    assert code == 0
    assert "zSFgoAngcm47FZm" in out
    code, _, err = cli("show", "mine.json", "--download", "--offline")
    assert code == 1
    assert "While online: segbench show mine.json --download" in err


@pytest.mark.slow
def test_what_the_system_refuses_is_no_traceback(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "segbench", "models"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr


def test_show_download_offline_says_what_is_missing_and_how_to_get_it(cli):
    code, out, err = cli("show", "pirat_convnext_t_voc", "--download", "--offline")
    assert (code, out) == (1, "")
    assert "pirat_convnext_t_voc" in err
    assert "segbench show pirat_convnext_t_voc --download" in " ".join(err.split())
    code, _, err = cli("evaluate", "--model", "pirat_convnext_t_voc", "--dataset", "shapes", "--offline", "--quiet")
    assert code == 1
    assert "zSFgoAngcm47FZm" in err
    code, _, err = cli("show", "at_convnext_t_voc", "--download")
    assert code == 1
    assert "not published" in err


@pytest.mark.slow
def test_models_loads_neither_torch_nor_clients():
    code = (
        "import sys\n"
        "from segbench.cli import main\n"
        "try: main(['models', '--columns', 'id', 'cached', 'paper'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'timm', 'transformers', 'requests', 'huggingface_hub'} & set(sys.modules), 'heavy'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


BAD_CARDS = {
    "unknown key": ({"colour": "red"}, r"'colour' was unexpected"),
    "bad hash": ({"sha256": "abc"}, r"sha256: 'abc' is not a SHA-256: 64 lower case"),
    "path going up": ({"sources": [{"type": "package", "file": "../x.safetensors"}]}, r"sources\.0\.file: '\.\./x"),
    "hub path going up": (
        {"sources": [{"type": "hub", "repo": "a/b", "revision": "0" * 40, "file": "a/../../x.pt"}]},
        r"sources\.0\.file: 'a/\.\./\.\./x\.pt' is not a path inside the repository",
    ),
    "absolute path": (
        {"sources": [{"type": "hub", "repo": "a/b", "revision": "0" * 40, "file": "/x.pt"}]}, r"sources\.0\.file"
    ),
    "branch": (
        {"sources": [{"type": "hub", "repo": "a/b", "revision": "main", "file": "x.pt"}]},
        r"sources\.0\.revision: 'main' is not a commit",
    ),
    "repository": (
        {"sources": [{"type": "hub", "repo": "../b", "revision": "0" * 40, "file": "x.pt"}]}, r"sources\.0\.repo"
    ),
    "key of another type": (
        {"sources": [{"type": "url", "url": "https://example.org/x.pt", "repo": "a/b"}]}, r"sources\.0: .*'repo' was"
    ),
    "plain http": ({"sources": [{"type": "url", "url": "http://example.org/x.pt"}]}, r"sources\.0\.url: .*https://"),
    "password": ({"sources": [{"type": "url", "url": "https://a:b@example.org/x"}]}, r"sources\.0\.url"),
    "file link": ({"sources": [{"type": "url", "url": "file:///etc/passwd"}]}, r"sources\.0\.url"),
    "line break": ({"sources": [{"type": "url", "url": "https://example.org/\n"}]}, r"sources\.0\.url"),
    "whole numbers with a point": ({"num_classes": 8.0}, r"num_classes: 8\.0 is not of type 'integer'"),
    "type": ({"sources": [{"type": "ftp"}]}, r"sources\.0\.type: 'ftp' is not one of"),
    "half a source": ({"sources": [{"type": "hub"}]}, r"sources\.0: 'repo' is a required property"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_CARDS)
def test_bad_cards_are_refused_with_the_field_named(cli, tmp_path, name):
    changes, said = BAD_CARDS[name]
    path = tmp_path / "m.json"
    path.write_text(schemas.dump(samples.card("m", **changes)))
    with pytest.raises(segbench.cards.ContentError, match=said):
        cards.read_card(path)
    code, _, err = cli("validate", str(path))
    assert code == 1
    assert re.search(said, " ".join(err.split()))
    with pytest.raises(segbench.cards.ContentError, match=said):
        segbench.load_model(str(path))


def test_good_sources_are_valid(cli, tmp_path):
    sources = [
        {
            "type": "hub",
            "repo": "user/name.v2",
            "revision": "0123456789abcdef" * 2 + "01234567",
            "file": "a/b.safetensors",
        },
        {"type": "url", "url": "https://example.org:8443/a/b.pt?x=1&y=%20#z"},
    ]
    path = tmp_path / "m.json"
    path.write_text(schemas.dump(samples.card("m", sources=sources, sha256=None)))
    assert cards.read_card(path).sources == sources
    assert cli("validate", str(path))[0] == 0


@pytest.mark.parametrize(
    ("source", "sha256", "said"),
    [
        ({"type": "url", "url": "http://127.0.0.1/x.pt"}, None, "leads to this machine only"),
        ({"type": "package", "file": "x.safetensors"}, None, "x.safetensors are missing"),
        ({"type": "package", "file": "here.safetensors"}, None, "`sha256` is null; that of here.safetensors is "),
        ({"type": "package", "file": "here.safetensors"}, "0" * 64, "does not have the SHA-256 of the card"),
        ({"type": "package", "file": "here.pt"}, None, "is not safetensors"),
    ],
)
def test_validate_looks_at_what_the_schema_cannot(cli, tmp_path, source, sha256, said):
    for name in ("here.safetensors", "here.pt"):
        (tmp_path / name).write_bytes(b"weights")
    (tmp_path / "m.json").write_text(schemas.dump(samples.card("m", sources=[source], sha256=sha256)))
    code, _, err = cli("validate", "m.json")
    assert code == 1
    assert said in " ".join(err.split())


def test_show_has_the_numbers_of_the_entry_in_their_columns(cli):
    card = segbench.get_card("at_convnext_mini_shapes")
    entry, _ = entries.entries_of(card)
    out = cli("show", card.id)[1].partition("sea-v2 on")[0]

    def percent(value):
        return f"{100 * value:.1f}"

    def row(label):
        (line,) = [line for line in out.splitlines() if re.match(rf"[ |│]*{re.escape(label)} ", line)]
        return re.findall(r"\d+\.\d", line.partition(label)[2])

    assert row("0") == [percent(entry["clean"][name]) for name in ("aacc", "miou")]
    for result in entry["results"]:
        scores = [each[name] for each in result["per_loss"].values() for name in ("aacc", "miou")]
        assert row(f"{result['strength']:g}/255") == [
            percent(value)
            for value in (
                result["aacc"], *result["interval"]["aacc"], result["miou"], *result["interval"]["miou"], *scores,
            )
        ]  # fmt: skip


def test_the_table_of_models_in_the_readme_is_made_from_the_cards():
    text = (ROOT / "README.md").read_text("utf-8")
    start, end = leaderboard.MODELS_START, leaderboard.MODELS_END
    assert text.split(start)[1].split(end)[0].strip() == leaderboard.models_table(CARDS)
    for card in CARDS:
        assert (f"`{card.id}`" in text) >= bool(card.sources)
    assert "16 more models have a card" in text
