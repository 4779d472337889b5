"""The example scripts that start runs on clusters, with stand-ins for the clusters' programs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import tiny

LAUNCH = Path(__file__).parents[1] / "examples" / "launch"

# Starts two tasks as srun does, and ends with the largest of their exit codes.
SRUN = """#!{python}
import os, subprocess, sys
arguments = [x for x in sys.argv[1:] if not x.startswith("--kill-on-bad-exit")]
tasks = [
    subprocess.Popen(arguments, env=os.environ | {{"SLURM_PROCID": str(i), "SLURM_LOCALID": "0"}})
    for i in range(2)
]
sys.exit(max(task.wait() for task in tasks))
"""
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NODELIST": "localhost",
    "SLURM_JOB_NUM_NODES": "2",
}


def make_program(path, text):
    path.write_text(text)
    path.chmod(0o755)


def run_slurm(folder, *arguments, script="slurm.sh", **environment):
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.run(
        [LAUNCH / script, *arguments],
        env=os.environ | SLURM | {"PATH": path} | environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(("code", "queues"), [(0, False), (2, False), (75, True)])
def test_a_stopped_run_is_queued_again(tmp_path, code, queues):
    make_program(tmp_path / "srun", f"#!/bin/sh\necho srun $@\nexit {code}\n")
    make_program(tmp_path / "scontrol", "#!/bin/sh\necho scontrol $@\n")
    done = run_slurm(tmp_path, "--config=birds:ps", "--workdir=my runs")
    assert done.returncode == code
    lines = done.stdout.splitlines()
    expected = "dml-jax train --distributed --config=birds:ps --workdir=my runs"
    assert lines[0] == f"srun --kill-on-bad-exit=0 {expected}"
    assert lines[1:] == ["scontrol requeue 4711"] * queues


@pytest.mark.slow
def test_two_tasks_train_one_run(tmp_path):
    images = tiny.write_images(tmp_path / "images")
    make_program(tmp_path / "srun", SRUN.format(python=sys.executable))
    workdir = tmp_path / "run"
    done = run_slurm(
        tmp_path, *tiny.arguments(images, "ps", epochs=1, batch_size=16), f"--workdir={workdir}"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((workdir / "result.json").read_text())["last"]["epoch"] == 1


# The last job of an array has the identity of the whole array.
ARRAY = {"SLURM_ARRAY_JOB_ID": "4711", "SLURM_ARRAY_TASK_ID": "1"}


@pytest.mark.parametrize(("code", "queues"), [(0, False), (2, False), (75, True)])
def test_a_stopped_cell_of_a_table_is_queued_again_alone(tmp_path, code, queues):
    make_program(tmp_path / "srun", f"#!/bin/sh\necho srun $@\nexit {code}\n")
    make_program(tmp_path / "scontrol", "#!/bin/sh\necho scontrol $@\n")
    arguments = ("paper", "readme", "--root=my runs")
    done = run_slurm(tmp_path, *arguments, script="array.sh", **ARRAY)
    assert done.returncode == code
    lines = done.stdout.splitlines()
    assert lines[0] == "srun dml-jax paper --array readme --root=my runs"
    assert lines[1:] == ["scontrol requeue 4711_1"] * queues


@pytest.mark.slow
def test_the_jobs_of_an_array_train_the_cells_of_a_table(tmp_path):
    tiny.write_images(tmp_path / "data" / "cars196")
    make_program(tmp_path / "srun", '#!/bin/sh\nexec "$@"\n')
    root = tmp_path / "runs"
    settings = tiny.SETTINGS | {"epochs": 1, "evaluation.recall_at": "(1,2)", "data.name": "folder"}
    table = ["readme", "--losses=proxy_nca", "--methods=baseline,ps", "--seeds=1"]
    table += [f"--root={root}", f"--data_root={tmp_path / 'data'}"]
    table += [f"--config.{name}={value}" for name, value in settings.items()]
    job = run_slurm(tmp_path, "paper", *table, script="array.sh", **ARRAY)
    assert job.returncode == 0, job.stderr
    folders = [root / "cars196" / name / "seed0" for name in ("proxy_nca", "ps_proxy_nca")]
    assert [(folder / "result.json").exists() for folder in folders] == [False, True]
    assert not list(root.glob("readme.*"))  # Jobs would write it at the same time.

    started = (folders[1] / "result.json").stat().st_mtime_ns
    # With the part of the table that is done, nothing is trained.
    program = [sys.executable, "-m", "dml_jax", "paper", *table, "--methods=ps"]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 runs are finished" in done.stdout
    assert "| ps_proxy_nca | " in (root / "readme.md").read_text()
    assert (folders[1] / "result.json").stat().st_mtime_ns == started


def test_the_job_set_gives_each_process_its_index():
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    spec = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())["spec"]["replicatedJobs"][0]
    job = spec["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert f"--num_processes={job['completions']}" in container["command"]
    assert job["completions"] == job["parallelism"] and job["completionMode"] == "Indexed"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["containerName"] == container["name"]
