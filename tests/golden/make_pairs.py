"""Writes tests/golden/pairs.npz: losses of pairs, by the official code of XBM, with its memory.

git clone https://github.com/msight-tech/research-xbm && cd research-xbm
git checkout 223ecdc25f71ef1721a58bc87cc567025a32bc92
pip install torch numpy yacs
PYTHONPATH=. python .../tests/golden/make_pairs.py .../tests/golden/pairs.npz

The memory of the official code is on a GPU; here it is moved to the CPU. When it is full, it
overwrites its latest step once in each round, not its oldest one, so the steps after that compare
with the latest steps, as in the paper, by the official losses.
"""

import sys
import types

import numpy as np
import torch
from ret_benchmark.losses.contrastive_loss import ContrastiveLoss
from ret_benchmark.losses.multi_similarity_loss import MultiSimilarityLoss
from ret_benchmark.modeling.xbm import XBM

BATCH, DIM, CLASSES, STEPS, SLOTS = 12, 128, 5, 6, 4


def group(**values):
    return types.SimpleNamespace(**values)


CONFIG = group(
    LOSSES=group(
        MULTI_SIMILARITY_LOSS=group(SCALE_POS=2.0, SCALE_NEG=40.0, HARD_MINING=True),
    ),
    XBM=group(SIZE=BATCH * SLOTS),
)


def main() -> None:
    torch.Tensor.cuda = lambda self: self
    rng = np.random.default_rng(0)
    # Classes overlap, so that some pairs are hard and some are not.
    labels = np.stack([np.repeat(np.arange(BATCH // 3), 3) % CLASSES for _ in range(STEPS)])
    labels += 1  # The official memory takes a last label of 0 for an empty place.
    centres = rng.normal(size=(CLASSES + 1, DIM)) + 2.5 * rng.normal(size=DIM)
    embeddings = (0.5 * centres[labels] + rng.normal(size=(STEPS, BATCH, DIM))).astype(np.float32)
    golden = {"embeddings": embeddings, "labels": labels.astype(np.int32)}
    for name, loss in (
        ("contrastive", ContrastiveLoss(CONFIG)),
        ("multi_similarity", MultiSimilarityLoss(CONFIG)),
    ):
        memory, latest = XBM(CONFIG), []
        for step in range(STEPS):
            raw = torch.tensor(embeddings[step], requires_grad=True)
            rows = torch.nn.functional.normalize(raw)
            of_rows = torch.tensor(labels[step])
            latest = [*latest, (rows.detach(), of_rows)][-SLOTS:]
            memory.enqueue_dequeue(*latest[-1])
            stored = tuple(map(torch.cat, zip(*latest, strict=True)))
            if step < SLOTS:
                stored = memory.get()
            alone = loss(rows, of_rows, rows, of_rows)
            alone.backward(retain_graph=True)
            golden[f"{name}_{step}"] = alone.detach().numpy()
            golden[f"{name}_gradient"] = raw.grad.numpy().copy()
            raw.grad = None
            both = alone + loss(rows, of_rows, *stored)
            both.backward()
            golden[f"{name}_{step}_xbm"] = both.detach().numpy()
            golden[f"{name}_xbm_gradient"] = raw.grad.numpy()
    np.savez_compressed(sys.argv[1], **golden)


if __name__ == "__main__":
    main()
