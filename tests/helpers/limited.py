"""scripts/train.py with a limit of DML_JAX_TEST_BYTES on data after its devices are initialised."""

import os
import resource
from pathlib import Path

from dml_jax._utils import sharding
from dml_jax.cli import command_line, train


def limited():
    mesh = make_mesh()
    lines = Path("/proc/self/status").read_text().splitlines()
    (used,) = (int(line.split()[1]) for line in lines if line.startswith("VmData:"))
    limit = 1024 * used + int(os.environ["DML_JAX_TEST_BYTES"])
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    return mesh


if __name__ == "__main__":
    make_mesh, sharding.make_mesh = sharding.make_mesh, limited
    command_line.run(train.main, embeds=True)
