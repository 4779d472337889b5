import jax
import numpy as np
import pytest

from dml_jax import data, retrieval
from dml_jax._utils import sharding
from dml_jax.data.deformations import DEFORMATIONS
from dml_jax.evaluation import robustness
from dml_jax.training import builder
from dml_jax.training.config import parse
from dml_jax.training.state import network_variables
from tests.helpers import tiny


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tiny.write_images(tmp_path_factory.mktemp("images"))
    return builder.build(parse(tiny.config(root)), sharding.make_mesh(jax.devices()[:1]))


def embedded(built, variables, source, strength):
    """Returns the embeddings of all images of a source at once, deformed by noise."""
    images = [
        DEFORMATIONS["noise"].apply(
            data.centre_view(source.image(i).pixels(), size=tiny.SIZE, resize_to=tiny.SIZE),
            strength,
            np.random.default_rng(i),
        )
        for i in range(len(source))
    ]
    return np.asarray(built.network.embed(variables, np.stack(images)))


@pytest.mark.parametrize("with_gallery", [False, True])
def test_scores_are_those_of_deformed_queries_and_of_all_images_deformed(built, with_gallery):
    variables = network_variables(built.init())
    sources = dict(built.sources)
    if with_gallery:
        sources["gallery"] = sources["train"]
    evaluator = built.evaluator._replace(sources=sources, recall_at=(1,))
    plain = evaluator.embed(variables, "test")
    found = robustness.score(evaluator, variables, plain, ["noise"], fmr=(0.1,))
    assert found.keys() == {"noise"}
    assert found["noise"].keys() == {"0.05", "0.1", "0.2"}
    labels = sources["test"].labels
    for strength, scores in found["noise"].items():
        queries = embedded(built, variables, sources["test"], float(strength))
        gallery = None
        if with_gallery:
            gallery = sources["gallery"]
            of_gallery = embedded(built, variables, gallery, float(strength))
            both = retrieval.evaluate(
                queries, labels, gallery=(of_gallery, gallery.labels), recall_at=(1,)
            )
        else:
            both = retrieval.evaluate(queries, labels, recall_at=(1,))
        assert scores["both"] == pytest.approx(both, abs=1e-6)
        targets, target_labels = plain["test"], labels
        if with_gallery:
            targets, target_labels = plain["gallery"], gallery.labels
        assert scores["queries"]["recall@1"] == pytest.approx(
            nearest_of_class(queries, labels, targets, target_labels, own=not with_gallery)
        )


def nearest_of_class(queries, labels, targets, target_labels, *, own):
    """Returns Recall@1 by a loop; with `own`, query i is not compared with target i."""
    hits = []
    for i, query in enumerate(queries):
        cosines = targets @ query / np.linalg.norm(targets, axis=1)
        if own:
            cosines[i] = -np.inf
        if any(
            label == labels[i] and not (own and j == i) for j, label in enumerate(target_labels)
        ):
            hits.append(target_labels[np.argmax(cosines)] == labels[i])
    return np.mean(hits)


def test_another_embedding_of_the_same_images_excludes_the_own_one():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 5)
    queries = rng.normal(size=(20, 6)).astype(np.float32)
    gallery = queries + rng.normal(size=(20, 6)).astype(np.float32) / 2
    scores = retrieval.evaluate(
        queries, labels, gallery=(gallery, labels), recall_at=(1,), same_images=True
    )
    expected = nearest_of_class(queries, labels, gallery, labels, own=True)
    assert scores["recall@1"] == pytest.approx(expected) and expected < 1
    same = retrieval.evaluate(queries, labels, gallery=(queries, labels), same_images=True)
    assert same == retrieval.evaluate(queries, labels)


@pytest.mark.parametrize(
    "options",
    [{}, {"gallery": (np.eye(3), [0, 1, 1])}, {"gallery": (np.eye(3), [0, 0, 1]), "fmr": (0.5,)}],
)
def test_same_images_need_a_gallery_with_the_same_labels(options):
    with pytest.raises(ValueError, match="same_images needs a gallery with the labels"):
        retrieval.evaluate(np.eye(3), [0, 0, 1], same_images=True, **options)
