"""SIIM-ACR Pneumothorax, as on Kaggle (stage 1 or 2) or re-packed as PNG files.

    dicom-images-train/<study>/<series>/<ImageId>.dcm    dicom-images-test/...      stage 1
    train-rle.csv                         ImageId, EncodedPixels: a row per mask, -1 for none
    stage_2_images/<ImageId>.dcm  stage_2_train.csv                                 stage 2
    png_images/0_train_1_.png  png_masks/0_train_1_.png                             re-pack
    stage_1_train_images.csv  stage_1_test_images.csv   new_filename,ImageId,has_pneumo

An RLE is pairs: the gap since the last run, the length of this run; it goes down the columns of a
1024 x 1024 image. Several masks of an image are OR-ed. Only the re-pack has a split, which also
holds for Kaggle's files beside it; patients are unknown.
"""
import collections

import numpy as np

from formats import Item, Mask, csv_rows, paths_by_stem, skip_if_bad

FILES = ("stage_2_train.csv", "*train-rle.csv", "stage_1_train_images.csv")
GET = "https://www.kaggle.com/c/siim-acr-pneumothorax-segmentation"
SHARES, VIEWS, SIZE = (0.7, 0.15), "all", 1024  # masks are of this size
LABELS = ["Pneumothorax"]
TABLES = {"train-rle.csv": "ImageId, EncodedPixels"}


def rle_mask(rle):
    """The Mask of an RLE; ValueError unless it is pairs of numbers that stay inside the image."""
    numbers = [int(number) for number in rle.split()]
    if not numbers or len(numbers) % 2 or min(numbers) < 0 or sum(numbers) > SIZE ** 2:
        raise ValueError(rle)
    return Mask(LABELS[0], "rle", rle)


def read(root, views, labels, problems):
    paths, rles = paths_by_stem(root), collections.defaultdict(list)
    splits, packed_masks = {}, {}  # of the re-pack, by ImageId like rles
    for row in csv_rows(root, "stage_2_train.csv", "*train-rle.csv"):
        found = rles[row["ImageId"]]
        if row["EncodedPixels"] != "-1":
            found.append(row["EncodedPixels"])
    for part in ("train", "test"):
        for row in csv_rows(root, f"stage_1_{part}_images.csv"):
            name, file = row["ImageId"], row["new_filename"]
            splits[name] = part
            paths.setdefault(name, f"png_images/{file}")
            if row["has_pneumo"] == "1":
                packed_masks[name] = [Mask(LABELS[0], "file", f"png_masks/{file}")]
    for name in rles | splits:
        with skip_if_bad(problems, f"mask of {name}"):
            masks = packed_masks.get(name, [])
            if name in rles:
                masks = [rle_mask(rle) for rle in rles[name]]
            yield Item(name, paths.get(name, f"{name}.dcm"), name, splits.get(name, ""),
                       (int(bool(masks)),), masks=tuple(masks), absent=LABELS)


def encode(mask):
    """The RLE of a bool [size,size] mask, enlarged to SIZE x SIZE."""
    nearest = np.arange(SIZE) * len(mask) // SIZE
    flat = mask[nearest][:, nearest].T.reshape(-1).astype(np.int8)  # column by column
    edges = np.flatnonzero(np.diff(flat, prepend=0, append=0))      # start, end, start, end, ...
    return " ".join(map(str, np.diff(edges, prepend=0)))


def write(root, f):
    name = f"1.2.276.0.7230010.3.1.4.{f.index}"
    f.draw(f"{root}/dicom-images-train/{name}.1/{name}.2/{name}.dcm", sure=("pneumothorax", 0.2))
    rles = [encode(found.mask) for found in f.findings if found.pathology == "pneumothorax"]
    return [("train-rle.csv", name, f" {rle}") for rle in rles or ["-1"]]
