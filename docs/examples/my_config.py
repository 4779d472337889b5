"""Trains the parts of my_parts.py.

dml-jax train --config=my_config.py --workdir=runs/mine --config.data.root=DIR
"""

from ml_collections import ConfigDict

from dml_jax import losses
from dml_jax.training.config import default, loss_to_dict


def get_config(variant=None):
    """Returns the settings of the run."""
    config = default()
    config.update_from_flattened_dict(
        {
            "epochs": 2,
            "batch_size": 8,
            "data.name": "my_parts:csv_source",
            "data.image_size": 32,
            "data.resize": 32,
            "data.num_workers": 0,
            "model.backbone": "my_parts:PatchTransformer",
            "model.pretrained": "none",
            "model.dim": 32,
            "optimizer.learning_rate": 1e-3,
            "optimizer.schedule": "my_parts:warmup_then_constant",
            "proxy_synthesis.ratio": 1.0,
        }
    )
    config.optimizer.schedule_arguments = ConfigDict({"warmup_epochs": 1})
    loss = losses.create("my_parts:ShiftedSoftmax", threshold=0.1)
    config.loss = ConfigDict(loss_to_dict(loss))
    return config.lock()
