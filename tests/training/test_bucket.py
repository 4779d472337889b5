import shutil

import jax
import pytest

import dml_jax
from dml_jax._utils import leases, sharding, storage
from dml_jax._utils.errors import LockedError
from dml_jax.training import bucket, checkpoint, integrity, run, run_directory
from tests.helpers import object_storage, tiny


@pytest.fixture(scope="module", autouse=True)
def served():
    with object_storage.served():
        yield


@pytest.fixture(autouse=True)
def one_device(monkeypatch, tmp_path):
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda *_: make_mesh(jax.devices()[:1]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images"))


def upload_folder(folder, url):
    names = [x.relative_to(folder).as_posix() for x in folder.rglob("*") if x.is_file()]
    storage.upload(folder, url, names)


def new_run(scheme):
    return object_storage.new_bucket(scheme) + "/runs/mine"


def steps(url):
    names = bucket.published(storage.names(url))
    return {int(x.split("/")[1]) for x in names if x.endswith(integrity.SEAL)}


@pytest.mark.slow
@pytest.mark.parametrize("scheme", object_storage.SCHEMES)
def test_a_run_in_a_bucket_equals_a_run_on_disk(images, tmp_path, scheme):
    """Two epochs, then a third, with images in a bucket and validation classes."""
    url, root = new_run(scheme), object_storage.new_bucket(scheme)
    upload_folder(images, root)
    settings = {"data__validation_classes": 0.5, "checkpoint__keep_last": 1}
    for place, source in ((url, root), (tmp_path / "run", images)):
        for epochs in (2, 3):
            run.train(tiny.config(source, "ps_memvir", epochs=epochs, **settings), place)
    copy = bucket.copy(url)
    for name in (run_directory.METRICS, run_directory.RESULT, run_directory.EMBEDDINGS):
        assert (copy / name).read_bytes() == (tmp_path / "run" / name).read_bytes()

    # What was deleted on disk is deleted in the bucket, and no copy remains of what was trained.
    def listed(names):
        return {name.split("/")[1] for name in names if name.startswith("checkpoints/")}

    on_disk = {x.relative_to(tmp_path / "run").as_posix() for x in (tmp_path / "run").rglob("*")}
    assert (
        listed(storage.names(url)) == listed(on_disk - {"checkpoints"}) == set(map(str, steps(url)))
    )
    assert not storage.local_folder(url, "runs/0").exists()
    ours, theirs = (dml_jax.load(x, checkpoint="best_map") for x in (url, tmp_path / "run"))
    image = next(images.rglob("*.png"))
    assert (ours.embed([image]) == theirs.embed([image])).all()


@pytest.fixture
def stored(images):
    url = new_run("memory")
    run.train(tiny.config(images, epochs=2), url)
    return url


def test_only_complete_checkpoints_count(images, stored):
    latest = max(steps(stored))
    # As after an upload that was interrupted, and before another one has begun.
    storage.delete(stored, [f"{run_directory.CHECKPOINTS}/{latest}/{integrity.SEAL}"])
    storage.delete(stored, [run_directory.RESULT])
    copy = bucket.copy(stored)
    assert [x.name for x in (copy / run_directory.CHECKPOINTS).iterdir()] == [str(latest - 4)]
    result = run.train(tiny.config(images, epochs=2), stored)
    assert result["last"]["step"] == latest and latest in steps(stored)
    names = storage.names(stored)
    assert set(names) == set(bucket.published(names))


def test_a_damaged_checkpoint_is_moved_aside_in_the_bucket(images, stored):
    latest = max(steps(stored))
    part = f"{run_directory.CHECKPOINTS}/{latest}/state/manifest.ocdbt"
    storage.write(storage.join(stored, part), b"damaged")
    storage.delete(stored, [run_directory.RESULT])
    with pytest.raises(ValueError, match="has changed since it was written"):
        dml_jax.load(stored)
    run.train(tiny.config(images, epochs=2), stored)
    assert latest in steps(stored)
    aside = f"{run_directory.DAMAGED}/{latest}/state/manifest.ocdbt"
    assert storage.read(storage.join(stored, aside)) == b"damaged"


def test_a_run_that_was_taken_over_publishes_nothing(images, monkeypatch):
    url = new_run("memory")
    opened = bucket.opened(url)
    ours = opened.__enter__()
    monkeypatch.setattr(leases, "EXPIRY", 0.2)
    with leases.held(url):
        (ours.folder / run_directory.CONFIG).write_text("{}")
        with pytest.raises(LockedError, match="taken over"):
            ours.publish()
    assert run_directory.CONFIG not in storage.names(url)
    with pytest.raises(LockedError):
        opened.__exit__(None, None, None)


def test_a_suspended_process_of_the_same_host_keeps_its_folder(monkeypatch):
    url = new_run("memory")
    with bucket.opened(url) as suspended:
        monkeypatch.setattr(leases, "EXPIRY", 0.2)
        with pytest.raises(LockedError, match="another process of this host"):
            bucket.opened(url).__enter__()
        assert suspended.folder.exists()
    with bucket.opened(url):
        pass


def test_nothing_is_deleted_if_the_local_folder_vanishes(stored):
    before = storage.names(stored)
    opened = bucket.opened(stored)
    ours = opened.__enter__()
    shutil.rmtree(ours.folder)
    with pytest.raises(FileNotFoundError, match="was deleted during the run"):
        opened.__exit__(None, None, None)
    assert storage.names(stored) == before


def test_the_root_of_a_bucket_is_no_workdir(images):
    with pytest.raises(ValueError, match="is a whole bucket; choose a folder in it"):
        run.train(tiny.config(images), object_storage.new_bucket("memory") + "/")


def test_a_cache_of_features_whose_upload_failed_is_uploaded_by_the_next_run(images, monkeypatch):
    settings = {"model__train_from": "head", "data__cache": "features", "epochs": 1}
    first, second = new_run("memory"), new_run("memory")
    place = first.rpartition("/")[0]
    features = {"data__features": storage.join(place, "shared")}
    upload = storage.upload

    def fail(folder, url, names):
        if "shared" in url:
            raise OSError("the network is down")
        upload(folder, url, names)

    with monkeypatch.context() as broken:
        broken.setattr(storage, "upload", fail)
        with pytest.raises(OSError, match="network"):
            run.train(tiny.config(images, **settings, **features), first)
    run.train(tiny.config(images, **settings, **features), second)
    assert any(x.endswith("complete.json") for x in storage.names(features["data__features"]))


def test_an_upload_that_fails_ends_the_run_and_keeps_what_was_published(
    images, stored, monkeypatch
):
    before = steps(stored)
    upload = storage.upload

    def fail(folder, url, names):
        if run_directory.CHECKPOINTS in url:
            raise OSError("no space left in the bucket")
        upload(folder, url, names)

    with monkeypatch.context() as broken:
        broken.setattr(storage, "upload", fail)
        with pytest.raises(OSError, match="step 12 could not be written.*no space left"):
            run.train(tiny.config(images, epochs=3), stored)
    assert steps(stored) == before
    assert run.train(tiny.config(images, epochs=3), stored)["last"]["epoch"] == 3


def test_forks_features_and_errors_of_a_run_in_a_bucket(images, stored):
    fork = f"{stored}/../fork".replace("/mine/..", "")
    settings = {"model__train_from": "head", "data__cache": "features"}
    result = run.train(tiny.config(images, epochs=1, **settings), fork, fork_from=stored)
    assert result["last"]["epoch"] == 1
    features = storage.join(fork.rpartition("/")[0], "features")
    assert {name.partition("/")[2] for name in storage.names(features)} == {
        "complete.json",
        "features.npy",
    }
    other = fork + "2"
    before = storage.names(features)
    assert run.train(tiny.config(images, epochs=1, **settings), other, fork_from=stored) == result
    assert storage.names(features) == before
    with pytest.raises(ValueError, match=f"{stored} holds a run with another configuration"):
        run.train(tiny.config(images, epochs=2, seed=1), stored)
    with pytest.raises(FileNotFoundError, match="there is nothing at memory://"):
        dml_jax.load("memory://nothing/here")
    assert checkpoint.BEST.keys() == {"best_map", "best_r1", "best_rp"}
