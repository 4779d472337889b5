"""The page that goes with an exported network: what it is, what it can do, how to load it."""

import json
from collections.abc import Sequence
from typing import Any

import jax

import dml_jax
from dml_jax import retrieval

_CARD = """\
---
library_name: jax
pipeline_tag: image-feature-extraction
tags:
- deep-metric-learning
- image-retrieval
- image-feature-extraction
---

# Image embedding, {backbone}, {dim} dimensions

A network that maps an image to {dim} numbers, such that images of one class point in the same
direction, also where the class was never trained on. Images are compared by the cosine of the angle
between their embeddings.

It is a `{backbone}`, trained with {method}; the settings are at the end.

## Data

`{data}`, trained and tested on different classes:

{images}

## Scores

{scores}

The checkpoint is `{checkpoint}`, after {step} steps.

## Input and output

- Input: `uint8 [batch, {size}, {size}, 3]`, RGB, any number of images. Images that are larger or
  smaller are resized so that their shorter side is {resize} pixels (where they shrink, by averaging
  the pixels that are covered), and their centre is cropped. What else the network needs done to
  the pixels, it does itself.
- Output: `float32 [batch, {dim}]`, raw: not normalised to unit length.

## How to load it

JAX reads it by itself, on a CPU, on NVIDIA's GPUs and on TPUs: `pip install jax flatbuffers` (JAX
needs the latter to read its own files). In this folder:

```python
{snippet}
```

With dml_jax, images of any size and search among embeddings:

```
import dml_jax
model = dml_jax.load("FOLDER")
embeddings = model.embed(["photo.jpg"])
```

| file | what it is |
|---|---|
| `embed.jax_export` | the function of weights and pixels |
| `weights.safetensors` | the weights, float32, named as in dml_jax {version}'s networks |
| `config.json` | the configuration of the run |

The function was written by `jax.export` of JAX {jax_version} for {platforms}. JAX promises that its
versions of the next six months read it; the weights are good for longer.

## Licence

None is given here. dml_jax is under Apache-2.0, but what may be done with these weights depends on
the images they were trained on, and on those of the pretrained weights they started from, if any
(`model.pretrained` below). Say it here before you pass them on.

## Configuration

```json
{config}
```
"""

_SNIPPET = '''\
import json

import jax
import jax.export
import numpy as np


def read_weights(path):
    """A .safetensors file: the length of its header, the header, numbers."""
    with open(path, "rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        numbers = np.frombuffer(file.read(), np.float32)
    weights = {{}}
    for name, entry in header.items():
        if name != "__metadata__":
            start, end = entry["data_offsets"]
            weights[name] = numbers[start // 4 : end // 4].reshape(entry["shape"])
    return weights


with open("embed.jax_export", "rb") as file:
    function = jax.jit(jax.export.deserialize(bytearray(file.read())).call)
weights = jax.device_put(read_weights("weights.safetensors"))

images = np.zeros((2, {size}, {size}, 3), np.uint8)
embeddings = function(weights, images)
unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
similarities = unit @ unit.T'''


def write(
    config: dict[str, Any],
    result: dict[str, Any] | None,
    evaluated: Sequence[dict[str, Any]],
    *,
    step: int,
    checkpoint: str,
    platforms: Sequence[str],
) -> str:
    """Writes the card of an exported checkpoint.

    Args:
        config: the run's.
        result: the contents of its `result.json`; None if it has not ended.
        evaluated: the lines of its `metrics.jsonl` that have scores.
        step: of the checkpoint.
        checkpoint: its name.
        platforms: for which the function is exported.

    Returns:
        Markdown, with a header as model hubs read it.
    """
    size = config["data"]["image_size"]
    return _CARD.format(
        backbone=config["model"]["backbone"],
        dim=config["model"]["dim"],
        method=_method(config),
        data=config["data"]["name"],
        images=_images(result),
        scores=_scores(config, result, evaluated, step),
        checkpoint=checkpoint,
        step=step,
        size=size,
        resize=config["data"]["resize"],
        snippet=_SNIPPET.format(size=size),
        jax_version=jax.__version__,
        platforms=", ".join(platforms),
        version=dml_jax.__version__,
        config=json.dumps(config, indent=2),
    )


def _method(config: dict[str, Any]) -> str:
    parts = [f"the loss `{config['loss']['name']}`"]
    if config["proxy_synthesis"]["ratio"]:
        parts.append("Proxy Synthesis (arXiv 2103.15454)")
    if config["memvir"]["num_steps"]:
        parts.append("MemVir (arXiv 2103.16940)")
    return " and ".join(parts)


def _images(result: dict[str, Any] | None) -> str:
    if result is None:
        return "(The run had not ended when this was exported; it counts its images at the end.)"
    counts = [
        f"| {split} | {result['images'][split]} | {result['classes'][split]} |"
        for split in result["images"]
    ]
    return "\n".join(["| split | images | classes |", "|---|---|---|", *counts])


def _scores(
    config: dict[str, Any],
    result: dict[str, Any] | None,
    evaluated: Sequence[dict[str, Any]],
    step: int,
) -> str:
    """The scores at a step: those of the result, or those that were measured while training."""
    ended = [] if result is None else [result["last"], *result["best_of"].values()]
    for lines, held_out in ((ended, False), (evaluated, config["data"]["validation_classes"])):
        for line in lines:
            if line["step"] == step:
                return _table(line, "validation" if held_out else "test")
    return "This checkpoint was not evaluated."


def _table(line: dict[str, Any], split: str) -> str:
    scores = [f"| {name} | {100 * line[metric]:.1f} |" for name, metric in retrieval.SCORES.items()]
    caption = (
        f"Retrieval among the images of the {split} classes, in percent (R@1: the nearest image is "
        "of the query's class; RP and MAP@R: arXiv 2003.08505):"
    )
    return "\n".join([caption, "", "| score | % |", "|---|---|", *scores])
