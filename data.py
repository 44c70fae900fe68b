"""Radiographs, labels and reports of eight data sets: read as downloaded, prepared once, batched.

    python data.py --dataset nih --root data/nih --check    # read every file, say what is wrong
    python data.py --dataset mimic --root data/mimic        # prepare, print the receipt
    python data.py --dataset synthetic                      # draws its data first; under a minute

B images, S pixels a side, n anatomies, m pathologies. The cache is <root>/prepared-<S>/ (or under
--cache-dir): images.npy uint8 [N,S,S], index.json, arrays.npz, split.csv, receipt.json. No pickle.

Differs from the released code in:
- Images are decoded and squashed to S x S once; a step then reads memory (their loader decodes and
  transforms the full-size JPEG every epoch, 72 ms an image and core against about 1 ms).
- Crop, flip and the affine half of RandAugment are one bilinear sampling of the stored image, not
  three resamplings of the file, bicubic first; at 256 -> 224 pixels the two look alike, the crop
  is at most 1.14 times finer than the output, and bicubic costs five times as much.
- A mirrored image has its left and right anatomies exchanged in the labels; theirs does not.
- Rows without a mirror partner (right_atrium, middle_right_lobe): images that mention one are not
  mirrored.
"""
import collections
import csv
import gzip
import hashlib
import io
import json
import math
import os
import shutil
import sys
import time
import typing
import zipfile
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import phantom
import text
from text import InputError, Parser

FORMAT = 1            # raise it when the meaning of anything in a cache changes
CHUNK = 256           # images a job; fixed, so that the cache does not depend on the workers
SPLITS = ("train", "validate", "test", "skipped")
BLANK = -2            # a label cell left empty: not mentioned
csv.field_size_limit(1 << 27)

# ------------------------------------------------------------------------------------------------
# Labels

CHEXPERT = ("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity",
            "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax",
            "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices")

# label of a data set -> name in our vocabulary, where it is not just the lower-case label
PATHOLOGY = {
    "No Finding": "normal", "Enlarged Cardiomediastinum": "enlarge", "Lung Opacity": "opacity",
    "Lung Lesion": "lesion", "Pleural Effusion": "effusion", "Pleural Other": "abnormality",
    "Support Devices": "device"}


def label_pathology(label):
    """The vocabulary's name of a data set's label, or None (COVID-19 has none)."""
    name = PATHOLOGY.get(label, label.lower())
    return name if name in text.PATHOLOGIES else None


def label_value(cell):
    """'1.0' -> 1, '0.0' -> 0, '-1.0' -> -1 (uncertain), '' -> BLANK; anything else: ValueError."""
    if not cell:
        return BLANK
    value = float(cell)
    if value not in (1, 0, -1):
        raise ValueError(cell)
    return int(value)


# GLoRIA's and MGCA's custom for CheXpert's uncertain labels; the other labels' are ignored
GLORIA = {"Atelectasis": 1, "Edema": 1, "Pleural Effusion": 1, "Cardiomegaly": 0, "Consolidation": 0}


def settle_labels(raw, names, uncertain):
    """int8 [N,L] of {1, 0, -1, BLANK} -> {1, 0, -1}: blank counts as absent, as is customary."""
    labels = np.where(raw == BLANK, 0, raw).astype(np.int8)
    for column, name in enumerate(names):
        value = {"ignore": -1, "zeros": 0, "ones": 1, "gloria": GLORIA.get(name, -1)}[uncertain]
        labels[raw[:, column] == -1, column] = value
    return labels


# ------------------------------------------------------------------------------------------------
# Reading label files

class Item(typing.NamedTuple):
    """One image as its data set describes it; paths are relative to the root."""
    id: str
    path: str
    patient: str
    split: str            # train, validate, test; "" where the publisher gives none
    labels: tuple         # 1, 0, -1 uncertain, BLANK
    report: str = ""      # path of a report
    note: str = ""        # or its text
    boxes: tuple = ()     # (label, x, y, width, height) in fractions of the image
    masks: tuple = None   # (label, "rle" | "png", RLE or path, bit or -1); None: not annotated
    truth: tuple = ()     # (pathology, anatomy) as drawn by phantom.py


def csv_file(root, *names):
    """Path of the first of `names` that is in `root`, plain, .gz or .zip; None without any."""
    for name in names:
        for end in ("", ".gz", ".zip"):
            if os.path.isfile(os.path.join(root, name + end)):
                return os.path.join(root, name + end)
    return None


def need_csv(root, *names):
    """csv_file that insists: FileNotFoundError names what was looked for."""
    path = csv_file(root, *names)
    if path is None:
        raise FileNotFoundError(" or ".join(names) + " (plain, .gz or .zip)")
    return path


def open_text(path):
    if path.endswith(".gz"):
        raw = gzip.open(path)
    elif path.endswith(".zip"):
        archive = zipfile.ZipFile(path)
        raw = archive.open(archive.namelist()[0])
    else:
        raw = open(path, "rb")
    return io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace", newline="")


def csv_rows(path, *needed):
    """Rows of a csv as dicts, header and cells stripped; InputError when a needed column lacks."""
    try:
        with open_text(path) as file:
            reader = csv.reader(file)
            header = [name.strip() for name in next(reader, [])]
            absent = [name for name in needed if name not in header]
            if absent:
                raise InputError(f"{path} has no column {absent[0]!r}; it has {', '.join(header)}")
            for row in reader:
                if row:
                    row += [""] * (len(header) - len(row))
                    yield dict(zip(header, map(str.strip, row)))
    except (OSError, EOFError, IndexError, zlib.error, zipfile.BadZipFile, csv.Error) as error:
        raise InputError(f"{path} is damaged ({error}); download it again")


# Every reader takes (root, options, problems) and returns (label names, items). What it cannot
# use goes to `problems` as (kind, what).

