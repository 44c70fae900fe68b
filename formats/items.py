"""From a folder to checked Items: which format reads it, where it lies, its splits."""
import hashlib
import os
from pathlib import Path

import numpy as np

from cli import InputError
from formats import (chexpert, covid_chestxray, covidx, find, mimic, nih, openi, roco, rsna, siim)

FORMATS = {"synthetic": mimic, "mimic": mimic, "nih": nih, "rsna": rsna, "siim": siim,
           "covidx": covidx, "chexpert": chexpert, "openi": openi,
           "covid-chestxray": covid_chestxray, "roco": roco}


def find_root(dataset, root):
    """`root`, or the folder in it that an archive unpacked into, by the label file it holds."""
    source, root = FORMATS[dataset], Path(root)
    for folder in [root, *sorted(root.glob("*/"))]:
        if find(folder, *source.FILES):
            return str(folder)
    raise InputError(f"no {dataset} data at {root}: looked for {' or '.join(source.FILES)} "
                     f"there and one folder down. Get it: {source.GET}; or rehearse: python "
                     f"phantom.py --layout {dataset} --root {root} --count 200")


def read_items(dataset, root, views, labels):
    """(items, problems) of a data set as downloaded; no image is opened here."""
    kept, problems = {}, []
    try:
        items = list(FORMATS[dataset].read(root, views, labels, problems))
    except (KeyError, ValueError, TypeError, IndexError, OSError) as error:
        raise InputError(f"{root}: a label file lacks a column or is damaged ({error!r})") from None
    for item in items:
        # made of names in strangers' csv files, as the paths of reports and masks are
        if os.path.isabs(item.path) or ".." in Path(item.path).parts:
            problems.append(("outside the root", item.path))
        elif item.id in kept:
            problems.append(("duplicate row", item.id))
        else:
            kept[item.id] = item
    if not kept:
        source = " or ".join(FORMATS[dataset].FILES)
        raise InputError(f"{root}: no usable row in {source}; is it a web page, or cut off? "
                         f"{problems[:1]}")
    return list(kept.values()), problems


def draw_split(patient, train, validate):
    """train, validate or test, from a hash of the patient's id: the same for everybody, whatever
    part of the data set they have."""
    u = int(hashlib.sha256(f"0/{patient}".encode()).hexdigest()[:16], 16) / 2**64
    if u < train:
        return "train"
    return "validate" if u < train + validate else "test"


def settle_splits(items, shares):
    """(array of each item's split, how it was made): the publisher's, else by patient. What is in
    none of the publisher's parts is for training, and a missing validation part is carved out of
    the training patients."""
    train, validate = shares
    splits, source = [item.split for item in items], "the publisher's"
    if "validate" not in splits:
        if any(splits):
            validate /= train + validate  # of those that are not for testing
            train = 1 - validate
            source += f", and {validate:.0%} of its training patients to validate"
        else:
            source = f"made by patient, {train:.0%} train, {validate:.0%} validate"
        splits = [split if split == "test" else draw_split(item.patient, train, validate)
                  for item, split in zip(items, splits)]
    return np.array(splits, dtype="<U8"), source
