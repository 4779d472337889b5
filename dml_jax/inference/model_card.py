"""The model card of an exported network: data, scores, input, output and how to load it."""

import json
from collections.abc import Sequence
from typing import Any

import huggingface_hub
import jax

import dml_jax
from dml_jax import retrieval
from dml_jax._utils import hub
from dml_jax.data.config import test_side
from dml_jax.evaluation.thresholds import Threshold

_TASK = "image-feature-extraction"
UNKNOWN = "unknown"
"""Stands for a licence that is not stated, also on the hub."""

_CARD = """\
---
{metadata}
---

# {title}

A network that maps an image to a vector of {dim} dimensions. Images of one class have similar
directions, also for classes that it was not trained on. Images are compared by the cosine
similarity of their embeddings.

It is a `{backbone}`, trained with {method}; the settings are at the end.

## Data

`{data}`, trained and tested on different classes:

{images}

## Scores

{scores}

The checkpoint is `{checkpoint}`, after {step} steps.
{threshold}
## Input and output

- Input: `uint8 [batch, {size}, {size}, 3]`, RGB, with any batch size. Resize images of another size
  so that their shorter side is {resize} pixels (by area averaging if they shrink) and crop the
  centre. The network normalises the pixels itself.
- Output: `float32 [batch, {dim}]`, raw: not normalised to unit length.

## How to load it

JAX loads it without dml_jax, on CPUs, NVIDIA GPUs and TPUs: `pip install jax flatbuffers` (JAX
needs the latter to read exported functions). In this folder:

```python
{snippet}
```

dml_jax embeds images of any size, and searches among embeddings:

```
import dml_jax
model = dml_jax.load("FOLDER")   # or "hf:OWNER/NAME", if it is on the Hugging Face hub
embeddings = model.embed(["photo.jpg"])
```

| file | contents |
|---|---|
| `embed.jax_export` | the function of weights and pixels |
| `weights.safetensors` | the weights, float32, named as in the networks of dml_jax {version} |
| `config.json` | the configuration of the run |

The function was written by `jax.export` of JAX {jax_version} for {platforms}. JAX guarantees that
its releases of the next six months read it; the weights have no such limit.

## Licence

{licence} dml_jax is under Apache-2.0, but the terms of these weights depend on the images they
were trained on, and on those of the pretrained weights they started from, if any
(`model.pretrained` below).

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
    """Reads a .safetensors file: the length of the header, the header, the numbers."""
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
    threshold: Threshold | None = None,
    licence: str = UNKNOWN,
) -> str:
    """Returns the model card of an exported checkpoint.

    Args:
        config: configuration of the run.
        result: contents of its `result.json`; None if the run is not complete.
        evaluated: the lines of its `metrics.jsonl` that have scores.
        step: step of the checkpoint.
        checkpoint: name of the checkpoint.
        platforms: platforms of the exported function.
        threshold: the similarity below which two images are taken to be of different classes.
        licence: identifier of the licence of the weights, such as `cc-by-4.0`.

    Returns:
        Markdown, with the metadata header of the Hugging Face hub, scores included.
    """
    size, model = test_side(config["data"]), config["model"]
    title = f"Image embedding, {model['backbone']}, {model['dim']} dimensions"
    scored = _scored(config, result, evaluated, step)
    stated = f"The weights are under `{licence}`."
    if licence == UNKNOWN:
        stated = "Not stated: state the licence here and above before you distribute the weights."
    return _CARD.format(
        metadata=_metadata(config, scored, title, licence),
        title=title,
        licence=stated,
        backbone=model["backbone"],
        dim=model["dim"],
        method=_method(config),
        data=config["data"]["name"],
        images=_images(result),
        scores=_table(*scored) if scored else "This checkpoint was not evaluated.",
        checkpoint=checkpoint,
        step=step,
        threshold="" if threshold is None else _threshold(threshold),
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
    if config["mixup"]["alpha"]:
        parts.append("mixup (arXiv 1710.09412, 1806.05236)")
    if config["xbm"]["num_steps"]:
        parts.append("cross-batch memory (arXiv 1912.06798)")
    return " and ".join(parts)


def _images(result: dict[str, Any] | None) -> str:
    if result is None:
        return "(The run was not complete when this was exported; it counts its images at the end.)"
    counts = [
        f"| {split} | {result['images'][split]} | {result['classes'][split]} |"
        for split in result["images"]
    ]
    return "\n".join(["| split | images | classes |", "|---|---|---|", *counts])


def _scored(
    config: dict[str, Any],
    result: dict[str, Any] | None,
    evaluated: Sequence[dict[str, Any]],
    step: int,
) -> tuple[dict[str, Any], str] | None:
    """Returns the scores at a step and their split, from the result or evaluations in training."""
    final = [] if result is None else [result["last"], *result["best_of"].values()]
    for lines, is_held_out in ((final, False), (evaluated, config["data"]["validation_classes"])):
        for line in lines:
            if line["step"] == step:
                return line, "validation" if is_held_out else "test"
    return None


def _metadata(
    config: dict[str, Any], scored: tuple[dict[str, Any], str] | None, title: str, licence: str
) -> str:
    """Returns the metadata header in YAML; the scores are a `model-index`, as fractions of 1."""
    name, pretrained = config["data"]["name"], hub.parse(config["model"]["pretrained"])
    results = [
        huggingface_hub.EvalResult(
            task_type=_TASK,
            task_name="Image retrieval, classes that were not trained on",
            dataset_type=name,
            dataset_name=name,
            dataset_split=scored[1],
            metric_type=metric,
            metric_name=shown,
            metric_value=scored[0][metric],
        )
        for shown, metric in retrieval.SCORES.items()
        if scored is not None
    ]
    return huggingface_hub.ModelCardData(
        model_name=title,
        base_model=pretrained.repo_id if pretrained else None,
        eval_results=results or None,
        library_name="jax",
        license=licence,
        pipeline_tag=_TASK,
        tags=["deep-metric-learning", "image-retrieval", "dml_jax", _TASK],
    ).to_yaml()


def _threshold(chosen: Threshold) -> str:
    text = (
        f"\nTwo images whose cosine similarity is below {chosen.threshold:.4f} are taken to be of "
        "different\nclasses (`threshold.json`)."
    )
    if chosen.fmr is not None and chosen.fnmr is not None:
        text += (
            f" Among the test images this accepts a share of {chosen.fmr:g} of the pairs of\n"
            f"different classes and rejects {100 * chosen.fnmr:.1f} % of the pairs of one class."
        )
    return text + "\n"


def _table(line: dict[str, Any], split: str) -> str:
    scores = [f"| {name} | {100 * line[metric]:.1f} |" for name, metric in retrieval.SCORES.items()]
    caption = (
        f"Retrieval among the images of the {split} classes, in percent (R@1: the nearest image "
        "has the class of the query; RP and MAP@R: arXiv 2003.08505):"
    )
    return "\n".join([caption, "", "| score | % |", "|---|---|", *scores])