def read_mimic(root, options, problems):
    """MIMIC-CXR-JPG with the reports unpacked over it; phantom.py adds boxes.csv and masks/."""
    split_csv = need_csv(root, "mimic-cxr-2.0.0-split.csv")
    metadata = {r["dicom_id"]: (r["ViewPosition"], r["Rows"], r["Columns"]) for r in csv_rows(
        need_csv(root, "mimic-cxr-2.0.0-metadata.csv"),
        "dicom_id", "ViewPosition", "Rows", "Columns")}
    boxes_csv, drawn = csv_file(root, "boxes.csv"), collections.defaultdict(list)
    for r in csv_rows(boxes_csv, "dicom_id", "pathology", "anatomy") if boxes_csv else ():
        drawn[r["dicom_id"]].append(r)

    if options["labels"] == "drawn":
        names = sorted({r["pathology"] for rs in drawn.values() for r in rs},
                       key=text.PATHOLOGIES.index)
    else:
        names, labels = CHEXPERT, {}
        for r in study_labels(root, options["labels"]):
            try:
                labels[r["study_id"]] = tuple(label_value(r.get(name, "")) for name in names)
            except ValueError as error:
                problems.append(("unreadable-label", f"study {r['study_id']}: {error}"))
    # unpacked on their own the reports have a folder of their own
    reports = "mimic-cxr-reports/" if os.path.isdir(os.path.join(root, "mimic-cxr-reports")) else ""

    items, seen = [], set()
    for r in csv_rows(split_csv, "dicom_id", "study_id", "subject_id", "split"):
        name, study, subject = r["dicom_id"], r["study_id"], r["subject_id"]
        if name not in metadata or r["split"] not in SPLITS[:3] or not subject or name in seen:
            kind = "duplicate" if name in seen else "unreadable-label"
            problems.append((kind, f"split.csv: {name}"))
            continue
        seen.add(name)
        view, height, width = metadata[name]
        if options["views"] == "frontal" and view not in ("PA", "AP"):
            continue
        folder = f"files/p{subject[:2]}/p{subject}/s{study}"
        found = drawn.get(name, ())
        if options["labels"] == "drawn":
            present = {f["pathology"] for f in found}
            values = tuple(int(n in present) for n in names)
        else:
            values = labels.get(study, (BLANK,) * len(names))
        boxes, masks = [], []
        for f in found:
            x, y, w, h = (float(f[side]) for side in ("x", "y", "width", "height"))
            width_px, height_px = float(width), float(height)
            boxes.append((f["pathology"], x / width_px, y / height_px, w / width_px, h / height_px))
            masks.append((f["pathology"], "png", f"masks/{name}.png", int(f["finding"])))
        items.append(Item(
            name, f"{folder}/{name}.jpg", subject, r["split"], values,
            report=f"{reports}{folder}.txt", boxes=tuple(boxes),
            masks=tuple(masks) if boxes_csv else None,
            truth=tuple((f["pathology"], f["anatomy"]) for f in found)))
    return names, items


def study_labels(root, which):
    """Rows of one of MIMIC-CXR-JPG's label files; `manual` (2.1.0) covers 687 test studies."""
    if which == "manual":
        for r in csv_rows(need_csv(root, "mimic-cxr-2.1.0-test-set-labeled.csv"), "study_id"):
            yield {**r, "Lung Opacity": r.get("Airspace Opacity", r.get("Lung Opacity", ""))}
    else:
        path = csv_file(root, f"mimic-cxr-2.0.0-{which}.csv")
        yield from csv_rows(path, "study_id") if path else ()


class Source(typing.NamedTuple):
    name: str             # as people call it
    read: typing.Callable
    get: str              # where to get it
    layout: str           # phantom.py --layout that rehearses it, or ""
    views: str            # default
    made: tuple           # shares of train and validate where a split has to be made
    reports: bool


SOURCES = {
    "synthetic": Source("synthetic", read_mimic, "phantom.py draws it", "mimic", "all",
                        (0.8, 0.1), True),
    "mimic": Source("MIMIC-CXR-JPG and its reports", read_mimic,
                    "https://physionet.org/content/mimic-cxr-jpg (credentialed)", "mimic", "all",
                    (0.8, 0.1), True),
}
DATASETS = tuple(SOURCES)


def read_items(dataset, root, options):
    """(label names, items, problems) of a data set as downloaded; no image is opened here."""
    source, problems = SOURCES[dataset], []
    try:
        names, items = source.read(root, options, problems)
    except FileNotFoundError as error:
        rehearse = (f"; or rehearse: python phantom.py --layout {source.layout} --root {root} "
                    "--count 200" if source.layout else "")
        raise InputError(f"no {source.name} data at {root}: looked for {error}. Get it: "
                         f"{source.get}{rehearse}; or try --dataset synthetic (train.py: --data)")
    # ids and paths come from csv files of strangers: none may lead out of the data root
    safe = []
    for item in items:
        paths = [item.path, item.report] + [m[2] for m in item.masks or () if m[1] == "png"]
        if any(os.path.isabs(p) or ".." in p.replace("\\", "/").split("/") for p in paths):
            problems.append(("outside-root", item.path))
        else:
            safe.append(item)
    if not safe:
        raise InputError(f"{root} has label files but not one usable row; {len(problems)} problems,"
                         f" the first: {problems[0] if problems else 'none'}")
    return list(names), safe, problems


# ------------------------------------------------------------------------------------------------
# Splits

def draw_split(patient, made, seed=0):
    """train, validate or test for a patient, from a hash of the id alone: everybody gets the same,
    whatever part of the data set they have and in whatever order."""
    digest = hashlib.sha256(f"{seed}/{patient}".encode()).digest()
    u = int.from_bytes(digest[:8], "big") / 2**64
    return SPLITS[0] if u < made[0] else SPLITS[1] if u < made[0] + made[1] else SPLITS[2]


