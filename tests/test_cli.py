"""The command line as a user meets it: what bad input gets, exit codes, and that nothing they had is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import segbench
from segbench.cli.app import COMMANDS, app

MODEL = "clean_convnext_mini_shapes"
SHORT = ["--limit", "2", "--iterations", "1", "--eps", "8", "--quiet"]


def test_evaluate_prints_a_table_and_writes_entry_and_evidence(cli, tmp_path):
    code, out, err = cli("evaluate", "--model", MODEL, *SHORT)
    assert code == 0
    assert out.startswith("Trial, not a result: 1 iterations instead of 300; 2 of 32 images")
    assert "note: falls_to_zero: The checks for masked gradients were not run" in out
    assert "bound" not in out
    assert "8/255" in out
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name.startswith(f"{MODEL}-shapes-")
    assert f"{run.name}/{MODEL}.json" in err
    assert cli("validate", str(run / f"{MODEL}.json"))[0] == 0
    assert cli("status", str(run))[0] == 0
    assert json.loads(cli("status", str(run), "--json")[1])["done"] == 4
    entry = (run / f"{MODEL}.json").read_text()
    assert str(tmp_path) not in entry  # what is published names no folder of the user's machine


def test_json_has_the_promised_shape(cli):
    code, out, _ = cli("evaluate", "--model", MODEL, *SHORT, "--json", "--out", "run")
    found = json.loads(out)
    assert code == 0
    assert {"aacc", "miou"} <= found["clean"].keys()
    (row,) = found["results"]
    assert {"strength", "eps_255", "aacc", "miou", "miou_lower_bound", "per_loss"} <= row.keys()
    assert row["strength"] == row["eps_255"] == 8
    assert set(row["per_loss"]) == {"mce_bal", "mce", "js"}
    code, out, _ = cli("merge", "run", "--json")
    assert code == 0
    assert json.loads(out)["results"] == found["results"]


def test_several_radii_after_one_option(cli):
    options = ["--limit", "1", "--iterations", "1", "--quiet", "--json"]
    for eps in (["--eps", "4", "8/255", "0.25"], ["--eps", "4", "--eps", "8/255", "0.25"]):
        code, out, _ = cli("evaluate", *eps, "--model", MODEL, *options, "--out", "run")
        assert code == 0
        assert [row["eps_255"] for row in json.loads(out)["results"]] == [0.25, 4, 8]


@pytest.mark.parametrize(
    ("args", "code", "texts"),
    [
        (["--model", "clean_convnext_mini_shape"], 2, ["Did you mean 'clean_convnext_mini_shapes'", "segbench models"]),
        (["--model", MODEL, "--dataset", "shape"], 2, ["Unknown data set 'shape'. Did you mean 'shapes'"]),
        (["--model", MODEL, "--dataset", "camvid"], 1, ["--data-root", "valannot/"]),
        (["--model", MODEL, "--dataset", "camvid", "--data-root", "nowhere"], 1, ["nowhere", "Expected layout"]),
        (["--model", MODEL, "--eps", "0"], 2, ["above 0 and at most 255", "'0'"]),
        (["--model", MODEL, "--eps", "-4"], 2, ["above 0 and at most 255", "'-4'"]),
        (["--model", MODEL, "--eps", "4", "256"], 2, ["'256'"]),
        (["--model", MODEL, "--eps", "four"], 2, ["'four'"]),
        (["--model", MODEL, "--limit", "0"], 2, ["limit must be at least 1"]),
        (["--model", MODEL, "--iterations", "0"], 2, ["iterations must be at least 1"]),
        (["--model", MODEL, "--batch-size", "0"], 2, ["batch_size must be 'auto'"]),
        (["--model", MODEL, "--device", "gpu"], 2, ["device 'gpu' cannot be used"]),
        (["--model", MODEL, "--protocol", "sea-v3"], 2, ["Did you mean 'sea-v"]),
        (["--model", MODEL, "--shard", "3"], 2, ["A shard is written"]),
        (["--model", "absent.module:function", "--dataset", "shapes"], 1, ["Cannot import", "package.module:function"]),
        (["--model", "nothing.json"], 1, ["Cannot read the card"]),
        (["--model", "absent.module:function"], 2, ["A model of your own needs a data set"]),
        (["--model", "pirat_convnext_t_voc"], 1, ["--data-root", "JPEGImages"]),
        ([], 2, ["Which model? --model", "segbench models"]),
        (["--model", MODEL, "--epss", "4"], 2, ["No such option"]),
    ],
)
def test_bad_input_is_told_with_its_mend(cli, tmp_path, args, code, texts):
    found, out, err = cli("evaluate", *args)
    assert (found, out) == (code, "")
    assert all(text in err for text in texts), err
    assert list(tmp_path.iterdir()) == []


def test_wrong_classes_and_labels_are_said_before_the_first_attack(cli, tmp_path):
    for folder in ("val", "valannot"):
        (tmp_path / folder).mkdir()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "val" / "a.png")
    Image.fromarray(np.full((64, 64), 3, np.uint8)).save(tmp_path / "valannot" / "a.png")
    code, _, err = cli("evaluate", "--model", MODEL, "--dataset", "camvid", "--data-root", ".", *SHORT)
    assert code == 1
    assert "The model has 8 classes, the data set 11" in err
    Image.fromarray(np.full((64, 64), 77, np.uint8)).save(tmp_path / "valannot" / "a.png")
    code, _, err = cli("evaluate", "--model", MODEL, "--dataset", "camvid", "--data-root", ".", *SHORT)
    assert code == 1
    assert "valannot/a.png: the mask has the label 77" in err
    assert not (tmp_path / "runs").exists()


def test_a_models_file_is_published_without_its_folder(cli, tmp_path):
    code = "import torch\n\ndef net(width):\n    return torch.nn.Conv2d(3, 8, width)\n"
    (tmp_path / "net.py").write_text(code)
    spec = f"{tmp_path}/net.py:net?width=1"
    assert cli("evaluate", "--model", spec, "--dataset", "shapes", "--out", "run", *SHORT)[0] == 0
    published = "".join(path.read_text() for path in (tmp_path / "run").glob("*.json"))
    assert "segbench evaluate --model './net.py:net?width=1' --dataset shapes" in published
    assert str(tmp_path) not in published


def test_own_model_of_the_current_folder(cli, tmp_path):
    (tmp_path / "my_models.py").write_text(
        "import torch\n\ndef tiny():\n    return torch.nn.Conv2d(3, 8, 3, padding=1)\n"
    )
    code, out, _ = cli("evaluate", "--model", "my_models:tiny", "--dataset", "shapes", *SHORT)
    assert code == 0
    assert "tiny on shapes" in out


def test_models_and_show(cli):
    code, out, _ = cli("models", "*shapes", "--json")
    assert code == 0
    assert {"at_convnext_mini_shapes", MODEL} <= {card["id"] for card in json.loads(out)}
    code, out, _ = cli("show", MODEL)
    assert code == 0
    assert f'segbench.load_model("{MODEL}")' in out
    code, _, err = cli("show", "at_convnext_mini_shape")
    assert code == 2
    assert "Did you mean 'at_convnext_mini_shapes'" in err


@pytest.mark.slow
def test_commands_without_torch_stay_without_it():
    """`models`, `show`, `validate`, `leaderboard`, `status` and `merge` start fast because they do not import torch."""
    code = (
        "import sys, segbench.cli, segbench.cli.zoo, segbench.cli.content, segbench.cli.runs, segbench.leaderboard\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "assert 'pandas' not in sys.modules, 'pandas was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_environment_variables_set_options(cli, monkeypatch):
    monkeypatch.setenv("SEGBENCH_EVALUATE_MODEL", "nonsense")
    code, _, err = cli("evaluate")
    assert code == 2
    assert "nonsense" in err
    monkeypatch.setenv("SEGBENCH_MODELS_JSON", "1")
    assert json.loads(cli("models")[1])


def test_help_of_every_command(cli):
    for name in COMMANDS:
        code, out, _ = cli(name, "--help")
        assert code == 0
        assert "Usage: segbench" in out
    assert cli("--version")[1].strip().endswith(segbench.__version__)
    assert set(app.list_commands(None)) == set(COMMANDS)


def test_env_tells_versions(cli):
    code, out, _ = cli("env", "--json")
    assert code == 0
    assert {"python", "torch", "segbench", "model zoo"} <= json.loads(out).keys()


def test_unreadable_run_directories(cli, tmp_path):
    for command in ("status", "merge"):
        code, _, err = cli(command, "nowhere")
        assert code == 1
        assert "not a usable run directory" in err


@pytest.mark.slow
def test_progress_bar_shows_what_it_does(tmp_path):
    args = [
        "evaluate",
        "--model",
        MODEL,
        "--limit",
        "2",
        "--iterations",
        "2",
        "--eps",
        "8",
        "--out",
        str(tmp_path / "run"),
    ]
    environment = {**os.environ, "FORCE_COLOR": "1", "TTY_COMPATIBLE": "1", "COLUMNS": "140"}
    done = subprocess.run(
        [sys.executable, "-m", "segbench", *args], capture_output=True, text=True, check=True, env=environment
    )
    for text in ("ε 8/255", "images", "aAcc", "left", "100%"):
        assert text in done.stderr, text
