"""Where triplets come from: the rules on a report's text, RadGraph's JSON, the published matrix.
Each `from_` function gives the triplets of an Item, None where it has no report.
"""
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cli import InputError
from reports import extract_triplets, rules_key
from text import ANATOMIES, PATHOLOGIES, Triplet, radgraph_triplets, read_radgraph


def triplet_source(source, root):
    """--triplets -> (function of an Item, text that changes where its triplets may)."""
    if source == "rules":
        return partial(from_rules, root), rules_key()
    try:
        if os.path.isdir(source):
            source = os.path.join(source, "landmark_observation_adj_mtx.npy")
            triplets_of = partial(from_matrix, *read_matrix(source))
        else:
            graphs = tqdm(read_radgraph(source), "RadGraph")
            triplets = {Path(key).stem: radgraph_triplets(graph, False) for key, graph in graphs}
            triplets_of = partial(from_radgraph, triplets)
        return triplets_of, f"{source} {os.path.getmtime(source)}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"--triplets {source}: neither a RadGraph .json nor the folder of the "
                         f"published matrix and train.json ({error})") from None


def from_rules(root, item):
    note, path = item.note, Path(root, item.report)
    if path.is_file():
        note = path.read_text("utf-8", "replace")
    return extract_triplets(note, buckets=False) if note.strip() else None


def from_radgraph(triplets, item):
    """triplets: by the name of the report's file, without its ending."""
    return triplets.get(Path(item.report).stem)


def read_matrix(path):
    """(published matrix [reports,n,m], memory-mapped: 6.75 GB; {image: its row}). The rows are in
    .json files beside it, whose keys are paths on the authors' disks: only file names count."""
    matrix, rows = np.load(path, mmap_mode="r"), {}
    for name in Path(path).parent.glob("*.json"):
        for key, value in json.loads(name.read_text()).items():
            if isinstance(value, dict):  # else a book of prompts that lies there too
                rows[Path(key).stem] = int(value["labels_id"])
    if matrix.shape[1:] != (len(ANATOMIES), len(PATHOLOGIES)) or not rows:
        raise ValueError(f"found {len(rows)} images and a matrix {matrix.shape}")
    return matrix, rows


def from_matrix(matrix, rows, item):
    if item.id not in rows:
        return None
    existence = matrix[rows[item.id]]                                           # [n,m]
    return [Triplet(PATHOLOGIES[j], ANATOMIES[i], int(existence[i, j]))
            for i, j in np.argwhere((existence == 0) | (existence == 1))]