def settle_splits(items, made, split_file=None):
    """(splits of the items, where they come from): the file's, else the publisher's, else made."""
    if split_file:
        return read_split_file(items, made, split_file)
    splits = [item.split for item in items]
    carve = (made[0] / (made[0] + made[1]), made[1] / (made[0] + made[1]))
    if not any(splits):
        shares = ":".join(f"{100 * share:.0f}" for share in (*made, 1 - sum(made)))
        return [draw_split(i.patient, made) for i in items], f"made by patient {shares}, seed 0"
    if "validate" not in splits:
        splits = [draw_split(i.patient, carve) if s == "train" else s for i, s in zip(items, splits)]
        return splits, f"official; validate is {100 * carve[1]:.0f}% of train by patient, seed 0"
    return splits, "official"


def read_split_file(items, made, path):
    """A split.csv of ours (`id`, `split`; ids not in it are not used) or MedKLIP's RSNA test csv
    (`ID`, `classes`; ids not in it become train and validate)."""
    if not os.path.isfile(path):
        raise InputError(f"--split-file {path}: no such file")
    rows = list(csv_rows(path))
    ids = {item.id for item in items}
    if rows and {"id", "split"} <= set(rows[0]):
        alias = {"val": "validate", "valid": "validate", "validation": "validate"}
        given = {r["id"]: alias.get(r["split"], r["split"]) for r in rows}
        wrong = set(given.values()) - set(SPLITS)
        if wrong:
            raise InputError(f"--split-file {path}: {wrong.pop()!r} is no split; use train, "
                             "validate or test")
        splits = [given.get(item.id, "skipped") for item in items]
    elif rows and {"ID", "classes"} <= set(rows[0]):
        given = {r["ID"]: "test" for r in rows}
        carve = (made[0] / (made[0] + made[1]), made[1] / (made[0] + made[1]))
        splits = [given.get(i.id) or draw_split(i.patient, carve) for i in items]
    else:
        raise InputError(f"--split-file {path}: needs columns id,split (our split.csv) or "
                         "ID,img_path,boxes,classes (MedKLIP's RSNA test csv)")
    known = len(ids & given.keys())
    if not known:
        raise InputError(f"--split-file {path}: none of its {len(given)} ids is in this data set")
    return splits, f"{os.path.basename(path)} ({known} of its {len(given)} ids are here)"


# ------------------------------------------------------------------------------------------------
# Pixels

def read_image(path, size=None):
    """uint8 [H,W] of a PNG, JPEG or DICOM file, or [size,size] squashed; InputError if it cannot."""
    try:
        return decode(path, size)[0]
    except Exception as error:  # whatever a decoder makes of a damaged file
        raise InputError(f"{path} cannot be read as an image ({trouble(path)}: {error})")


def decode(path, size=None):
    """(uint8 [H,W] or [size,size], (height, width) of the file)."""
    if path.lower().endswith((".dcm", ".dicom")):
        image = Image.fromarray(decode_dicom(path))
        shape = image.height, image.width
    else:
        with Image.open(path) as image:
            shape = image.height, image.width
            if size:  # a JPEG decodes straight to the smallest eighth that is still >= size
                image.draft("L", (size, size))
            image.load()
            if image.mode.startswith("I") or image.mode == "F":  # 16-bit PNG
                image = Image.fromarray(stretch(np.asarray(image)))
            else:
                image = image.convert("L")
    if size and image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BILINEAR)  # Pillow's is antialiased
    return np.asarray(image), shape


def stretch(pixels):
    """Any range -> uint8 0..255 by minimum and maximum, as MIMIC-CXR-JPG was made from DICOM."""
    low, high = float(pixels.min()), float(pixels.max())
    return ((pixels - low) * (255 / max(high - low, 1e-9))).round().astype(np.uint8)


def decode_dicom(path):
    """uint8 [H,W]: rescaled, windowed, bright = dense whatever the photometric interpretation."""
    import pydicom
    from pydicom.pixels import apply_modality_lut, apply_voi_lut
    file = pydicom.dcmread(path)
    stored = file.pixel_array                     # compressed files go through Pillow
    if stored.ndim == 3:                          # frames, or colours
        stored = stored.mean(-1) if file.get("SamplesPerPixel", 1) == 3 else stored[0]
    pixels = apply_modality_lut(stored, file)
    if "WindowCenter" in file or "VOILUTSequence" in file:
        pixels = apply_voi_lut(pixels, file)
    if pixels.dtype != np.uint8:
        pixels = stretch(np.asarray(pixels, np.float32))
    return 255 - pixels if file.get("PhotometricInterpretation") == "MONOCHROME1" else pixels


def trouble(path):
    """In one word why a file cannot be read."""
    if not os.path.exists(path):
        return "missing"
    if os.path.getsize(path) == 0:
        return "zero-size"
    if not os.access(path, os.R_OK) or not os.path.isfile(path):
        return "unreadable"
    with open(path, "rb") as file:
        return "git-lfs" if file.read(40).startswith(b"version https://git-lfs") else "corrupt"


def decode_rle(rle, size=1024):
    """SIIM's mask, bool [size,size]: pairs (gap since the last run, length), column by column."""
    numbers = np.array(rle.split(), np.int64)
    flat = np.zeros(size * size, bool)
    if len(numbers) > 1:
        ends = numbers.cumsum()[1::2]
        for start, end in zip(ends - numbers[1::2], ends):
            flat[start:end] = True
    return flat.reshape(size, size).T


# ------------------------------------------------------------------------------------------------
# Preparation: jobs of CHUNK images, each leaving a part file that says what it was made from

def stamp(paths):
    """What a cheap look tells of some files: names, sizes, times. A hex digest."""
    digest = hashlib.sha256()
    for path in paths:
        try:
            status = os.stat(path)
            digest.update(f"{path}|{status.st_size}|{status.st_mtime_ns}\n".encode())
        except (OSError, ValueError):
            digest.update(f"{path}|-\n".encode())
    return digest.hexdigest()


def read_part(path, made_from):
    """The part at `path` if it was made from the same files and options, else None."""
    try:
        with open(path) as file:
            part = json.load(file)
        return part if part["made_from"] == made_from else None
    except (OSError, ValueError, KeyError):
        return None


def write_json(path, value):
    with open(path + ".new", "w") as file:
        json.dump(value, file)
    os.replace(path + ".new", path)


