"""What takes long, done once: every image decoded to S x S pixels.

Kept in <root>/prepared-<S>-<digest of the list of images>/ (prepared-<S>-eq-... where DICOM files
were histogram-equalised): images.npy uint8 [N,S,S], and state.npy int8 [N], 1 where a row is ready.
A preparation that was killed goes on where it stopped; unusable images are tried again at the next
load. triplets.py keeps what it read of the reports in the same folder.
"""
import contextlib
import os
import shutil
from functools import partial

import numpy as np
from torch.utils.data import DataLoader
from tqdm import tqdm

from cli import InputError
from formats.images import read_image, trouble


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


@contextlib.contextmanager
def new_folder(path):
    """Gives the name of a draft to fill. Of two processes that make the same folder the first one
    renames its draft, and both take that."""
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        yield draft
        with contextlib.suppress(OSError):
            draft.rename(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def decode(root, size, equalize, item):
    """uint8 [S,S], or None if the file cannot be used."""
    try:
        return read_image(os.path.join(root, item.path), size, equalize)
    except Exception:  # whatever a decoder makes of a damaged file: it must not end the run
        return None


def write_at(path, offset, data):
    """Through a file, not through a map, where a full disk would kill the process."""
    with open(path, "r+b", buffering=0) as file:
        file.seek(offset)
        file.write(data)


def prepare_images(root, items, folder, size, equalize, workers, again=False):
    """Decodes what is not ready -> (images uint8 [N,S,S] memory-mapped, {row: why not usable})."""
    if not folder.exists():
        with new_folder(folder) as draft:
            draft.mkdir(parents=True)
            shape = len(items), size, size
            np.lib.format.open_memmap(draft / "images.npy", "w+", np.uint8, shape)
            np.save(draft / "state.npy", np.zeros(len(items), np.int8))
    images, unusable = np.load(folder / "images.npy", mmap_mode="r"), {}
    state = np.load(folder / "state.npy", mmap_mode="r")
    rows = range(len(items)) if again else np.flatnonzero(state != 1).tolist()
    decoded = in_workers(partial(decode, root, size, equalize), [items[row] for row in rows],
                         workers, "images")
    for row, pixels in zip(rows, decoded):  # where none is usable the folder may be read-only
        if pixels is None:
            unusable[row] = trouble(os.path.join(root, items[row].path))
        else:
            write_at(folder / "images.npy", images.offset + row * size * size, pixels.tobytes())
        if state[row] != (pixels is not None):
            write_at(folder / "state.npy", state.offset + row, bytes([pixels is not None]))
    return images, unusable
