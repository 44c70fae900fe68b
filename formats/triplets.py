"""Triplets of reports: by the rules from their text, or from RadGraph's JSON or the published
matrix. They are kept beside the prepared images.
"""
import hashlib
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from cli import InputError, atomic
from formats.prepare import in_workers
from reports import extract_triplets, rules_key
from text import ANATOMIES, PATHOLOGIES, radgraph_triplets, read_radgraph


def definite(triplets):
    """Sorted [(pathology, anatomy, 1 or 0)], without what is in doubt."""
    return sorted({t[:3] for t in triplets if t.existence >= 0})


def read_report(root, item):
    path = Path(root, item.report)
    text = path.read_text("utf-8", "replace") if path.is_file() else item.note
    return definite(extract_triplets(text, buckets=False)) if text.strip() else None


def key_of(items, source):
    """A text that changes where the triplets may."""
    if source == "rules":
        return "\n".join([rules_key(), *[item.note for item in items]])
    try:
        return f"{source} {os.path.getmtime(source)}"
    except OSError as error:
        raise InputError(f"--triplets {source}: {error.strerror}") from None


def read_reports(root, items, folder, source, workers, again=False):
    """{item id: its `definite` triplets}, nothing or None where there is no report. source: rules,
    a RadGraph file, or the folder of the published matrix and train.json."""
    digest = hashlib.sha256(key_of(items, source).encode()).hexdigest()[:12]
    path, found, added = folder / f"triplets-{digest}.json", {}, {}
    if path.exists() and not again:
        found = json.loads(path.read_text())
    if source == "rules":  # also reports that were added since
        unread = [item for item in items if found.get(item.id) is None
                  and (item.note.strip() or os.path.isfile(os.path.join(root, item.report)))]
        read = in_workers(partial(read_report, root), unread, workers, "reports")
        added = {item.id: triplets for item, triplets in zip(unread, read) if triplets is not None}
    elif not found:
        added = look_up(items, source)
    if added:
        found |= added
        with atomic(path) as draft:
            draft.write_text(json.dumps(found))
    return found


def look_up(items, source):
    """{item id: triplets} of RadGraph or of the published matrix."""
    try:
        if os.path.isdir(source):
            return read_matrix(items, Path(source))
        graphs = tqdm(read_radgraph(source), "RadGraph")
        found = {Path(key).stem: definite(radgraph_triplets(graph, False)) for key, graph in graphs}
        return {item.id: found.get(Path(item.report).stem) for item in items}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"--triplets {source}: neither a RadGraph .json nor the folder of the "
                         f"published matrix and train.json ({error})") from None


def read_matrix(items, folder):
    """The matrix [reports,n,m] is memory-mapped: 6.75 GB. Its rows are in .json files beside it,
    whose keys are paths on the authors' disks: only file names count."""
    matrix, rows = np.load(folder / "landmark_observation_adj_mtx.npy", mmap_mode="r"), {}
    for path in folder.glob("*.json"):
        for key, value in json.loads(path.read_text()).items():
            if isinstance(value, dict):  # else a book of prompts that lies there too
                rows[Path(key).stem] = int(value["labels_id"])
    if matrix.shape[1:] != (len(ANATOMIES), len(PATHOLOGIES)) or not rows:
        raise ValueError(f"found {len(rows)} images and a matrix {matrix.shape}")
    found = {}
    for name in rows.keys() & {item.id for item in items}:
        existence = matrix[rows[name]]                                          # [n,m]
        cells = np.argwhere((existence == 0) | (existence == 1))                # [.,2]
        found[name] = sorted((PATHOLOGIES[j], ANATOMIES[i], int(existence[i, j])) for i, j in cells)
    return found
