"""From a folder to checked Items: which format reads it, where it lies, its splits and labels.

    from formats.items import FORMATS, read_items
    names, items, problems = read_items("nih", "data/nih", "all", None)
"""
import hashlib
import os
from pathlib import Path

import numpy as np

from cli import InputError
from formats import (BLANK, UNKNOWN, chexpert, covid_chestxray, covidx, find, mimic, nih, openi,
                     roco, rsna, siim)

FORMATS = {"synthetic": mimic, "mimic": mimic, "nih": nih, "rsna": rsna, "siim": siim,
           "covidx": covidx, "chexpert": chexpert, "openi": openi,
           "covid-chestxray": covid_chestxray, "roco": roco}


def find_root(dataset, root):
    """`root`, or the one folder in it that an archive unpacked into, by the label file it holds."""
    source, root = FORMATS[dataset], Path(root)
    below = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    for folder in [root, *below]:
        if find(folder, *source.FILES):
            return str(folder)
    layout = "mimic" if dataset == "synthetic" else dataset
    raise InputError(f"no {source.NAME} data at {root}: looked for {' or '.join(source.FILES)} "
                     f"there and one folder down. Get it: {source.GET}; or rehearse: python "
                     f"phantom.py --layout {layout} --root {root} --count 200; or take the "
                     "synthetic data: python train.py --data synthetic")


def leads_out(path):
    """Whether a path of a label file leaves the root; masks may lie in one folder beside it."""
    parts = path.removeprefix(f"../{covid_chestxray.MASKS}/").replace("\\", "/").split("/")
    return os.path.isabs(path) or ".." in parts


def read_items(dataset, root, views, labels):
    """(label names, items, problems) of a data set as downloaded; no image is opened here."""
    try:
        names, items, problems = FORMATS[dataset].read(root, views, labels)
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise InputError(f"{root}: a label file holds what it should not ({error!r}); download it "
                         "again") from None
    kept, seen = [], set()
    for item in items:
        # ids and paths come from csv files of strangers: none may lead out of the data root
        paths = [item.path, item.report] + [m.source for m in item.masks or () if m.kind != "rle"]
        if any(leads_out(path) for path in paths):
            problems.append(("outside the root", item.path))
        elif item.id in seen:
            problems.append(("duplicate row", item.id))
        else:
            seen.add(item.id)
            kept.append(item)
    if not kept:
        raise InputError(f"{root}: label files without one usable row; {len(problems)} problems, "
                         f"the first: {problems[:1]}")
    return names, kept, problems


GLORIA = {"Atelectasis": 1, "Edema": 1, "Pleural Effusion": 1, "Cardiomegaly": 0,
          "Consolidation": 0}  # what GLoRIA and MGCA make of an uncertain label


def settle_labels(items, names, uncertain):
    """int8 [N,L] in 1, 0, -1 unknown. Blank counts as absent, as is customary."""
    labels = np.array([item.labels for item in items], np.int8).reshape(len(items), len(names))
    doubtful, blank = labels == -1, labels == BLANK
    labels[labels == UNKNOWN] = -1
    labels[blank] = 0
    for column, name in enumerate(names):
        value = {"ignore": -1, "zeros": 0, "ones": 1, "gloria": GLORIA.get(name, -1)}[uncertain]
        labels[doubtful[:, column], column] = value
    return labels


def draw_split(patient, train, validate):
    """train, validate or test for a patient, from a hash of the id alone: everybody gets the same,
    whatever part of the data set they have and in whatever order."""
    digest = hashlib.sha256(f"0/{patient}".encode()).digest()
    u = int.from_bytes(digest[:8], "big") / 2**64
    if u < train:
        return "train"
    return "validate" if u < train + validate else "test"


def settle_splits(items, shares):
    """(array of each item's split, how it was made): the publisher's where there is one, else by
    patient. A missing validation part is carved out of the publisher's training patients."""
    train, validate = shares
    given = {item.split for item in items}
    if given == {""}:
        splits = [draw_split(item.patient, train, validate) for item in items]
        source = f"made by patient, {train:.0%} train, {validate:.0%} validate"
    elif "validate" in given:
        splits, source = [item.split for item in items], "the publisher's"
    else:
        share = validate / (train + validate)
        splits = [draw_split(item.patient, 1 - share, share) if item.split == "train"
                  else item.split for item in items]
        source = f"the publisher's, and {share:.0%} of its training patients to validate"
    return np.array(splits, dtype="<U8"), source
