# %% [markdown]
# # Proxy Synthesis and MemVir in your own Flax loop
#
# The losses, Proxy Synthesis, MemVir and the retrieval metrics of dml_jax are functions of arrays.
# They need neither its networks nor its training loop. This notebook uses them in a loop of about
# forty lines with Flax and optax, and trains with and without the two regularisers.
#
# **In Colab:** download the `.ipynb` file of this notebook. Open
# [colab.research.google.com](https://colab.research.google.com), choose *Upload*, and select the
# file. The next cell installs dml_jax where it is missing.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("dml_jax") is None:
    # pip install "dml_jax[cpu,demo]"; demo brings the letters that are the data below.
    # If the package index has no release yet, upload a wheel (`python -m build --wheel`) and
    # install that file: pip install "dml_jax-VERSION-py3-none-any.whl[cpu,demo]".
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "dml_jax[cpu,demo]"], check=True)

# %%
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from dml_jax import losses, memvir, proxy_synthesis, retrieval
from dml_jax.data import centre_view, decode, sources

# %% [markdown]
# ## Data and network
#
# Letters of 16 typefaces: 423 Latin and Greek classes for training, and 286 classes of other
# scripts for testing. Replace this by arrays of your own.

# %%
letters = sources.create("glyphs")


def arrays(source):
    """Returns the images [n, 32, 32, 1], ink as 1, and their labels."""
    images = [decode(source[i], source.where(i)) for i in range(len(source))]
    views = [centre_view(image, size=32, resize_to=32)[:, :, :1] for image in images]
    return 1 - np.stack(views).astype(np.float32) / 255, source.labels


train_images, train_labels = arrays(letters["train"])
test_images, test_labels = arrays(letters["test"])
num_classes = int(train_labels.max()) + 1
print(train_images.shape, test_images.shape, num_classes, "training classes")


class Network(nn.Module):
    """Two convolutions and a linear embedding."""

    dim: int

    @nn.compact
    def __call__(self, x):
        """Embeds images [n, 32, 32, 1]."""
        x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        for width in (24, 48):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        return nn.Dense(self.dim)(x.reshape(len(x), -1))


# %% [markdown]
# ## The loop
#
# - The proxies are parameters, of shape `loss.proxy_shape(classes, dim)`.
# - `proxy_synthesis.draw` draws the mixing weight and the partners, and
#   `proxy_synthesis.synthesize` returns the batch with its synthetic classes. Its fields are the
#   arguments of a loss.
# - MemVir's memory is state like that of the optimizer. `memvir.loss_and_update` takes the place
#   of the loss and also returns the new memory. Before its warm-up ends, call the loss alone.
# - The memory is donated to the compiled step, so that XLA updates it in place.

# %%
DIM, BATCH, STEPS, WARMUP = 64, 128, 500, 132


def train(loss, *, synthesis=False, memory=None, seed=0):
    """Returns a trained embedding function."""
    network, optimizer = Network(DIM), optax.adam(4e-3, eps=1e-3)
    network_key, proxy_key, mix_key = jax.random.split(jax.random.key(seed), 3)
    params = {
        "network": network.init(network_key, train_images[:1]),
        "proxies": 0.1 * jax.random.normal(proxy_key, loss.proxy_shape(num_classes, DIM)),
    }

    def objective(params, memory, key, images, labels):
        embeddings = network.apply(params["network"], images)
        problem = {"embeddings": embeddings, "proxies": params["proxies"], "labels": labels}
        if synthesis:
            lam, partner = proxy_synthesis.draw(key, labels, alpha=1.0, ratio=3.0)
            problem = proxy_synthesis.synthesize(
                **problem, lam=lam, partner=partner, ratio=3.0, loss=loss
            )._asdict()
        if memory is None:
            return loss(**problem), None
        return memvir.loss_and_update(loss, memory, **problem)

    def step(params, opt_state, memory, key, images, labels):
        gradient = jax.value_and_grad(objective, has_aux=True)
        (value, memory), gradients = gradient(params, memory, key, images, labels)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, memory, value

    step = jax.jit(step, donate_argnums=(0, 1, 2))
    opt_state, rng, stored = optimizer.init(params), np.random.default_rng(seed), memory
    for number in range(STEPS):
        chosen = rng.choice(len(train_images), BATCH, replace=False)
        key = jax.random.fold_in(mix_key, number)
        used = stored if number >= WARMUP else None
        batch = key, train_images[chosen], jnp.asarray(train_labels[chosen])
        params, opt_state, new, value = step(params, opt_state, used, *batch)
        stored = new if used is not None else stored
    print(f"loss of the last step {float(value):.3f}")
    return jax.jit(lambda images: network.apply(params["network"], images))


# %% [markdown]
# ## With and without
#
# Every run takes the same number of steps with the same batches. The losses of the last step are
# not comparable, because synthetic and virtual classes make the problem harder. The retrieval
# metrics of unseen classes are.

# %%
loss = losses.create("norm_softmax", scale=23.0)


def new_memory():
    """Returns an empty memory; a step that donates it uses it up."""
    return memvir.init(
        num_steps=1, step_gap=15, batch_size=BATCH, num_classes=num_classes, dim=DIM, loss=loss
    )


variants = {
    "baseline": {},
    "Proxy Synthesis": {"synthesis": True},
    "MemVir": {"memory": new_memory()},
    "both": {"synthesis": True, "memory": new_memory()},
}
scores = {}
for name, options in variants.items():
    embed = train(loss, **options)
    scores[name] = retrieval.evaluate(embed(test_images), test_labels)

# %%
for name, score in scores.items():
    print(f"{name:16}", retrieval.summary(score))

# %% [markdown]
# The settings of both regularisers are those of `configs/glyphs.py`. This is a single seed of a
# short training without augmentation. The benchmarks in the documentation have several seeds,
# longer training with augmentation, and tests of significance.
