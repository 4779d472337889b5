"""A custom backbone, loss, data source and schedule, trained and evaluated by the real programs."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import tiny

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"


def run(folder, *arguments):
    program = [sys.executable, "-m", "dml_jax", *arguments]
    done = subprocess.run(program, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_custom_parts_train_resume_and_are_evaluated(tmp_path):
    for name in ("my_parts.py", "my_config.py"):
        shutil.copy(EXAMPLES / name, tmp_path)
    images = tiny.write_images(tmp_path / "images")
    with (images / "images.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["split", "path", "class"])
        for path in sorted(images.glob("*/*/*.png")):
            name = path.relative_to(images)
            rows.writerow([name.parts[0], name, name.parts[1]])

    train = ("train", "--config=my_config.py", "--workdir=run", "--config.data.root=images")
    run(tmp_path, *train, "--config.epochs=1")
    run(tmp_path, *train)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    given = {"scale": 23.0, "threshold": 0.1, "label_smoothing": 0.0}
    assert config["loss"] == {"name": "my_parts:ShiftedSoftmax", **given}
    assert config["model"]["backbone"] == "my_parts:PatchTransformer"
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["learning_rate"] for line in lines]
    assert len(rates) == 2 and rates[0] < rates[1] == 1e-3
    scores = json.loads(run(tmp_path, "evaluate", "--workdir=run"))
    assert scores["map@r"] == result["last"]["map@r"]
