# %% [markdown]
# # Metric learning on your images
#
# This notebook trains an embedding network on a folder of images. It then searches with the
# network among images of classes that were not in the training data, and exports it.
#
# **In Colab:** download the `.ipynb` file of this notebook. Open
# [colab.research.google.com](https://colab.research.google.com), choose *Upload*, and select the
# file. The next cell installs dml_jax where it is missing.

# %%
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("dml_jax") is None:
    # pip install "dml_jax[cpu,demo]"; demo brings the letters that are drawn below.
    # If the package index has no release yet, upload a wheel (`python -m build --wheel`) and
    # install that file: pip install "dml_jax-VERSION-py3-none-any.whl[cpu,demo]".
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "dml_jax[cpu,demo]"], check=True)

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

import dml_jax
from dml_jax import retrieval
from dml_jax.configs import folder
from dml_jax.data import sources
from dml_jax.evaluation import embedding_files
from dml_jax.inference import export

place = Path(tempfile.mkdtemp())

# %% [markdown]
# ## A folder of images
#
# One folder per class, with different classes for training and testing:
#
# ```
# photos/train/CLASS/*      photos/test/CLASS/*
# ```
#
# With images of your own, set `photos` to their folder and skip the rest of this section. Here, 60
# Latin and Greek letters are for training and 40 letters of other scripts for testing. Each letter
# is drawn in 8 to 16 typefaces.

# %%
photos = place / "photos"
letters = sources.create("glyphs")
for split, classes in (("train", 60), ("test", 40)):
    source = letters[split]
    chosen = np.random.default_rng(0).choice(len(source.class_names), classes, replace=False)
    for index in np.flatnonzero(np.isin(source.labels, chosen)):
        name = source.class_names[source.labels[index]]
        target = photos / split / name.title().replace(" ", "_")
        target.mkdir(parents=True, exist_ok=True)
        (target / f"{len(list(target.iterdir())):02}.png").write_bytes(source[index])

for split in ("train", "test"):
    print(split, len(list((photos / split).glob("*/*"))), "images")

# %%
paths = sorted((photos / "train").glob("*/00.png"))[:16]
figure, axes = plt.subplots(2, 8, figsize=(6, 1.6), dpi=72)
for axis, path in zip(axes.flat, paths, strict=True):
    axis.imshow(Image.open(path), cmap="gray")
    axis.axis("off")
plt.show()

# %% [markdown]
# ## Train
#
# `configs/folder.py` has a configuration for any folder of images. Its variant `ps` is the loss
# Norm-SoftMax with Proxy Synthesis. The settings below suit small images and a CPU; the page "Your
# own images" of the documentation has those for photographs, such as `model.backbone="resnet50"`
# with pretrained weights.

# %%
config = folder.get_config("ps")
config.update_from_flattened_dict(
    {
        "data.root": str(photos),
        "data.image_size": 32,
        "data.resize": 32,
        "data.num_workers": 0,  # Decoding small images takes less time than starting workers.
        "data.augmentation.crop_scale": (0.8, 1.0),
        "data.augmentation.flip": False,  # Letters are not mirror-invariant.
        "model.backbone": "conv4",
        "model.dim": 64,
        "epochs": 12,
        "evaluation.every_epochs": 4,
    }
)
run = place / "run"
result = dml_jax.train(config, run)

# %% [markdown]
# If the run is interrupted, the same call resumes it. R@1 is the fraction of test images whose
# nearest neighbour belongs to the same class, RP the precision of the first R neighbours, where R
# is the number of other images of the class, and MAP@R also counts their order. For comparison,
# the pixels alone:

# %%
print("network:", retrieval.summary(result["last"]))

saved = embedding_files.load_embeddings(run / "embeddings.npz")
pixels = [255 - np.asarray(Image.open(photos / name), np.float32).ravel() for name in saved.names]
print("pixels: ", retrieval.summary(retrieval.evaluate(np.stack(pixels), saved.labels)))

# %% [markdown]
# ## Search
#
# `dml_jax.load` loads the network of a run. It embeds paths, Pillow images or pixels, and searches
# among the saved embeddings of the test images, or in any array of embeddings. Each row shows a
# query and its five nearest neighbours, without the query itself. A red title is a neighbour of
# another class.

# %%
model = dml_jax.load(run, checkpoint="best_map")
queries = sorted((photos / "test").glob("*/03.png"))[::10]
found = model.search(queries, run / "embeddings.npz", k=6)

figure, axes = plt.subplots(len(queries), 6, figsize=(5, 0.95 * len(queries)), dpi=72)
for row, query, names, similarities in zip(
    axes, queries, found.names, found.similarities, strict=True
):
    own = str(query.relative_to(photos))
    others = [pair for pair in zip(names, similarities, strict=True) if pair[0] != own]
    for axis, (name, similarity) in zip(row, [(own, None), *others], strict=False):
        axis.imshow(Image.open(photos / name), cmap="gray")
        right = Path(name).parent == Path(own).parent
        title = "query" if similarity is None else f"{similarity:.2f}"
        axis.set_title(title, size=8, color="black" if right else "red")
    for axis in row:
        axis.axis("off")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## Export
#
# An export has the network from pixels to embeddings, its weights and a model card. JAX alone
# loads it, and so does `dml_jax.load`:

# %%
export.write(run, place / "export", "best_map")
print(sorted(path.name for path in (place / "export").iterdir()))

exported = dml_jax.load(place / "export")
print(np.allclose(exported.embed(queries), model.embed(queries), rtol=1e-4, atol=1e-4))
