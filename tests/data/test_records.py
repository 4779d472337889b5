import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from dml_jax.data import records


@given(image=st.binary(max_size=300), name=st.text(max_size=200), label=st.integers(0, 2**40))
def test_bytes_feature_agrees_with_protobuf(image, name, label):
    features = {
        "image": tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[image])),
        "label": tf_feature_pb2.Feature(int64_list=tf_feature_pb2.Int64List(value=[label])),
        "box": tf_feature_pb2.Feature(float_list=tf_feature_pb2.FloatList(value=[0.5, 1.0])),
        "name": tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[name.encode()])),
    }
    example = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=features))
    data = example.SerializeToString()
    assert records.bytes_feature(data, "image") == image
    assert records.bytes_feature(data, "name").decode() == name
    with pytest.raises(KeyError, match="missing"):
        records.bytes_feature(data, "missing")


def test_bytes_feature_of_a_large_image():
    image = np.random.default_rng(0).bytes(3_000_000)  # Its length takes four bytes.
    values = tf_feature_pb2.BytesList(value=[image])
    feature = {"image": tf_feature_pb2.Feature(bytes_list=values)}
    example = tf_example_pb2.Example(features=tf_feature_pb2.Features(feature=feature))
    assert records.bytes_feature(example.SerializeToString(), "image") == image


def test_manifest_round_trip(tmp_path):
    split = records.Split(("a-00000", "a-00001"), (1, 0, 1), ("Käfer/1", "2", "3"))
    manifest = records.Manifest("folder", ("Käfer", "b"), {"train": split, "test": split})
    records.write_manifest(tmp_path, manifest)
    assert records.read_manifest(tmp_path) == manifest
    with pytest.raises(FileNotFoundError, match="holds no prepared data set"):
        records.read_manifest(tmp_path / records.MANIFEST)