def prepare_chunk(job):
    """Pixels of the job's images into images.npy, triplets of their reports; (pixels, cells)."""
    root, folder, start, items, size, triplets, graph_cells = job
    name = os.path.join(folder, "parts", f"{start // CHUNK:06d}")
    full = [os.path.join(root, item.path) for item in items]
    made_from = f"{FORMAT} {size} {stamp(full)}"
    images = os.path.join(folder, "images.npy")
    block = np.load(images, mmap_mode="r", allow_pickle=False)[start:start + len(items)]
    pixels = read_part(name + ".pixels.json", made_from)
    if pixels is None or pixels["crc"] != zlib.crc32(block):
        fresh, shapes, errors = np.zeros(block.shape, np.uint8), [], {}
        for k, path in enumerate(full):
            try:
                fresh[k], shape = decode(path, size)
            except Exception as error:  # one bad file of 377,110 must not end the run
                shape, errors[k] = (0, 0), (trouble(path), f"{error}"[:200])
            shapes.append(shape)
        with open(images, "r+b") as file:  # not through the map: a full disk would be a SIGBUS
            file.seek(block.offset)
            file.write(fresh)
        pixels = dict(made_from=made_from, crc=zlib.crc32(fresh), shapes=shapes, errors=errors)
        write_json(name + ".pixels.json", pixels)

    reports = [os.path.join(root, item.report) if item.report else "" for item in items]
    made_from = f"{FORMAT} {triplets} {stamp(reports)} " + hashlib.sha256(
        json.dumps([[i.note for i in items], graph_cells]).encode()).hexdigest()
    cells = read_part(name + ".cells.json", made_from)
    if cells is None:
        found = graph_cells or [report_cells(path, item.note) for path, item in zip(reports, items)]
        cells = dict(made_from=made_from, cells=[f[0] for f in found], state=[f[1] for f in found])
        write_json(name + ".cells.json", cells)
    return start, pixels, cells


def report_cells(path, note):
    """([(pathology, anatomy, 1 or 0)], "read" | "empty-report" | "no report") by text.py's rules."""
    if path:
        try:
            with open(path, encoding="utf-8", errors="replace") as file:
                note = file.read()
        except OSError:
            return [], "no report"
    triplets = text.extract_triplets(note, buckets=False) if note.strip() else []
    return unique_cells(triplets), "read" if triplets else "empty-report"


def unique_cells(triplets):
    """One value a (pathology, anatomy): 1 outranks 0; uncertain ones are left out as unmentioned."""
    cells = {}
    for pathology, anatomy, existence, *_ in triplets:
        if existence >= 0:
            cells[pathology, anatomy] = max(existence, cells.get((pathology, anatomy), 0))
    return [(*key, value) for key, value in cells.items()]


def run_jobs(function, jobs, workers, total, title):
    """function(job) for every job, in `workers` processes, in any order, under a progress bar."""
    from tqdm import tqdm
    with tqdm(total=total, unit="img", desc=title, mininterval=0.5) as bar:
        if workers <= 1 or len(jobs) <= 1:
            for job in jobs:
                yield function(job)
                bar.update(len(job[3]))
            return
        import concurrent.futures
        import multiprocessing
        # fork: a spawned worker would spend two seconds on importing torch
        method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        with concurrent.futures.ProcessPoolExecutor(
                workers, multiprocessing.get_context(method)) as pool:
            futures = {pool.submit(function, job): len(job[3]) for job in jobs}
            try:
                for future in concurrent.futures.as_completed(futures):
                    yield future.result()
                    bar.update(futures[future])
            except concurrent.futures.BrokenExecutor:
                raise InputError("a worker was killed, by lack of memory or of disk space; what it "
                                 "finished is kept: run again, perhaps with --workers 1")
            finally:
                pool.shutdown(cancel_futures=True)


def load(dataset, root=None, *, size=None, views=None, cache_dir=None, workers=None,
         split_file=None, uncertain="ignore", labels=None, triplets="rules"):
    """A data set as a Table; the first call prepares it, later ones map the cache into memory.

    size: pixels a side (default 64 for synthetic, else 256). views: "frontal" or "all".
    triplets: "rules" on the reports, a RadGraph .json, or a folder with the published
    landmark_observation_adj_mtx.npy and train.json. labels: for mimic "chexpert", "negbio" or
    "manual". InputError when there is no such data.
    """
    if dataset not in SOURCES:
        raise InputError(f"unknown data set {dataset!r}; choose one of {', '.join(DATASETS)}")
    root = os.path.abspath(root or os.path.join("data", dataset))
    size = size or (64 if dataset == "synthetic" else 256)
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    options = dict(views=views or SOURCES[dataset].views, split_file=split_file,
                   uncertain=uncertain, triplets=triplets,
                   labels=labels or ("drawn" if dataset == "synthetic" else "chexpert"))
    if dataset == "synthetic" and not (os.path.isdir(root) and os.listdir(root)):
        draw_synthetic(root, workers)

    folder = f"prepared-{size}" + (f"-{views}" if options["views"] != SOURCES[dataset].views else "")
    folder = os.path.join(cache_dir or root, dataset if cache_dir else "", folder)
    made_from = inputs(dataset, root, size, options)
    receipt = read_receipt(folder, made_from)
    if receipt is None:
        try:
            os.makedirs(os.path.join(folder, "parts"), exist_ok=True)
            with open(os.path.join(folder, "lock"), "w") as lock:
                hold(lock)  # a second process waits here, then finds the work done
                receipt = read_receipt(folder, made_from) or prepare(
                    dataset, root, folder, size, workers, options, made_from)
        except OSError as error:
            raise InputError(f"cannot write the prepared images to {folder} ({error.strerror}); "
                             "--cache-dir DIR puts them elsewhere")
    return Table(folder, root, receipt)


def draw_synthetic(root, workers, count=12_500):
    """12,500 phantoms of 64 pixels, 10,000 of them for training; --root takes any other set."""
    print(f"drawing {count:,} synthetic radiographs into {root} (once)", file=sys.stderr)
    shutil.rmtree(root + ".part", ignore_errors=True)
    phantom.write("mimic", root + ".part", count, 0, workers=workers)
    if os.path.isdir(root):
        os.rmdir(root)
    os.rename(root + ".part", root)  # so that a half-drawn set is never taken for a whole one


