"""The programs, started from the command line."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import dml_jax
from dml_jax import retrieval
from dml_jax._utils import files, sharding, storage
from dml_jax.evaluation import embedding_files
from dml_jax.models import pretrained
from dml_jax.search import stores
from dml_jax.training import bucket, builder, checkpoint, preemption, run_directory
from dml_jax.training.config import parse
from tests.helpers import object_storage, tiny, weights

ROOT = Path(__file__).parents[2]


def command(program, *arguments):
    return [sys.executable, f"scripts/{program}", *map(str, arguments)]


def run(program, *arguments):
    return subprocess.run(command(program, *arguments), cwd=ROOT, capture_output=True, text=True)


def succeed(program, *arguments):
    done = run(program, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "finished"
    succeed(
        "train.py",
        f"--workdir={folder}",
        *tiny.arguments(images, "ps_memvir", epochs=6, deterministic=True),
    )
    return folder


def test_a_finished_run_is_not_trained_again(images, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.iterdir()}
    out = succeed(
        "train.py",
        f"--workdir={finished}",
        *tiny.arguments(images, "ps_memvir", epochs=6, deterministic=True),
    )
    assert "last: R@1" in out
    assert before == {path: path.stat().st_mtime_ns for path in finished.iterdir()}


@pytest.mark.slow
def test_evaluate_scores_checkpoints_and_exported_embeddings(finished):
    result = run_directory.read_result(finished)
    of_best = f"--workdir={finished}", "--checkpoint=best_map"
    best = json.loads(succeed("evaluate.py", *of_best, "--deform=zoom_in"))
    assert best["map@r"] == result["best"]["map@r"]
    assert best["deformed"]["zoom_in"].keys() == {"1.25", "1.5", "2"}
    assert "no melt; choose from cutout" in run("evaluate.py", *of_best, "--deform=melt").stderr
    exported = json.loads(
        succeed(
            "evaluate.py",
            f"--embeddings={finished / run_directory.EMBEDDINGS}",
            "--nmi",
            "--recall_at=1",
            "--diagnostics",
        )
    )
    assert exported["recall@1"] == result["last"]["recall@1"]
    assert exported["pi_ratio"] > 0
    assert 0 <= exported["nmi"] <= 1 and "recall@2" not in exported


@pytest.mark.slow
def test_evaluate_scores_a_backbone_that_was_not_trained(images):
    config = tiny.arguments(images)
    scores = json.loads(succeed("evaluate.py", *config, "--backbone=conv4", "--recall_at=1,2"))
    assert scores.keys() == {"features", "whitened"}
    for found in scores.values():
        assert {"recall@2", "map@r"} < found.keys() and 0 < found["map@r"] <= 1
    done = run("evaluate.py", *config, "--checkpoint=last")
    assert done.returncode == 2 and "give one of --workdir" in done.stderr


@pytest.mark.slow
def test_evaluate_writes_a_leaderboard_of_the_backbones_that_can_be_scored(images, tmp_path):
    out = tmp_path / "leaderboard"
    listed = ("--zero-shot", "--backbones=conv4=none,conv4=hf:somebody/absent", f"--out={out}")
    # Pretrained weights have the backbone's own width.
    config = [x for x in tiny.arguments(images) if not x.startswith("--config.model.width=")]
    done = run("evaluate.py", *config, *listed)
    assert done.returncode == 2, done.stderr
    assert "1 of 2 backbones could not be scored" in done.stderr
    written = json.loads((out / "leaderboard.json").read_text())
    assert [row["pretrained"] for row in written["rows"]] == ["none"]
    assert "hf download somebody/absent" in written["failed"]["conv4=hf:somebody/absent"]
    assert "hf:somebody/absent" in (out / "index.html").read_text()
    done = run("evaluate.py", *config, "--zero-shot", "--backbones=resnet50")
    assert done.returncode == 2 and "must be BACKBONE=WEIGHTS" in done.stderr


def test_embed_needs_only_config_and_checkpoint_of_the_run(images, finished, tmp_path):
    out, moved = tmp_path / "mine.npz", tmp_path / "moved"
    images.rename(moved)
    try:
        succeed("embed.py", f"--workdir={finished}", f"--images={moved / 'test'}", f"--out={out}")
    finally:
        moved.rename(images)
    ours = embedding_files.load_embeddings(out)
    expected = embedding_files.load_embeddings(finished / run_directory.EMBEDDINGS)
    np.testing.assert_allclose(ours.embeddings, expected.embeddings, rtol=1e-5, atol=1e-5)
    assert ours.class_names == expected.class_names
    assert ours.names[0] == "class0/0.png"


@pytest.mark.slow
def test_embed_exports_the_synthetic_classes(finished, tmp_path):
    out = tmp_path / "synthetic.npz"
    of_run = f"--workdir={finished}", f"--synthetic={out}"
    printed = succeed("embed.py", *of_run, "--checkpoint=best_map")
    with np.load(out, allow_pickle=False) as saved:
        count = len(saved["weights"])
        assert f"{count} synthetic classes of {tiny.TRAIN_CLASSES}" in printed
        assert 0 < count <= tiny.TRAIN_CLASSES * tiny.IMAGES
        assert saved["embeddings"].shape == saved["proxies"].shape == (count, 16)
        assert (saved["classes"][:, 0] != saved["classes"][:, 1]).all()
    both = run("embed.py", *of_run, f"--out={out}", "--images=.")
    assert both.returncode == 2 and "give --images and --out, or --synthetic" in both.stderr


def test_an_export_embeds_like_the_run(images, finished, tmp_path):
    out = tmp_path / "exported"
    assert f"{out / 'README.md'} says how to load it" in succeed(
        "export.py", finished, f"--out={out}", "--fmr=0.05"
    )
    saved = embedding_files.load_embeddings(finished / run_directory.EMBEDDINGS)
    scores = retrieval.evaluate(saved.embeddings, saved.labels, fmr=(0.05,))
    assert dml_jax.load(out).threshold == scores["threshold@fmr0.05"]
    assert f"below {scores['threshold@fmr0.05']:.4f} are taken" in (out / "README.md").read_text()
    ours = dml_jax.load(out).embed([images / name for name in saved.names])
    lengths = np.linalg.norm(saved.embeddings, axis=1, keepdims=True)
    np.testing.assert_allclose(ours / lengths, saved.embeddings / lengths, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def indexed(images, finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("search") / "index"
    embeddings = f"--embeddings={finished / run_directory.EMBEDDINGS}"
    printed = succeed("index.py", embeddings, f"--images={images}", f"--out={out}")
    assert "24 images, flat index" in printed and "100.0" in printed
    return out


def test_search_ranks_the_query_itself_first(images, finished, indexed, tmp_path):
    query, sheet = images / "test" / "class2" / "3.png", tmp_path / "sheet.html"
    where = [f"--index={indexed}", f"--workdir={finished}"]
    printed = succeed("search.py", *where, f"--out={sheet}", "--neighbours=3", query)
    first = next(line for line in printed.splitlines() if line.startswith("│ 1 "))
    assert "1.000" in first and "test/class2/3.png" in first
    assert sheet.read_text().count("data:image/jpeg;base64,") == 4
    assert "unknown" not in printed


def test_search_reads_a_vector_database_and_says_unknown(images, finished, tmp_path):
    pytest.importorskip("lancedb", reason="the extra lancedb is not installed")
    url, sheet = f"lancedb://{tmp_path}/gallery", tmp_path / "sheet.html"
    saved = embedding_files.load_embeddings(finished / run_directory.EMBEDDINGS)
    stores.write(url, saved, folder=str(images), threshold=0.9999)
    query = images / "test" / "class2" / "3.png"
    where = [f"--index={url}", f"--workdir={finished}", f"--out={sheet}"]
    printed = succeed("search.py", *where, "--neighbours=3", query)
    lines = [line for line in printed.splitlines() if line.startswith("│")]
    assert "class2" in lines[0].split("│")[3] and "1.000" in lines[0]
    assert all("unknown" in line.split("│")[3] for line in lines[1:])
    assert "24 images, LanceDB; unknown below 1.000" in printed
    assert sheet.read_text().count("data:image/jpeg;base64,") == 4


PRETRAINED = {"model__backbone": "resnet18", "model__width": 64, "model__stem": "imagenet"}


@pytest.mark.slow
def test_a_run_starts_from_pretrained_weights_and_resumes_without_their_file(images, tmp_path):
    file, folder = tmp_path / "resnet18.safetensors", tmp_path / "run"
    expected = weights.state_dict("resnet18")
    save_file(expected, file)
    # The parameters stay the same, so the checkpoint has the initial ones.
    still = {"optimizer__learning_rate": 1e-30, "optimizer__weight_decay": 0.0}
    settings = PRETRAINED | still | {"model__pretrained": file, "model__freeze_bn": True}
    training = ["train.py", f"--workdir={folder}", *tiny.arguments(images, epochs=1, **settings)]
    succeed(*training)
    like = tiny.config(images, **PRETRAINED)
    built = builder.build(parse(like), sharding.make_mesh(jax.devices()[:1]))
    _, variables = checkpoint.read_network(built.network, folder, "last")
    backbone = {collection: tree["backbone"] for collection, tree in variables.items()}
    chex.assert_trees_all_equal(
        jax.device_get(backbone), jax.device_get(pretrained.convert("resnet18", expected))
    )
    file.unlink()
    (folder / run_directory.RESULT).unlink()
    assert "last: R@1" in succeed(*training)


BAD_SETTINGS = {
    "unknown key": (["--config.optimizer.leraning_rate=1"], "leraning_rate"),
    "wrong type": (["--config.epochs=many"], "epochs"),
    "unknown variant": (["--config=configs/folder.py:psi"], "unknown variant 'psi'"),
    "two bad values": (
        ["--config.model.stem=large", "--config.optimizer.eps=0"],
        "config.model.stem is 'large'; choose one of imagenet, small, or None\n"
        "config.optimizer.eps is 0.0; it must be a finite number above 0",
    ),
    "missing folder": (["--config.data.root=nowhere"], "nowhere is not a directory"),
    "missing weights": (
        ["--config.model.pretrained=no.safetensors"]
        + [f"--config.{name.replace('__', '.')}={value}" for name, value in PRETRAINED.items()],
        f"there are no weights at {ROOT / 'no.safetensors'}",
    ),
    "large batch": (["--config.batch_size=64"], "64"),
}


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_a_bad_setting_is_reported_before_anything_is_written(images, tmp_path, name):
    arguments, message = BAD_SETTINGS[name]
    folder = tmp_path / "run"
    done = run("train.py", f"--workdir={folder}", *tiny.arguments(images), *arguments)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not folder.exists()


@pytest.mark.slow
def test_nonfinite_values_end_a_run_with_exit_code_3(images, tmp_path):
    folder = tmp_path / "run"
    # Loss and gradient are finite, but the update at this learning rate is not.
    wild = {"optimizer__name": "sgd", "optimizer__learning_rate": 1e38}
    done = run("train.py", f"--workdir={folder}", *tiny.arguments(images, epochs=1, **wild))
    assert done.returncode == 3, done.stderr
    assert "Traceback" not in done.stderr
    assert f"see {folder / run_directory.NOT_FINITE}; there is no checkpoint yet" in done.stderr
    details = json.loads((folder / run_directory.NOT_FINITE).read_text())
    assert (details["step"], details["learning_rate"], len(details["images"])) == (1, 1e38, 8)
    assert 0 < details["loss"] < 100 and 0 < details["gradient_norm"] < 1000
    assert not (folder / run_directory.RESULT).exists()


@pytest.mark.slow
def test_bad_images_are_reported_by_path(tmp_path):
    images = tiny.write_images(tmp_path / "images")
    (images / "train" / "class1" / "2.png").write_text("not an image")
    (images / "train" / "class9").mkdir()
    folder = tmp_path / "run"
    training = ["train.py", f"--workdir={folder}", *tiny.arguments(images)]
    done = run(*training)
    assert done.returncode == 2 and str(images / "train" / "class9") in done.stderr
    (images / "train" / "class9").rmdir()
    done = run(*training)
    assert done.returncode == 2 and "train/class1/2.png" in done.stderr
    assert not folder.exists()


def test_a_run_with_another_config_is_not_changed(images, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    done = run("train.py", f"--workdir={finished}", *tiny.arguments(images, "ps", epochs=6))
    assert done.returncode == 2
    assert "config.memvir.num_steps: 2 before, 0 now" in done.stderr
    assert before == {path: path.stat().st_mtime_ns for path in finished.rglob("*")}


def markdown_rows(table):
    lines = table.strip().splitlines()[2:]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


@pytest.mark.slow
def test_reproduce_resumes_after_a_kill_and_compares(images, tmp_path):
    settings = [x for x in tiny.arguments(images, epochs=2) if not x.startswith("--config=")]
    reproduce = command(
        "reproduce.py",
        "--config=configs/folder.py",
        "--variants=memvir_proxy_nca",
        "--seeds=2",
        f"--root={tmp_path}",
        *settings,
        "--config.memvir.num_steps=2",
        "--config.memvir.step_gap=0",
        "--config.memvir.warmup_epochs=1",
    )
    process = subprocess.Popen(reproduce, cwd=ROOT, stdout=subprocess.DEVNULL)
    first, second = (tmp_path / name / "seed0" for name in ("proxy_nca", "memvir_proxy_nca"))
    while not (second / run_directory.METRICS).exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    finished = (first / run_directory.RESULT).stat().st_mtime_ns

    done = subprocess.run(reproduce, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (first / run_directory.RESULT).stat().st_mtime_ns == finished
    tables = done.stdout[done.stdout.index("| R@1") :].split("\n\n")
    assert [table.splitlines()[0].split(" | ")[0] for table in tables] == [
        "| R@1, last epoch",
        "| RP, last epoch",
        "| MAP@R, last epoch",
    ]
    rows = markdown_rows(tables[2])
    assert [row[0] for row in rows] == ["proxy_nca", "memvir_proxy_nca"]
    for row in rows:
        for seed in range(2):
            result = run_directory.read_result(tmp_path / row[0] / f"seed{seed}")
            assert row[1 + seed] == f"{100 * result['last']['map@r']:.1f}"
    assert rows[0][4] == "" and rows[1][4].startswith("proxy_nca ")


@pytest.mark.slow
def test_a_run_resumes_after_the_disk_was_full(images, tmp_path):
    folder = tmp_path / "run"
    arguments = tiny.arguments(images, epochs=2, model__width=64)
    training = ("train.py", f"--workdir={folder}", *arguments)
    # Files are limited to 200 KiB, and the state is larger.
    limited = ["bash", "-c", 'ulimit -f 200 && exec "$@"', "bash", *command(*training)]
    full = subprocess.run(limited, cwd=ROOT, capture_output=True, text=True)
    assert full.returncode == 2, full.stderr
    assert "checkpoint of step 4 could not be written" in full.stderr
    assert "Traceback" not in full.stderr
    assert not (folder / run_directory.RESULT).exists()
    assert "last: R@1" in succeed(*training)


def start(folder, devices, arguments, program=("scripts/train.py",), **environment):
    """Starts a process with a number of devices."""
    flag = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, *program, f"--workdir={folder}", *arguments],
        cwd=ROOT,
        env=os.environ | {"XLA_FLAGS": flag} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_together(folder, arguments, count=2, **of_last):
    """Runs processes with four devices in all; returns their exit codes and what they printed.

    Args:
        of_last: program and environment of the last process.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    joined = [*arguments, f"--coordinator={address}", f"--num_processes={count}"]
    processes = [
        start(folder, 4 // count, [*joined, f"--process_id={number}"], **settings)
        for number, settings in enumerate([{}] * (count - 1) + [of_last])
    ]
    printed = [process.communicate(timeout=600) for process in processes]
    return [process.returncode for process in processes], printed


def run_alone(folder, devices, arguments):
    process = start(folder, devices, arguments)
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors


def losses(folder):
    return [line["loss"] for line in files.read_json_lines(folder / run_directory.METRICS)]


SLOW = ["--config.optimizer.learning_rate=1e-4", "--config.evaluation.recall_at=(1,2)"]
MARKED = ("-m", "tests.helpers.marked")


@pytest.mark.slow
def test_two_interrupted_processes_train_like_one_uninterrupted_process(tmp_path):
    images = tiny.write_images(tmp_path / "images")
    # One process inspects the images and tells the others which to skip.
    (images / "train" / "class0" / "0.png").write_bytes(b"")
    arguments = [*tiny.arguments(images, "ps_memvir", epochs=3, data__unreadable="skip"), *SLOW]

    # An error in one process ends both.
    together, does = tmp_path / "together", str(tmp_path / "does")
    fails = {"DML_JAX_TEST_PHASE": does, "DML_JAX_TEST_FAILS": "3"}
    codes, printed = run_together(together, arguments, program=MARKED, **fails)
    assert codes == [2, 2] and "process 1 failed: a disk has failed" in printed[0][1], printed

    # The second process receives the stop signal in step 5; all processes stop four steps later.
    asks = {"DML_JAX_TEST_PHASE": does, "DML_JAX_TEST_STOPS": "5"}
    codes, printed = run_together(together, arguments, program=MARKED, **asks)
    assert codes == [preemption.EXIT_CODE] * 2, printed
    assert all("stopped after step 9, which is saved" in errors for _, errors in printed)
    assert (together / run_directory.CHECKPOINTS / "9").is_dir()
    codes, printed = run_together(together, arguments)
    assert codes == [0, 0], printed
    assert "last: R@1" in printed[0][0] and "R@1" not in printed[1][0]
    alone = tmp_path / "alone"
    run_alone(alone, 4, arguments)
    lines = [files.read_json_lines(folder / run_directory.METRICS) for folder in (together, alone)]
    for ours, expected in zip(*lines, strict=True):
        assert ours.keys() == expected.keys()
        np.testing.assert_allclose(ours["loss"], expected["loss"], rtol=1e-5)
    for folder in (together, alone):
        result = json.loads((folder / run_directory.RESULT).read_text())
        assert result["unreadable"] == {"train": 1, "test": 0}
    ours, expected = (
        embedding_files.load_embeddings(x / run_directory.EMBEDDINGS) for x in (together, alone)
    )
    np.testing.assert_allclose(ours.embeddings, expected.embeddings, rtol=1e-4, atol=1e-4)

    # Without the last checkpoint, of epoch 3, a single process repeats that epoch.
    (together / run_directory.RESULT).unlink()
    shutil.rmtree(together / run_directory.CHECKPOINTS / "12")
    run_alone(together, 1, arguments)
    resumed = files.read_json_lines(together / run_directory.METRICS)
    assert resumed[:2] == lines[0][:2]
    np.testing.assert_allclose(resumed[2]["loss"], lines[0][2]["loss"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["save", "evaluation"])
def test_four_processes_end_if_one_fails_in_a_save_or_an_evaluation(images, tmp_path, moment):
    fails = {"DML_JAX_TEST_PHASE": str(tmp_path / "does"), "DML_JAX_TEST_FAILS": moment}
    codes, printed = run_together(
        tmp_path / "run", tiny.arguments(images), 4, program=MARKED, **fails
    )
    assert codes == [2] * 4, printed
    assert printed[3][1].startswith("error: a disk has failed"), printed[3][1]
    assert all("process 3 failed: a disk has failed" in errors for _, errors in printed[:3])


@pytest.fixture
def bucket_url(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with object_storage.served():
        yield object_storage.new_bucket("s3")


@pytest.mark.slow
def test_two_processes_without_a_common_disk_train_like_one_process(tmp_path, bucket_url):
    images = tiny.write_images(tmp_path / "images")
    settings = {"epochs": 3, "data__validation_classes": 0.5}
    arguments = [*tiny.arguments(images, "ps_memvir", **settings), *SLOW]
    together = storage.join(bucket_url, "together")
    asks = {"DML_JAX_TEST_PHASE": str(tmp_path / "does"), "DML_JAX_TEST_STOPS": "3"}
    # Each process has a cache, and so a local folder, of its own.
    other = {"XDG_CACHE_HOME": str(tmp_path / "other")}
    codes, printed = run_together(together, arguments, program=MARKED, **asks, **other)
    assert codes == [preemption.EXIT_CODE] * 2, printed
    codes, printed = run_together(together, arguments, **other)
    assert codes == [0, 0], printed
    names = storage.names(together)
    assert set(names) == set(bucket.published(names))
    result = run_directory.read_result(bucket.copy(together))
    assert result["last"]["epoch"] == 3 and result["best_chosen_on"] == "validation"

    # A single process continues with the parts of both.
    longer = [*arguments, "--config.epochs=4"]
    run_alone(together, 1, longer)
    run_alone(tmp_path / "alone", 4, longer)
    found, expected = losses(bucket.copy(together)), losses(tmp_path / "alone")
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.slow
def test_every_program_reads_and_writes_urls(images, bucket_url):
    def at(name):
        return storage.join(bucket_url, name)

    storage.upload(
        images, at("images"), [x.relative_to(images).as_posix() for x in images.rglob("*.png")]
    )
    arguments = tiny.arguments(at("images"), epochs=1)
    assert f"results: {at('run/result.json')}" in succeed(
        "train.py", f"--workdir={at('run')}", *arguments
    )
    scores = json.loads(succeed("evaluate.py", f"--workdir={at('run')}"))
    query = storage.join(at("images"), "test/class0/0.png")
    options = f"--images={at('images/test')}"
    succeed("embed.py", f"--workdir={at('run')}", options, f"--out={at('mine.npz')}")
    exported = json.loads(succeed("evaluate.py", f"--embeddings={at('mine.npz')}"))
    assert exported["map@r"] == pytest.approx(scores["map@r"], abs=1e-6)
    succeed("index.py", f"--embeddings={at('mine.npz')}", options, f"--out={at('index')}")
    succeed("export.py", at("run"), f"--out={at('export')}")
    found = succeed(
        "search.py", f"--index={at('index')}", f"--workdir={at('export')}",
        f"--out={at('sheet.html')}", query,
    )  # fmt: skip
    assert "class0/0.png" in found and at("sheet.html") in found
    assert b"data:image" in storage.read(at("sheet.html"))
    assert at("report.html") in succeed("report.py", at("run"), f"--out={at('report.html')}")
    assert b"<html" in storage.read(at("report.html"))
    again = run("index.py", f"--embeddings={at('mine.npz')}", options, f"--out={at('index')}")
    assert again.returncode == 2 and "exists already" in again.stderr
