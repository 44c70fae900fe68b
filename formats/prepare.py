"""What takes long, done once: every image decoded to S x S pixels, every report read.

Kept in <root>/prepared-<S>-<digest of the list of images>/ (prepared-<S>-eq-... where DICOM files
were histogram-equalised): images.npy uint8 [N,S,S] with state.npy int8 [N] (to do, ready,
unusable), and the triplets in cells-<digest>.npz. A preparation that was killed goes on where it
stopped; unusable images are tried again at the next load.
"""
import hashlib
import os
import shutil
from functools import partial

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from cli import InputError, atomic
from formats.images import read_image, trouble
from formats.triplets import triplet_source

TO_DO, READY, UNUSABLE = 0, 1, 2  # in state.npy


def apply(function, items):
    return [function(item) for item in items]


def in_workers(function, items, workers, title):
    """Yields function(item) of every item, in order, computed by `workers` processes."""
    few = len(items) < 256  # starting processes would take longer
    batches = DataLoader(items, batch_size=32, num_workers=0 if few else workers,
                         collate_fn=partial(apply, function))
    try:
        for results in tqdm(batches, title, unit_scale=32, disable=few or None):
            yield from results
    except RuntimeError as error:
        raise InputError(f"a worker died ({' '.join(str(error).split())[:80]}); if memory ran out, "
                         "run again with fewer --workers") from None


def decode(root, size, equalize, item):
    """(pixels uint8 [S,S], ""), or (None, why not)."""
    path = os.path.join(root, item.path)
    try:
        return read_image(path, size, equalize), ""
    except Exception:  # whatever a decoder makes of a damaged file: it must not end the run
        return None, trouble(path)


def prepare_images(root, items, folder, size, workers, again=False, equalize=False):
    """Decodes what is not ready yet -> (images uint8 [N,S,S] memory-mapped, state [N], reasons)."""
    if not folder.exists():
        # Under a name of its own first: of two processes one renames its folder, both take that.
        draft = folder.with_name(f"{folder.name}.{os.getpid()}")
        draft.mkdir(parents=True)
        shape = len(items), size, size
        np.lib.format.open_memmap(draft / "images.npy", "w+", np.uint8, shape)
        np.save(draft / "state.npy", np.full(len(items), TO_DO, np.int8))
        try:
            draft.rename(folder)
        except OSError:
            shutil.rmtree(draft)
    images = np.load(folder / "images.npy", mmap_mode="r")
    state, reasons = np.load(folder / "state.npy"), {}
    rows = np.arange(len(items)) if again else np.flatnonzero(state != READY)
    if not len(rows):  # nothing to write: the folder may be read-only
        return images, state, reasons
    state = np.load(folder / "state.npy", mmap_mode="r+")
    # written through a file, not through the map, where a full disk would kill the process
    with open(folder / "images.npy", "r+b", buffering=0) as file:
        some = [items[row] for row in rows]
        decoded = in_workers(partial(decode, root, size, equalize), some, workers, "images")
        for row, (pixels, reason) in zip(rows.tolist(), decoded):
            if pixels is None:
                state[row], reasons[row] = UNUSABLE, reason
            else:
                file.seek(images.offset + row * size * size)
                file.write(pixels.tobytes())
                state[row] = READY
    return images, state, reasons


def read_reports(root, items, folder, triplets, workers):
    """{"names", "start" [N+1], "cells" int32 [.,3], "read" int8 [N]} of all reports.

    Image i has the rows start[i]:start[i+1] of `cells`: (pathology, anatomy, 1 or 0), the first
    two as numbers into `names`. read: 1 if the report gave a definite triplet, 0 if none, -1 if
    there is no report.
    """
    triplets_of, key = triplet_source(triplets, root)
    digest = hashlib.sha256(key.encode())
    for item in items:
        digest.update(item.note.encode())
    path = folder / f"cells-{digest.hexdigest()[:12]}.npz"
    if path.exists():
        kept = dict(np.load(path))
        missed = [items[i].report for i in np.flatnonzero(kept["read"] < 0)]
        added = [name for name in missed if name and os.path.exists(os.path.join(root, name))]
        if triplets != "rules" or not added:
            return kept  # else reports were added since: all are read again
    numbers, cells, start, read = {}, [], [0], []
    for found in in_workers(triplets_of, items, workers, "reports"):
        definite = {t[:3] for t in found or () if t.existence >= 0}
        for pathology, anatomy, existence in sorted(definite):
            cells.append((numbers.setdefault(pathology, len(numbers)),
                          numbers.setdefault(anatomy, len(numbers)), existence))
        start.append(len(cells))
        read.append(-1 if found is None else int(len(definite) > 0))
    cells = np.array(cells, np.int32).reshape(-1, 3)
    result = {"names": np.array(list(numbers) or [""]), "start": np.array(start),
              "cells": cells, "read": np.array(read, np.int8)}
    with atomic(path) as draft, open(draft, "wb") as file:
        np.savez(file, **result)
    return result
