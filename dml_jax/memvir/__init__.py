"""MemVir: embeddings and proxies of earlier steps as virtual classes.

Source: Ko, Gu and Kim, Learning with memory-based virtual classes for deep metric learning,
ICCV 2021 (arXiv 2103.16940).

The virtual classes of step t are the classes of steps t-(M+1), t-2(M+1), ..., t-N(M+1), as far as
these exist. The loss is the mean over the rows of all N+1 steps, each against the proxies of all
N+1 steps. The direct implementation computes (N+1)B x (N+1)C logits, but most of them were
computed before: of two stored steps, the newer one was once the current step while the older one
was in memory, and neither has changed since. So the memory has a log-sum-exp cache: for each stored
row, the log-sum-exp of its logits against the proxies of each stored step. A step then computes
only the current rows against all proxies and the stored rows against the current proxies,
(2N+1)BC logits, for the same value and the same gradients.

This holds for losses that sum over classes. Proxy-Anchor sums over rows for each class, so there
rows and classes exchange their roles. This module covers both with the terms of `losses.ProxyLoss`:
each anchor (a row or a class) has a log-sum-exp over candidates (classes or rows).

Every array has the layout `[anchor, block, slot, ...]`, so that all are sharded alike. Steps that
are M+1 apart share a block of the ring buffer, so a step reads one contiguous slice. A step stores
its entry in `pending`, and the next step writes it into the ring before reading: a program that
reads the ring and then writes it has to copy it.
"""

from dml_jax.memvir.loss import loss_and_update
from dml_jax.memvir.measures import Drift, classes_in_use, drift
from dml_jax.memvir.memory import (
    GROWTH,
    VIRTUAL,
    Entry,
    LogSumExpCache,
    Memory,
    MemVirConfig,
    choose,
    init,
)

__all__ = [
    "GROWTH",
    "VIRTUAL",
    "Drift",
    "Entry",
    "LogSumExpCache",
    "MemVirConfig",
    "Memory",
    "choose",
    "classes_in_use",
    "drift",
    "init",
    "loss_and_update",
]
