"""Preparation of public data sets: download, unpack, check, convert."""

from dml_jax.data.prepare.catalogue import DATA_SETS, Counts, DataSet
from dml_jax.data.prepare.preparation import differences, prepare

__all__ = ["DATA_SETS", "Counts", "DataSet", "differences", "prepare"]
