"""Small copies of the public data sets in their published directory layouts."""

import io
import itertools
import struct
from pathlib import Path

import numpy as np
import scipy.io
import tensorflow_datasets as tfds
from PIL import Image
from tensorflow_datasets.core.dataset_info import DatasetIdentity
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from tests.helpers import hub

CARS = ("Acura TL Sedan 2012", "Acura Integra 2001", "smart fortwo 2012", "Volvo 240 1993")
"""The official order differs from that of the names; its halves are the same."""
CARS_COUNTS = {"train": (2, 6), "test": (2, 6)}


def jpeg(number, mode="RGB"):
    """Returns an encoded image that depends on the number."""
    pixels = np.random.default_rng(number).integers(0, 256, (9, 12, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, "JPEG" if mode == "RGB" else "PNG")
    return file.getvalue()


def put(path, data):
    """Writes a file and creates its parent directories."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def _cells(names):
    return np.array(names, object)


def _structs(rows):
    fields = [(field, object) for field in rows[0]]
    return np.array([tuple(row.values()) for row in rows], fields)


def cars196_annos(root: Path) -> Path:
    """Writes `cars_annos.mat` and `car_ims/`, with three images per class in mixed order."""
    rows = []
    for number in range(12):
        name, label = f"car_ims/{number + 1:06}.jpg", (number * 5 + 3) % 4 + 1
        put(root / name, jpeg(number))
        row = {"relative_im_path": name, "bbox_x1": 1, "class": np.uint8(label), "test": number % 2}
        rows.append(row)
    contents = {"annotations": _structs(rows), "class_names": _cells(CARS)}
    scipy.io.savemat(root / "cars_annos.mat", contents)
    return root


def cars196_devkit(root: Path, labelled=True) -> Path:
    """Writes `cars_train/cars_train/`, `cars_test/cars_test/` and the devkit, as on Kaggle."""
    for split, first, more in (("train", 0, ""), ("test", 100, "_withlabels")):
        rows = []
        for number in range(1, 7):
            name = f"{number:05}.jpg"
            put(root / f"cars_{split}/cars_{split}/{name}", jpeg(first + number))
            rows.append({"bbox_x1": 1, "class": np.uint8(number % 4 + 1), "fname": name})
        if split == "test":  # Training has 2 3 4 1 2 3; 4 1 2 3 4 1 makes three of each.
            for number, row in enumerate(rows, 3):
                row["class"] = np.uint8(number % 4 + 1)
        if labelled or split == "train":
            path = root / f"car_devkit/devkit/cars_{split}_annos{more}.mat"
            path.parent.mkdir(parents=True, exist_ok=True)
            scipy.io.savemat(path, {"annotations": _structs(rows)})
    scipy.io.savemat(root / "car_devkit/devkit/cars_meta.mat", {"class_names": _cells(CARS)})
    return root


def cars196_tree(root: Path) -> Path:
    """Writes `car_data/train/CLASS/*` and `car_data/test/CLASS/*`, a classification split."""
    for label, name in enumerate(CARS):
        for number in range(3):
            split = "test" if number == 2 else "train"
            put(root / f"car_data/{split}/{name}/{number}.jpg", jpeg(10 * label + number))
    return root


def cars196_numbers(root: Path) -> Path:
    """Writes `train/CLASS/*` and `test/CLASS/*`, each with all classes, named by numbers."""
    for number, split in itertools.product((1, 2, 9, 10), ("train", "test")):
        for i in range(2 if split == "train" else 1):
            put(root / f"{split}/{number}/{i}.jpg", jpeg(10 * number + i + 5 * (split == "test")))
    return root


def cars196_prepared(root: Path) -> Path:
    """Writes `carDB/train/1...` and `carDB/test/...196`, as the official programs do."""
    for label, number in enumerate((1, 98, 99, 196)):
        for i in range(3):
            split = "train" if number < 99 else "test"
            put(root / f"carDB/{split}/{number}/{i}.jpg", jpeg(10 * label + i))
    return root


def cars196_tfds(root: Path, file_format="tfrecord") -> Path:
    """Writes a copy by TensorFlow Datasets, in `cars196/2.1.0`."""
    directory = root / "cars196/2.1.0"
    splits = {
        "train": [(jpeg(i), i % 4, f"{i:05}") for i in range(8)],
        "test": [(jpeg(10 + i), i % 4, f"{i:05}") for i in range(4)],
    }
    tfds_copy(directory, "cars196", CARS, splits, file_format)
    return root


def tfds_copy(directory: Path, name: str, classes, splits, file_format: str) -> None:
    """Writes a TFDS data set.

    Args:
        directory: the directory to create.
        name: name of the data set.
        classes: class names, or their number.
        splits: rows (image, label, id) by split.
        file_format: "array_record" or "tfrecord".
    """
    directory.mkdir(parents=True)
    options = {"num_classes": classes} if isinstance(classes, int) else {"names": classes}
    label = tfds.features.ClassLabel(**options)
    info = tfds.core.DatasetInfo(
        builder=DatasetIdentity(name, tfds.core.Version("2.1.0"), str(directory), "somewhere"),
        features=tfds.features.FeaturesDict(
            {
                "bbox": tfds.features.BBoxFeature(),
                "id": tfds.features.Text(),
                "image": tfds.features.Image(),
                "label": label,
            }
        ),
    )
    box = tfds.features.BBox(0.0, 0.0, 1.0, 1.0)
    examples = {
        split: [{"image": i, "label": k, "id": n, "bbox": box} for i, k, n in rows]
        for split, rows in splits.items()
    }
    if file_format == "array_record":
        writer = tfds.core.SequentialWriter(info, 5, file_format=file_format)
        writer.initialize_splits(list(splits))
        writer.add_examples(examples)
        writer.close_all()
        return
    # TFDS cannot write TFRecords without TensorFlow.
    serializer = ExampleSerializer(info.features.get_serialized_info())
    infos = []
    for split, rows in examples.items():
        template = tfds.core.ShardedFileTemplate(
            dataset_name=name, data_dir=directory, split=split, filetype_suffix="tfrecord"
        )
        shards = [rows[start : start + 5] for start in range(0, len(rows), 5)]
        for number, shard in enumerate(shards):
            path = template.sharded_filepath(shard_index=number, num_shards=len(shards))
            with open(path, "wb") as file:
                for row in shard:
                    data = serializer.serialize_example(info.features.encode_example(row))
                    file.write(struct.pack("<QI", len(data), 0) + data + struct.pack("<I", 0))
        infos.append(
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=[len(shard) for shard in shards],
                num_bytes=0,
                filename_template=template,
            )
        )
    info.set_file_format("tfrecord")
    info.set_splits(tfds.core.splits.SplitDict(infos))
    info.write_to_directory(directory)


def cub200(root: Path) -> Path:
    """Writes `CUB_200_2011/`, with three images per class, which are not sorted by class."""
    top = root / "CUB_200_2011"
    classes = [f"{k:03}.Bird_{k}" for k in range(1, 5)]
    images, labels = [], []
    for number in range(12):
        label = (number + 2) % 4
        name = f"{classes[label]}/Bird_{number}.jpg"
        put(top / "images" / name, jpeg(number))
        images.append(f"{number + 1} {name}\n")
        labels.append(f"{number + 1} {label + 1}\n")
    put(top / "images.txt", "".join(images))
    put(top / "image_class_labels.txt", "".join(labels))
    put(top / "classes.txt", "".join(f"{k} {name}\n" for k, name in enumerate(classes, 1)))
    put(top / "train_test_split.txt", "".join(f"{i} {i % 2}\n" for i in range(1, 13)))
    put(root / "attributes.txt", "1 has_bill_shape::curved\n")
    return root


CUB_COUNTS = {"train": (2, 6), "test": (2, 6)}


def sop(root: Path) -> Path:
    """Writes `Stanford_Online_Products/`, 12 classes of two images, 11 of them for training."""
    top = root / "Stanford_Online_Products"
    tables = {"train": [], "test": []}
    for number in range(24):
        class_id = number // 2 + 1
        name = f"chair_final/{1110 + class_id}_{number % 2}.JPG"
        put(top / name, jpeg(number))
        tables["train" if class_id <= 11 else "test"].append(f"{number + 1} {class_id} 3 {name}\n")
    for split, lines in tables.items():
        put(top / f"Ebay_{split}.txt", "image_id class_id super_class_id path\n" + "".join(lines))
    return root


SOP_COUNTS = {"train": (11, 22), "test": (1, 2)}


def inshop(root: Path) -> Path:
    """Writes `Eval/list_eval_partition.txt` and `Img/img/`; items 3 and 4 are for testing."""
    rows = []
    for item in (4, 2, 3, 1):
        for view in range(3):
            split = "train" if item < 3 else "query" if view == 0 else "gallery"
            name = f"img/WOMEN/Dresses/id_{item:08}/0{view}_1_front.jpg"
            put(root / "Img" / name, jpeg(10 * item + view))
            rows.append(f"{name}    id_{item:08} {split}\n")
    header = f"{len(rows)}\nimage_name item_id evaluation_status\n"
    put(root / "Eval/list_eval_partition.txt", header + "".join(rows))
    return root


INSHOP_COUNTS = {"train": (2, 6), "test": (2, 2), "gallery": (2, 4)}


def omniglot(root: Path) -> Path:
    """Writes `images_background_small1/` and `..2/`, which share the alphabet Korean."""
    for small, alphabets in (("1", {"Korean": 2, "Latin": 3}), ("2", {"Greek": 2, "Korean": 2})):
        for alphabet, characters in alphabets.items():
            for character in range(1, characters + 1):
                for number in range(1, 3):
                    directory = f"images_background_small{small}/{alphabet}/character{character:02}"
                    put(root / directory / f"0{character}_{number:02}.png", jpeg(number, "1"))
    return root


OMNIGLOT_COUNTS = {"train": (5, 10), "test": (2, 4)}


def grocery(root: Path) -> Path:
    """Writes `dataset/` with its lists; numbers and names of the classes have different orders."""
    names = ("Pear", "Apple", "Zucchini", "Banana", "Leek")
    header = "Class Name (str),Class ID (int),Coarse Class Name (str),Coarse Class ID (int),a,b\n"
    rows = [
        f"{name},{number},Fruit,{number // 2},/i.jpg,/d.txt\n" for number, name in enumerate(names)
    ]
    put(root / "G-main/dataset/classes.csv", header + "".join(rows))
    for part, count in (("train", 2), ("val", 1), ("test", 1)):
        lines = []
        for number in range(len(names)):
            for i in range(count):
                # The name of the folder does not decide.
                name = f"{part}/Fruit/{names[0]}/{number}_{i:03}.jpg"
                put(root / "G-main/dataset" / name, jpeg(10 * number + i + 5 * len(part)))
                lines.append(f"{name}, {number}, {number // 2}\n")
        put(root / f"G-main/dataset/{part}.txt", "".join(lines))
    return root


GROCERY_COUNTS = {"train": (2, 8), "test": (3, 12)}


def folder(root: Path) -> Path:
    """Writes `train/CLASS/*` and `test/CLASS/*`."""
    for number, name in enumerate(("train/b/1", "train/b/2", "train/a/1", "test/c/1", "test/c/2")):
        put(root / f"{name}.jpg", jpeg(number))
    return root


FOLDER_COUNTS = {"train": (2, 3), "test": (1, 2)}


# Copies on the Hugging Face hub, with the columns that their cards state.


def cars196_hub(root: Path) -> Path:
    """Writes `data/train-*` and `data/test-*` with `image` and a numbered `label`.

    As tanganke/stanford_cars. The order here is that of the names.
    """
    for number, name in enumerate(("train-00000-of-00002", "train-00001-of-00002", "test-0")):
        columns = {
            "image": [jpeg(10 * number + i) for i in range(4)],
            "label": [(i + number) % 4 for i in range(4)],
        }
        classes = {"label": sorted(CARS)}
        hub.write_parquet(root / f"data/{name}.parquet", columns, classes=classes)
    return root


def cub200_hub(root: Path) -> Path:
    """Writes `image`, `label` and `bbox`, as bentrevett/caltech-ucsd-birds-200-2011.

    The files have the names that the hub's converter gives them.
    """
    classes = {"label": [f"{k:03}.Bird_{k}" for k in range(1, 5)]}
    for number, split in enumerate(("train", "test")):
        columns = {
            "image": [jpeg(10 * number + i) for i in range(6)],
            "label": [0, 0, 1, 2, 3, 3] if split == "train" else [0, 1, 1, 2, 2, 3],
            "bbox": [[1.0, 2.0, 5.0, 6.0]] * 6,
        }
        hub.write_parquet(root / f"default/{split}/0000.parquet", columns, classes=classes)
    return root


def cub200_hub_numbers(root: Path) -> Path:
    """Writes `label` as plain numbers, a mask and more, as dpdl-benchmark/caltech_birds2011."""
    labels = [11, 2, 10, 9] * 3
    columns = {
        "image": [jpeg(i) for i in range(12)],
        "image/filename": [f"{i}.jpg" for i in range(12)],
        "label": labels,
        "label_name": [f"Bird_{k}" for k in labels],
        "segmentation_mask": [jpeg(i) for i in range(12)],
    }
    hub.write_parquet(root / "data/train-00000-of-00001.parquet", columns)
    return root


def sop_hub(root: Path) -> Path:
    """Writes `image`, `item_id` and `image_path`, as nyris/stanford-online-products-v1."""
    for split, items in (("train", range(1, 12)), ("test", (12,))):
        pairs = [(item, view) for item in items for view in range(2)]
        columns = {
            "image": [jpeg(2 * item - 2 + view) for item, view in pairs],
            "item_id": [item for item, _ in pairs],
            "image_path": [f"chair_final/{item}_{view}.JPG" for item, view in pairs],
        }
        hub.write_parquet(root / f"data/{split}-00000-of-00001.parquet", columns)
    return root


def inshop_hub(root: Path) -> Path:
    """Writes `image`, `item_ID` and categories, as Marqo/deepfashion-inshop, beside the list."""
    path = inshop(root / "official") / "Eval/list_eval_partition.txt"
    names = [line.split()[0] for line in reversed(path.read_text().splitlines()[2:])]
    columns = {
        "image": [(root / "official/Img" / name).read_bytes() for name in names],
        "category1": ["women"] * len(names),
        "item_ID": [name[4:-4].replace("/", "_") for name in names],
    }
    hub.write_parquet(root / "hub/data/data-00000-of-00001.parquet", columns)
    put(root / "hub/list_eval_partition.txt", path.read_text())
    return root / "hub"