def hold(lock):
    """Waits for the only right to prepare; freed by the system when the process ends, however."""
    try:
        import fcntl
        fcntl.flock(lock, fcntl.LOCK_EX)
    except (ImportError, OSError):  # Windows, or a file system without locks
        pass


def inputs(dataset, root, size, options):
    """What the cache depends on that can be seen without opening anything: a hex digest."""
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_file()) \
        if os.path.isdir(root) else []
    extra = [options["split_file"]] if options["split_file"] else []
    if options["triplets"] != "rules":
        extra.append(options["triplets"])
    seen = stamp([os.path.join(root, name) for name in names] + extra + [text.__file__])
    return f"{FORMAT} {dataset} {size} {json.dumps(options, sort_keys=True)} {seen}"


def read_receipt(folder, made_from):
    """The receipt of a finished cache that is still up to date, else None."""
    receipt = read_part(os.path.join(folder, "receipt.json"), made_from)
    if receipt is None or not os.path.exists(os.path.join(folder, "images.npy")):
        return None
    # files that were missing or damaged may have been repaired since
    return None if stamp(receipt["unusable"]) != receipt["unusable_stamp"] else receipt


def prepare(dataset, root, folder, size, workers, options, made_from):
    """Reads the labels, runs the jobs, writes the cache and at last its receipt, which it returns."""
    began = time.time()
    names, items, problems = read_items(dataset, root, options)
    if any(item.path.lower().endswith((".dcm", ".dicom")) for item in items):
        try:
            import pydicom  # noqa: F401
        except ImportError:
            raise InputError(f"{SOURCES[dataset].name} comes as DICOM files: pip install pydicom")
    splits, split_source = settle_splits(items, SOURCES[dataset].made, options["split_file"])
    images = os.path.join(folder, "images.npy")
    shape = (len(items), size, size)
    try:
        fits = np.load(images, mmap_mode="r", allow_pickle=False).shape == shape
    except (OSError, ValueError, EOFError):
        fits = False
    if not fits:
        free = shutil.disk_usage(folder).free
        if free < math.prod(shape):
            raise InputError(f"{folder} needs {math.prod(shape) / 1e9:.1f} GB and the disk has "
                             f"{free / 1e9:.1f} GB left; --cache-dir DIR puts it elsewhere")
        np.lib.format.open_memmap(images, "w+", np.uint8, shape)  # sparse until written

    graphs = read_graphs(options["triplets"])
    rules = stamp([text.__file__]) if options["triplets"] == "rules" else options["triplets"]
    jobs = [(root, folder, start, items[start:start + CHUNK], size, rules,
             graphs and [graphs(item) for item in items[start:start + CHUNK]])
            for start in range(0, len(items), CHUNK)]
    parts = sorted(run_jobs(prepare_chunk, jobs, workers, len(items), "preparing"),
                   key=lambda part: part[0])

    # one flat list of cells, and where each image's begin (CSR)
    store = {"pathology": {}, "anatomy": {}}
    arrays, shapes, has_report, skipped, unusable = {}, [], [], collections.Counter(), []
    state, cells = [], []
    for start, pixels, part in parts:
        shapes += pixels["shapes"]
        cells += part["cells"]
        state += part["state"]
        for k, (kind, _) in pixels["errors"].items():
            splits[start + int(k)] = "skipped"
            skipped[kind] += 1
            unusable.append(os.path.join(root, items[start + int(k)].path))
    skipped.update(kind for kind, _ in problems)
    for title, lists in (("cells", cells), ("truth", [[(*t, 1) for t in i.truth] for i in items])):
        counts = [len(found) for found in lists]
        arrays[title + "_start"] = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        flat = [(store["pathology"].setdefault(p, len(store["pathology"])),
                 store["anatomy"].setdefault(a, len(store["anatomy"])), v)
                for found in lists for p, a, v in found]
        arrays[title] = np.array(flat, np.int16).reshape(-1, 3)
    raw = np.array([item.labels for item in items], np.int8).reshape(len(items), len(names))
    arrays["labels"] = settle_labels(raw, names, options["uncertain"])
    arrays["shape"] = np.array(shapes, np.int32).reshape(-1, 2)
    arrays["splits"] = np.array([SPLITS.index(s) for s in splits], np.int8)
    arrays["has_report"] = np.array([s == "read" for s in state], bool)
    index = dict(
        dataset=dataset, label_names=names, pathologies=list(store["pathology"]),
        anatomies=list(store["anatomy"]), ids=[i.id for i in items], paths=[i.path for i in items],
        patients=[i.patient for i in items],
        boxes={k: item.boxes for k, item in enumerate(items) if item.boxes},
        masks={k: item.masks for k, item in enumerate(items) if item.masks is not None})
    with open(os.path.join(folder, "arrays.npz.new"), "wb") as file:
        np.savez(file, **arrays)
    os.replace(os.path.join(folder, "arrays.npz.new"), os.path.join(folder, "arrays.npz"))
    write_json(os.path.join(folder, "index.json"), index)
    write_split(os.path.join(folder, "split.csv"), items, splits)

    used = np.array(splits) != "skipped"
    digest = hashlib.sha256(json.dumps([index, [p[1]["crc"] for p in parts]]).encode())
    for key in sorted(arrays):
        digest.update(arrays[key].tobytes())
    seconds = time.time() - began
    receipt = dict(
        dataset=dataset, root=root, folder=folder, size=size, views=options["views"],
        images=int(used.sum()), rows=len(items), skipped=dict(sorted(skipped.items())),
        skipped_files=[[kind, what] for kind, what in problems][:1000]
        + [[part[1]["errors"][k][0], items[part[0] + int(k)].path]
           for part in parts for k in part[1]["errors"]][:1000],
        patients=len({i.patient for i, u in zip(items, used) if u}),
        splits={name: splits.count(name) for name in SPLITS[:3]}, split_source=split_source,
        labels={name: {key: int((raw[used, k] == value).sum()) for key, value in
                       (("present", 1), ("absent", 0), ("uncertain", -1), ("blank", BLANK))}
                for k, name in enumerate(names)}, uncertain=options["uncertain"],
        reports=dict(collections.Counter(s for s, u in zip(state, used) if u))
        if SOURCES[dataset].reports else {},
        triplets={"source": options["triplets"], "present": int((arrays["cells"][:, 2] == 1).sum()),
                  "denied": int((arrays["cells"][:, 2] == 0).sum())},
        boxes=sum(len(i.boxes) for i in items), masks=sum(bool(i.masks) for i in items),
        seconds=round(seconds, 2), images_per_second=round(len(items) / max(seconds, 1e-9), 1),
        workers=workers, fingerprint=digest.hexdigest()[:16], made_from=made_from,
        unusable=unusable[:: 1 + len(unusable) // 1000], unusable_stamp="")
    receipt["unusable_stamp"] = stamp(receipt["unusable"])
    write_json(os.path.join(folder, "receipt.json"), receipt)
    return receipt


def write_split(path, items, splits):
    """split.csv: `id,patient,split`, the file that --split-file reads."""
    with open(path + ".new", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "patient", "split"))
        writer.writerows((i.id, i.patient, s) for i, s in zip(items, splits) if s != "skipped")
    os.replace(path + ".new", path)


def read_graphs(triplets):
    """None for the rules, else a function Item -> (cells, state)."""
    return None


# ------------------------------------------------------------------------------------------------
# The prepared data set

class Table:
    """N images of one data set, memory-mapped, with what is known about each.

    images uint8 [N,S,S]; labels int8 [N,L] (1, 0, -1 unknown) of `label_names`, each with its
    name in our vocabulary or None in `label_pathologies`; shape int32 [N,2] height and width of
    the files; boxes [N] lists of (label, x, y, width, height) in fractions of the image; splits [N].
    A row whose file was unusable stays, black and in no split, so that row numbers are stable.
    """

    def __init__(self, folder, root, receipt):
        def path(name):
            return os.path.join(folder, name)
        with open(path("index.json")) as file:
            index = json.load(file)
        arrays = np.load(path("arrays.npz"), allow_pickle=False)
        self.dataset, self.root, self.folder, self.receipt = receipt["dataset"], root, folder, receipt
        self.images = np.load(path("images.npy"), mmap_mode="r", allow_pickle=False)  # [N,S,S]
        self.size = self.images.shape[1]
        self.ids, self.paths, self.patients = index["ids"], index["paths"], index["patients"]
        self.splits = np.array(SPLITS)[arrays["splits"]]
        self.shape, self.labels = arrays["shape"], arrays["labels"]
        self.label_names = index["label_names"]
        self.label_pathologies = [label_pathology(name) for name in self.label_names]
        self.has_report = arrays["has_report"]
        self.has_reports = bool(self.has_report.any())
        self.boxes = [index["boxes"].get(str(i), []) for i in range(len(self.ids))]
        self.pathologies, self.anatomies = index["pathologies"], index["anatomies"]
        self._masks = {int(i): masks for i, masks in index["masks"].items()}
        self._masked = {mask[0] for masks in self._masks.values() for mask in masks}
        self._cells = arrays["cells_start"], arrays["cells"]
        self._truth = arrays["truth_start"], arrays["truth"]
        self._places = {}

    def __len__(self):
        return len(self.ids)

    def rows(self, split="all"):
        """Row numbers of a split, or of all usable images."""
        return np.flatnonzero(self.splits != "skipped" if split == "all" else self.splits == split)

    def cells(self, i):
        """[(pathology, anatomy, 1 present or 0 denied)] of image i's report, under their own names."""
        start, cells = self._cells
        return [(self.pathologies[p], self.anatomies[a], int(v))
                for p, a, v in cells[start[i]:start[i + 1]]]

    def existence(self, index, pathologies, anatomies):
        """int8 [B,n,m] of the images in `index`: 1 present, 0 denied, -1 not mentioned."""
        return self._dense(self._cells, index, pathologies, anatomies, -1)

    def truth(self, index, pathologies, anatomies):
        """int8 [B,n,m] of what phantom.py drew (1) and did not (0); None for real data."""
        if self.dataset != "synthetic":
            return None
        return self._dense(self._truth, index, pathologies, anatomies, 0)

    def _dense(self, store, index, pathologies, anatomies, blank):
        key = tuple(pathologies), tuple(anatomies)
        if key not in self._places:
            self._places[key] = (place(self.pathologies, key[0], "tail_abnorm_obs"),
                                 place(self.anatomies, key[1], "other"))
        columns, rows = self._places[key]
        start, cells = store
        index = np.asarray(index, np.int64).reshape(-1)
        count = start[index + 1] - start[index]
        image = np.repeat(np.arange(len(index)), count)
        within = np.arange(len(image)) - np.repeat(count.cumsum() - count, count)
        p, a, value = cells[np.repeat(start[index], count) + within].T
        row, column = rows[a], columns[p]
        dense = np.full((len(index), len(key[1]), len(key[0])), blank, np.int8)  # [B,n,m]
        for now in (0, 1):  # several names may share a place ("other"): what is present is written last
            hit = (value == now) & (row >= 0) & (column >= 0)
            dense[image[hit], row[hit], column[hit]] = now
        return dense

    def mask(self, i, label=None):
        """bool [H,W], the union of image i's masks (of one label); None where nobody drew any."""
        if i not in self._masks or label is not None and label not in self._masked:
            return None
        union = None
        for name, kind, source, bit in self._masks[i]:
            if kind == "rle":
                part = decode_rle(source)
            else:
                with Image.open(os.path.join(self.root, source)) as image:
                    part = np.asarray(image.convert("L"))
                part = part > 127 if bit < 0 else part >> bit & 1 > 0
            part = part & (label in (None, name))
            union = part if union is None else union | part
        return np.zeros(self.shape[i], bool) if union is None else union


def place(names, queries, bucket):
    """int64 [len(names)]: position of each name in `queries`, else of the bucket, else -1."""
    position = {name: k for k, name in enumerate(queries)}
    return np.array([position.get(name, position.get(bucket, -1)) for name in names], np.int64)


# ------------------------------------------------------------------------------------------------
# Batches

class Batches(torch.utils.data.Dataset):
    """Training batches by global step number: step s is the same batch whenever it is asked for.

    batch_size is the global one; of its images rank r of `world` gets the r-th part. Each epoch
    is a permutation seeded by (seed, epoch); what does not fill a batch waits for the next one.
    Images without a usable report teach nothing and are left out. Item: {"images" uint8 [B,S,S],
    "existence" int8 [B,n,m], "rows" int64 [B]}. Use with DataLoader(batches, batch_size=None,
    sampler=range(first_step, last_step)).
    """

    def __init__(self, table, rows, batch_size, seed, pathologies, anatomies, rank=0, world=1):
        if batch_size % world:
            raise InputError(f"--batch-size {batch_size} is not a multiple of {world} processes")
        start = table._cells[0]
        rows = np.asarray(rows)
        self.row_numbers = rows[start[rows + 1] > start[rows]]
        if not len(self.row_numbers):
            raise InputError(f"{table.root}: no training image has a report with a usable triplet")
        self.table, self.batch_size, self.seed = table, batch_size, seed
        self.pathologies, self.anatomies = tuple(pathologies), tuple(anatomies)
        part = batch_size // world
        self.part = slice(rank * part, (rank + 1) * part)
        self.steps = max(1, len(self.row_numbers) // batch_size)
        self.epoch, self.order = None, None

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        epoch, step = divmod(int(step), self.steps)
        if epoch != self.epoch:
            shuffle = np.random.default_rng([self.seed, epoch])
            self.epoch, self.order = epoch, shuffle.permutation(self.row_numbers)
        batch = self.order[step * self.batch_size:(step + 1) * self.batch_size]
        batch = np.resize(batch, self.batch_size)[self.part]  # fewer images than one batch: repeat
        return {"images": torch.from_numpy(self.table.images[batch]),                # [B,S,S]
                "existence": torch.from_numpy(
                    self.table.existence(batch, self.pathologies, self.anatomies)),  # [B,n,m]
                "rows": torch.from_numpy(batch)}


# ------------------------------------------------------------------------------------------------
# Augmentation, on whatever device the images are

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
OPS = ("identity", "autocontrast", "equalize", "brightness", "sharpness",
       "shear_x", "shear_y", "translate_x", "translate_y", "rotate")


def normalise(images):
    """float [B,S,S] in 0..255 -> float [B,3,S,S], grey in all channels, ImageNet mean and std."""
    scale = torch.tensor([1 / (255 * s) for s in STD]).view(1, 3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(MEAN, STD)]).view(1, 3, 1, 1)
    scale, shift = (t.to(images.device, non_blocking=True) for t in (scale, shift))
    return torch.addcmul(shift, images[:, None], scale)


def to_input(images, size):
    """uint8 [B,S,S] -> float [B,3,size,size], not augmented."""
    x = images.float()
    if x.shape[-1] != size:
        x = F.interpolate(x[:, None], (size, size), mode="bilinear", antialias=True)[:, 0]
    return normalise(x)


def side_swap_index(anatomies):
    """int64 [n]: the row that holds each anatomy's mirror partner (its own for unsided ones); -1
    where the partner is not in the list."""
    position = {name: i for i, name in enumerate(anatomies)}
    return torch.tensor([position.get(text.swap_sides(name), -1) for name in anatomies])


def augment(images, existence, swap, generator, size, crop=(0.2, 1.0), flip="swap", ops=2,
            magnitude=7):
    """Random resized crop, flip, RandAugment and normalisation of a batch.

    images uint8 [B,S,S]; existence [B,n,m] or None; swap: side_swap_index(anatomies); crop: range
    of the area kept; flip: "swap" exchanges left and right in existence, "naive" does not (the
    published code), "none" never flips; magnitude: of 30, as in torchvision. Returns
    (float [B,3,size,size], existence). The random numbers come from `generator` on the CPU, the
    work is done where the images are, without waiting for the device.
    """
    B, S, device = len(images), images.shape[-1], images.device

    def draw(*shape):
        return torch.rand(*shape, generator=generator)

    def there(tensor):
        return tensor.to(device, non_blocking=True)

    # crop: area in `crop`, aspect ratio in 3/4..4/3 as far as it fits into the square
    area = crop[0] + (crop[1] - crop[0]) * draw(B)
    stretch_by = (draw(B) * 2 - 1) * torch.minimum(-area.log(), torch.tensor(math.log(4 / 3))) / 2
    wide, high = area.sqrt() * stretch_by.exp(), area.sqrt() * (-stretch_by).exp()
    x0, y0 = (draw(B) * 2 - 1) * (1 - wide), (draw(B) * 2 - 1) * (1 - high)  # centre, -1..1
    mirrored = there((draw(B) < 0.5) & (flip != "none"))

    choice = (draw(B, ops) * len(OPS)).long()
    sign = torch.where(draw(B, ops) < 0.5, -1.0, 1.0)
    share = sign * magnitude / 30
    # A maps the output to the crop, in coordinates -1..1; torchvision's ranges
    A = torch.eye(3).repeat(B, 1, 1)                                               # [B,3,3]
    for k in range(ops):
        op = {name: choice[:, k] == i for i, name in enumerate(OPS)}
        angle = torch.where(op["rotate"], share[:, k] * math.radians(30), 0.0)
        one = torch.eye(3).repeat(B, 1, 1)
        one[:, 0, 0] = one[:, 1, 1] = angle.cos()
        one[:, 0, 1] = torch.where(op["shear_x"], share[:, k] * 0.3, -angle.sin())
        one[:, 1, 0] = torch.where(op["shear_y"], share[:, k] * 0.3, angle.sin())
        one[:, 0, 2] = torch.where(op["translate_x"], share[:, k] * 2 * 150 / 331, 0.0)
        one[:, 1, 2] = torch.where(op["translate_y"], share[:, k] * 2 * 150 / 331, 0.0)
        A = A @ one

    if flip == "swap" and existence is not None:
        swap = there(torch.as_tensor(swap))
        alone = (swap < 0)[None, :, None]
        mirrored = mirrored & ~((existence >= 0) & alone).flatten(1).any(1)
        partner = torch.where(swap < 0, torch.arange(len(swap), device=device), swap)
        existence = torch.where(mirrored[:, None, None], existence[:, partner], existence)
    A, x0, y0, wide, high = map(there, (A, x0, y0, wide, high))
    wide = torch.where(mirrored, -wide, wide)
    theta = torch.stack([A[:, 0] * wide[:, None], A[:, 1] * high[:, None]], 1)     # [B,2,3]
    theta[:, 0, 2] += x0
    theta[:, 1, 2] += y0
    x = images[:, None].float()                                                    # [B,1,S,S]
    if S >= 2 * size:  # sampling every other pixel would alias
        x = F.avg_pool2d(x, S // size)
    grid = F.affine_grid(theta, (B, 1, size, size), align_corners=False)
    x = F.grid_sample(x, grid, mode="bilinear", align_corners=False)[:, 0]         # [B,size,size]

    for k in range(ops):
        for i, name in enumerate(OPS[1:5], 1):
            chosen = (choice[:, k] == i).nonzero()[:, 0]  # known on the CPU: no wait
            if len(chosen):
                factor = there(1 + 0.9 * share[chosen, k])
                chosen = there(chosen)
                x[chosen] = PHOTOMETRIC[name](x[chosen], factor)
    return normalise(x), existence


def autocontrast(x, factor):
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    return torch.where(high > low, (x - low) * (255 / (high - low).clamp(min=1e-6)), x)


def equalize(x, factor):
    """Pillow's: the table is the running histogram in steps of (pixels - brightest bin) / 255."""
    level = x.round().long().flatten(1)                                            # [b,S*S]
    histogram = torch.zeros(len(x), 256, device=x.device)
    histogram.scatter_add_(1, level, torch.ones_like(level, dtype=torch.float))
    brightest = level.amax(1, keepdim=True)
    step = ((histogram.sum(1, keepdim=True) - histogram.gather(1, brightest)) / 255).floor()
    before = histogram.cumsum(1) - histogram
    table = ((before + (step / 2).floor()) / step.clamp(min=1)).floor().clamp(0, 255)
    return torch.where(step[:, :, None] > 0, table.gather(1, level).view_as(x), x)


def brightness(x, factor):
    return (x * factor[:, None, None]).clamp(0, 255)


def sharpness(x, factor):
    """Away from (factor > 1) or towards the mean of a 3x3 with weight 5 on the centre."""
    total = F.avg_pool2d(x[:, None], 3, stride=1)[:, 0] * 9
    inner = x[:, 1:-1, 1:-1]
    smooth = (total + 4 * inner) / 13
    x = x.clone()
    x[:, 1:-1, 1:-1] = (smooth + (inner - smooth) * factor[:, None, None]).clamp(0, 255)
    return x


PHOTOMETRIC = dict(autocontrast=autocontrast, equalize=equalize, brightness=brightness,
                   sharpness=sharpness)


# ------------------------------------------------------------------------------------------------
# Command line

def add_data_flags(parser):
    """The flags that every script shares; `load_from_args` reads them."""
    group = parser.add_argument_group("data")
    group.add_argument("--root", help="the data as downloaded (default data/<dataset>)")
    group.add_argument("--cache-dir", help="where prepared images go (default: inside the root)")
    group.add_argument("--prepared-size", type=int, help="pixels a side of the stored images "
                       "(default 256, synthetic 64; at least the image size)")
    group.add_argument("--views", choices=("frontal", "all"))
    group.add_argument("--split-file", help="split.csv of ours or MedKLIP's RSNA test csv")
    group.add_argument("--uncertain", default="ignore", choices=("ignore", "zeros", "ones", "gloria"),
                       help="what -1 labels count as; gloria: its per-label choice (CheXpert, MIMIC)")
    group.add_argument("--labels", choices=("chexpert", "negbio", "manual"), help="label file of mimic")
    group.add_argument("--triplets", default="rules", help="rules, a RadGraph .json, or a folder with "
                       "landmark_observation_adj_mtx.npy and train.json")
    group.add_argument("--workers", type=int, help="processes (default: one a core)")


def load_from_args(args):
    """load() with a script's flags; the data set is args.dataset or args.data."""
    dataset = getattr(args, "dataset", None) or args.data
    size = args.prepared_size
    if size is None and dataset != "synthetic":
        size = max(256, getattr(args, "image_size", None) or 0)
    return load(dataset, args.root, size=size, views=args.views, cache_dir=args.cache_dir,
                workers=args.workers, split_file=args.split_file, uncertain=args.uncertain,
                labels=args.labels, triplets=args.triplets)


def print_receipt(receipt):
    for key, value in receipt.items():
        if key in ("made_from", "unusable", "unusable_stamp", "skipped_files"):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{k} {v}" for k, v in value.items() if not isinstance(v, dict)) or None
        if value is not None:
            print(f"{key.replace('_', ' '):<18} {value}")
    if any(isinstance(v, dict) for v in receipt["labels"].values()):
        print(f"{'label':<28}{'present':>9}{'absent':>9}{'uncertain':>11}{'blank':>9}")
        for name, count in receipt["labels"].items():
            print(f"{name:<28}{count['present']:>9}{count['absent']:>9}{count['uncertain']:>11}"
                  f"{count['blank']:>9}")


def parse_args(argv=None):
    parser = Parser(prog="data.py", description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="synthetic", choices=DATASETS)
    add_data_flags(parser)
    return parser.parse_args(argv)


def main(args):
    print_receipt(load_from_args(args).receipt)


if __name__ == "__main__":
    try:
        main(parse_args())
    except InputError as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
