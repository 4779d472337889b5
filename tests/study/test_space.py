import pytest

from dml_jax import losses
from dml_jax.configs import glyphs
from dml_jax.study import space
from dml_jax.study.space import Range
from dml_jax.training import variants

PROXIES = [
    (method, loss)
    for method in ("baseline", "ps", "memvir", "ps_memvir", "mixup")
    for loss in losses.names()
]
PAIRS = [(method, loss) for method in variants.PAIR_METHODS for loss in losses.pair_names()]


@pytest.mark.parametrize(("method", "loss"), PROXIES + PAIRS)
def test_the_default_ranges_are_possible_and_of_the_variant(method, loss):
    config = glyphs.get_config(f"{method}_{loss}")
    found = space.of_variant(config, loss, {})
    groups = {path.partition(".")[0] for path in found}
    expected = {"optimizer"} | ({"loss"} if loss not in ("softmax", "virtual_softmax") else set())
    expected |= {"proxy_synthesis"} if "ps" in method else set()
    expected |= {"memvir"} if "memvir" in method else set()
    expected |= {method} & {"mixup", "xbm"}
    assert groups == expected
    assert ("optimizer.proxy_learning_rate" in found) == (loss in losses.names())
    assert variants.parse_variant(f"{method}_{loss}") == (method, loss)


def test_a_config_file_changes_the_space():
    changes = {
        "loss.scale": Range(10, 20),
        "optimizer.proxy_learning_rate": None,
        "memvir.num_steps": Range(2, 3, integer=True),
        "mixup.alpha": Range(0.1, 2),
        "xbm.num_steps": Range(2, 3, integer=True),
        "loss.margin": Range(0.1, 0.2),
        "optimizer.weight_decay": (1e-5, 1e-3, True),
    }
    found = space.of_variant(glyphs.get_config("ps_norm_softmax"), "norm_softmax", changes)
    assert found["loss.scale"] == Range(10, 20)
    assert found["optimizer.weight_decay"] == Range(1e-5, 1e-3, log=True)
    # What the variant does not have is left out.
    assert found.keys().isdisjoint(
        {
            *("optimizer.proxy_learning_rate", "memvir.num_steps", "loss.margin"),
            *("mixup.alpha", "xbm.num_steps"),
        }
    )


@pytest.mark.parametrize(
    ("path", "bounds", "message"),
    [
        ("loss.scale", Range(5, 5), "loss.scale: .* has no values"),
        ("loss.scale", Range(0, 5, log=True), "loss.scale: .* has no values"),
        ("loss.scale", Range(-1, 5), "loss.scale=-1: config.loss.scale is -1.0; .* above 0"),
        ("optimizer.momentum", Range(0, 1), "optimizer.momentum=0: "),
        ("optimizer.decay_rate", Range(0.1, 3), "decay_rate is 3.0; .* at most 1"),
    ],
)
def test_impossible_bounds_are_errors(path, bounds, message):
    with pytest.raises(ValueError, match=f"the search space is impossible:\n.*{message}"):
        space.of_variant(glyphs.get_config("baseline"), "norm_softmax", {path: bounds})
