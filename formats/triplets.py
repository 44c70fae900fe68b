"""Where triplets come from: the rules on a report's text, RadGraph's JSON, the published matrix.

A source gives the triplets of an Item, None where it has no report; `key` names what they are from.
"""
import json
import os
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cli import InputError
from reports import extract_triplets, rules_key
from text import ANATOMIES, PATHOLOGIES, Triplet, radgraph_triplets, read_radgraph


class Rules:
    """The rules of reports.py on the report's text."""

    def __init__(self, root):
        self.root, self.key = root, rules_key()

    def __call__(self, item):
        note, path = item.note, Path(self.root, item.report)
        if path.is_file():
            note = path.read_text("utf-8", "replace")
        return extract_triplets(note, buckets=False) if note.strip() else None


class RadGraphFile:
    """Triplets from a RadGraph .json, found by the name of the report."""

    def __init__(self, path):
        self.key = f"{path} {os.path.getmtime(path)}"
        self.triplets = {Path(key).stem: radgraph_triplets(graph, buckets=False)
                         for key, graph in tqdm(read_radgraph(path), desc="RadGraph")}

    def __call__(self, item):
        return self.triplets.get(Path(item.report).stem)


class PublishedMatrix:
    """Triplets from the published matrix (6.75 GB, memory-mapped) and the .json files beside it,
    whose keys are paths on the authors' disks: only the file name counts."""

    def __init__(self, folder):
        path, self.rows = Path(folder, "landmark_observation_adj_mtx.npy"), {}
        self.key = f"{path} {os.path.getmtime(path)}"
        self.matrix = np.load(path, mmap_mode="r")                              # [reports,n,m]
        for name in Path(folder).glob("*.json"):
            for key, value in json.loads(name.read_text()).items():
                if isinstance(value, dict):  # else a book of prompts that lies there too
                    self.rows[Path(key).stem] = int(value["labels_id"])
        if self.matrix.shape[1:] != (len(ANATOMIES), len(PATHOLOGIES)) or not self.rows:
            raise ValueError(f"found {len(self.rows)} images and a matrix {self.matrix.shape}")

    def __call__(self, item):
        if item.id not in self.rows:
            return None
        matrix = self.matrix[self.rows[item.id]]                                # [n,m]
        return [Triplet(PATHOLOGIES[j], ANATOMIES[i], int(matrix[i, j]))
                for i, j in np.argwhere((matrix == 0) | (matrix == 1))]


def triplet_source(source, root):
    """--triplets: "rules", a RadGraph .json, or the folder of the published matrix."""
    if source == "rules":
        return Rules(root)
    try:
        return PublishedMatrix(source) if os.path.isdir(source) else RadGraphFile(source)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"--triplets {source}: neither a RadGraph .json nor the folder of the "
                         f"published matrix and train.json ({error})") from None
