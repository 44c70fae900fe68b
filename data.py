"""Radiographs, labels and reports: prepared once, then batches as fast as memory (Sec. III-A).

    python data.py --dataset mimic --root data/mimic        # prepare, print what is there
    python data.py --dataset nih --root data/nih --check    # read every image, list what is wrong
    python data.py --dataset synthetic                      # draws its data first; half a minute

formats/NAME.py reads one data set as its publisher ships it: label files into Items, at each load.
formats/prepare.py decodes every image to S x S pixels, formats/triplets.py turns every report into
triplets, once. This file makes a Table of both and serves augmented batches.

Differs from the released code:
- Images are decoded and squashed to S x S once; S is 256 (phantoms 64), or more if the model takes
  more. The released loader decodes the full-size file in every epoch, about 90 times the work
  (bench.py). So crops are cut from the squashed image, and small ones are less sharp.
- A mirrored image has left and right exchanged in its triplets; the released code mirrors only the
  pixels, although 25 of the 51 anatomies have a side.
"""
import collections
import hashlib
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image
from torch.utils.data import Dataset, default_collate
from torchvision.transforms.v2 import InterpolationMode, RandomResizedCrop

from cli import InputError, Parser, cores, number, run
from formats import PATHOLOGY
from formats.images import DICOM, read_mask, trouble
from formats.items import FORMATS, find_root, read_items, settle_splits
from formats.prepare import new_folder, prepare_images
from formats.triplets import read_reports
from text import ANATOMIES, PATHOLOGIES, Triplet, existence_matrix, swap_sides

DATASETS = tuple(FORMATS)  # a new one: a file in formats/, its name in formats/items.py

# -------------------------------------------------------------------------------------- the table

class Table:
    """N images of one data set, memory-mapped, with what is known about each.

    images uint8 [N,S,S]; ids, patients [N]; splits [N]: train, validate, test, or skipped where
    the file was unusable. label_names [L] and labels int8 [N,L]: 1, 0, -1 unknown;
    label_pathologies: their names in our vocabulary, or None. reports [N]: the definite triplets of
    each, None where there is no report; has_report bool [N]: where there is such a triplet.
    equalized: whether DICOM files were histogram-equalised. problems: [(kind, what)].
    """

    def __init__(self, dataset, root, items, images, reports, unusable, problems, equalized):
        self.dataset, self.root, self.items, self.images = dataset, root, items, images
        self.size, self.equalized = images.shape[1], equalized
        self.problems = problems + [(why, items[row].path) for row, why in unusable.items()]
        self.ids = np.array([item.id for item in items])
        self.patients = np.array([item.patient for item in items])
        self.splits, self.split_source = settle_splits(items, FORMATS[dataset].SHARES)
        self.splits[list(unusable)] = "skipped"  # these rows stay black
        shared = {}  # equal triplets are one object: MIMIC's would take 0.7 GB in every process
        self.reports = [reports.get(item.id) for item in items]
        for i, found in enumerate(self.reports):
            if found is not None:
                self.reports[i] = [shared.setdefault(tuple(t), Triplet(*t)) for t in found]
        self.has_report = np.array([bool(triplets) for triplets in self.reports])
        self.known = {t.pathology for t in shared.values()}  # pathologies that reports name
        self.hidden = set()  # pathologies that count nowhere, not even as rare: train.py --hold-out
        self.label_names, present = list(FORMATS[dataset].LABELS), []  # present: sets of names
        if dataset == "synthetic":  # by what is in the film, whatever its report says
            present = [{pathology for pathology, _ in item.truth} for item in items]
            self.label_names = sorted(set.union(*present))
        elif not self.label_names:  # ROCOv2 has captions only; what they do not mention is absent
            present = [{t.pathology for t in self.triplets(i) if t.existence == 1}
                       for i in range(len(items))]
            tests = collections.Counter(name for i in self.rows("test") for name in present[i])
            # of fewer than ten an AUROC says little; the last two pathologies are buckets
            self.label_names = [name for name in PATHOLOGIES[:-2] if tests[name] >= 10]
        labels = [item.labels for item in items]  # the publisher's
        if present:
            labels = [[name in found for name in self.label_names] for found in present]
        self.labels = np.array(labels, np.int8)                                 # [N,L]
        self.label_pathologies = [PATHOLOGY.get(name) for name in self.label_names]

    def rows(self, split="all"):
        """Row numbers of a split, or of all usable images."""
        chosen = self.splits != "skipped" if split == "all" else self.splits == split
        return np.flatnonzero(chosen)

    def triplets(self, i):
        """[Triplet] of image i's report, concepts by their own names, without what is in doubt."""
        return [t for t in self.reports[i] or () if t.pathology not in self.hidden]

    def existence(self, rows, pathologies, anatomies):
        """int8 [B,n,m] of the reports of `rows`: 1 present, 0 denied, -1 not mentioned."""
        return np.stack([existence_matrix(self.triplets(i), pathologies, anatomies) for i in rows])

    def truth(self, rows, pathologies, anatomies):
        """int8 [B,n,m] of what phantom.py drew (1) and did not draw (0); None for real data. -1 at
        names that are never drawn ("intact", "both lung bases"): there nobody knows the truth."""
        if self.dataset != "synthetic":  # reports are all that is known, and they leave things out
            return None
        drawn = [[Triplet(*pair, 1) for pair in self.items[i].truth] for i in rows]
        truth = np.stack([existence_matrix(t, pathologies, anatomies, blank=0) for t in drawn])
        names = {name for item in self.items for pair in item.truth for name in pair}
        truth[:, [name not in names for name in anatomies]] = -1                # [B,n,m]
        truth[:, :, [name not in names for name in pathologies]] = -1
        return truth

    def pairs(self, rows, pathologies, anatomies):
        """(int8 [B,n,m], what it is): the pairs as drawn, else as the reports have them."""
        truth = self.truth(rows, pathologies, anatomies)
        if truth is not None:
            return truth, "what was drawn"
        if not self.has_report.any():
            raise InputError(f"{self.dataset} has no reports, so no pairs; try synthetic or mimic")
        stated = self.existence(rows, pathologies, anatomies)
        return np.maximum(stated, 0), "the reports, not mentioned = absent"

    def located(self, i):
        """The labels that masks or boxes locate in image i."""
        return sorted({mask.label for mask in self.items[i].masks})

    def mask(self, i, label):
        """bool [H,W]: image i's masks and boxes of a label joined, boxes on the S x S grid; None
        where nobody looked for it. InputError if a mask file cannot be read."""
        masks = [mask for mask in self.items[i].masks if mask.label == label]
        if not masks:
            looked = label in self.items[i].absent
            return np.zeros((self.size, self.size), bool) if looked else None
        try:
            return np.any([read_mask(self.root, mask, self.size) for mask in masks], axis=0)
        except Exception:  # a decoder raises anything on a damaged file
            path = os.path.join(self.root, masks[0].source)
            raise InputError(f"the mask {path} is {trouble(path)}; download it again") from None


def load(dataset, root=None, size=256, cache_dir=None, views=None, labels="chexpert",
         triplets="rules", equalize=False, workers=cores(), check=False):
    """A data set as a Table. The first call prepares it; later ones map its images into memory.
    size: pixels a side; check: prepare it anew; the rest: see add_data_flags. InputError where the
    data cannot be used."""
    root = Path(root or f"data/{dataset}").absolute()
    if dataset == "synthetic" and not any(root.glob("*")):
        draw_synthetic(root, workers)
    root = find_root(dataset, root)
    items, problems = read_items(dataset, root, views or FORMATS[dataset].VIEWS, labels)
    # other images (another download, other views), size or equalisation: another folder
    digest = hashlib.sha256("\n".join(item.id for item in items).encode()).hexdigest()[:8]
    equalize = equalize and any(item.path.lower().endswith(DICOM) for item in items)
    kind = "-eq" if equalize else ""
    folder = Path(cache_dir or root, f"prepared-{size}{kind}-{digest}")
    try:
        images, unusable = prepare_images(root, items, folder, size, equalize, workers, check)
        reports = read_reports(root, items, folder, triplets, workers, check)
    except (OSError, ValueError) as error:  # no space, a read-only root; a damaged folder
        raise InputError(f"cannot prepare {folder} ({error}); what was finished is kept; delete it "
                         "if it is damaged; --cache-dir DIR puts it elsewhere") from None
    table = Table(dataset, root, items, images, reports, unusable, problems, equalize)
    if not len(table.rows()):  # such as a root without the archive of the images
        raise InputError(f"{root}: none of {len(items)} images can be used: {table.problems[-1]}")
    return table


def draw_synthetic(root, workers, count=12_500):
    """12,500 phantoms of 64 pixels, 8 of 10 patients for training."""
    import phantom  # here, because only a first run needs it
    print(f"drawing {count:,} synthetic radiographs into {root} (once)", file=sys.stderr)
    with new_folder(root) as draft:  # a set that was drawn halfway is never taken for a whole
        phantom.write("mimic", draft, count, workers=workers)


# ---------------------------------------------------------------------------- batches, augmentation

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as released


def to_input(images, size):
    """uint8 [B,S,S] -> float [B,3,size,size], grey in all channels, ImageNet mean and std."""
    images = TF.resize(images[:, None].float(), [size, size], antialias=True)   # [B,1,size,size]
    return TF.normalize(images.expand(-1, 3, -1, -1) / 255, MEAN, STD)


def released_operation(image):
    """One of the ten operations of the released RandAugment, with probability 1/2. Torchvision's
    RandAugment(2, 7) is another one: 14 operations, always applied, at level 7 of 30."""
    choice = int(torch.randint(10, ()))
    if torch.rand(()) >= 0.5:
        return image
    sign = -1 if torch.rand(()) < 0.5 else 1
    shear = sign * math.degrees(math.atan(0.21))  # 0.3 at level 10, so 0.21 at the released 7
    shift = sign * 7                              # pixels, of 10
    how = {"fill": [128], "interpolation": InterpolationMode.BILINEAR}  # grey comes in, as released
    operations = [
        lambda: image,
        lambda: TF.autocontrast(image),
        lambda: TF.equalize(image),
        lambda: TF.adjust_brightness(image, 1.36),  # 0.1 + 1.8 * 0.7, never darker, as released
        lambda: TF.adjust_sharpness(image, 1.36),
        lambda: TF.affine(image, 0, [0, 0], 1, [shear, 0], center=[0, 0], **how),
        lambda: TF.affine(image, 0, [0, 0], 1, [0, shear], center=[0, 0], **how),
        lambda: TF.affine(image, 0, [shift, 0], 1, [0, 0], **how),
        lambda: TF.affine(image, 0, [0, shift], 1, [0, 0], **how),
        lambda: TF.rotate(image, sign * 21, **how)]  # degrees, of 30
    return operations[choice]()


def can_mirror(triplets, anatomies):
    """Whether each query place that a report names has its mirror partner among the queries."""
    named = {t.anatomy for t in triplets} & set(anatomies)
    return all(swap_sides(name) in anatomies for name in named)  # right_atrium, for one, has none


class Batches(Dataset):
    """Training batches by global step number, over all epochs: step s is always the same batch.

    {"images" uint8 [B,size,size], "existence" int8 [B,n,m]}. Use with
    DataLoader(batches, batch_size=None, sampler=range(first_step, last_step)).
    batch_size is the global one; of its images rank r of `world` gets the r-th part.
    flip: "swap" mirrors an image with probability 1/2 and exchanges left and right in its triplets,
    unless `can_mirror` says no; "naive" mirrors and does not exchange (released); "none".
    """

    def __init__(self, table, rows, batch_size, seed, pathologies, anatomies, size, crop=0.2,
                 operations=2, flip="swap", rank=0, world=1):
        self.rows = rows[table.has_report[rows]]  # a film alone teaches nothing here
        self.table, self.batch_size, self.seed = table, batch_size, seed
        self.pathologies, self.anatomies = pathologies, anatomies
        self.operations, self.flip, self.rank, self.world = operations, flip, rank, world
        # released: an area of 0.2 to 1, bicubic
        self.crop = RandomResizedCrop(size, (crop, 1.0), interpolation=InterpolationMode.BICUBIC)

    def __len__(self):  # steps per epoch; the rest is left out
        return max(1, len(self.rows) // self.batch_size)

    def __getitem__(self, step):
        epoch, step = divmod(int(step), len(self))
        # one permutation per epoch, the same in every process: nothing is sent between them
        order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        batch = order[step * self.batch_size:(step + 1) * self.batch_size]
        batch = np.resize(batch, self.batch_size)  # fewer images than one batch: repeated
        part = np.split(batch, self.world)[self.rank]  # train.py checks that this divides
        return default_collate([self.augmented(epoch, int(row)) for row in part])

    def augmented(self, epoch, row):
        """{"images" uint8 [size,size], "existence" int8 [n,m]} of one image."""
        # drawn from (seed, epoch, row): the same for any number of workers and processes
        seed = np.random.SeedSequence([self.seed, epoch, row]).generate_state(1)
        torch.default_generator.manual_seed(int(seed[0]))  # torchvision draws from it
        triplets = self.table.triplets(row)
        image = self.crop(Image.fromarray(self.table.images[row]))  # Pillow: 0.7 ms, tensors 1.3
        mirrored = self.flip != "none" and torch.rand(()) < 0.5  # 0.5 as released
        if mirrored and (self.flip == "naive" or can_mirror(triplets, self.anatomies)):
            image = TF.horizontal_flip(image)
            if self.flip == "swap":
                triplets = [t._replace(anatomy=swap_sides(t.anatomy)) for t in triplets]
        for _ in range(self.operations):  # with replacement, as released
            image = released_operation(image)
        existence = existence_matrix(triplets, self.pathologies, self.anatomies)  # [n,m]
        return {"images": np.array(image), "existence": existence}


# -------------------------------------------------------------------------------------- the command

def add_data_flags(parser):
    """The flags of all scripts that load data; `load_from_args` reads them."""
    g = parser.add_argument_group("data")
    g.add_argument("--root", help="the data as downloaded (data/<dataset>)")
    g.add_argument("--cache-dir", help="where prepared images go (inside the root)")
    g.add_argument("--views", choices=["frontal", "all"], help="default: as formats/ says")
    g.add_argument("--labels", choices=["chexpert", "negbio", "manual"],
                   help="label file of mimic (chexpert); manual: by radiologists")
    g.add_argument("--triplets", help="rules (default), a RadGraph .json, or the folder of "
                   "landmark_observation_adj_mtx.npy and train.json")
    g.add_argument("--equalize", choices=["on", "off"], help="make the histograms of DICOM files "
                   "even, as MIMIC-CXR-JPG's are (default: on for a model of MIMIC)")
    g.add_argument("--workers", type=number(int, 0), help="processes (to prepare data one per "
                   "core; to train 4 with a GPU, none without)")


def equalizes(args, model=None):
    """Whether to equalise DICOM files: what a model of MIMIC-CXR-JPG saw was equalised."""
    if args.equalize is None:
        # a published checkpoint stores no flags; it was trained on MIMIC
        return model is not None and model.args.get("data", "mimic") == "mimic"
    return args.equalize == "on"


def load_from_args(args, image_size=0, check=False, model=None):
    """load() with a script's flags; model: the one that will see the images, if there is one."""
    dataset = args.dataset if "dataset" in args else args.data  # the latter: train.py
    size = max(64 if dataset == "synthetic" else 256, image_size)  # phantoms are drawn at 64
    flags = ("root", "cache_dir", "views", "labels", "triplets", "workers")
    # what was left out is None: load has the defaults
    given = {flag: getattr(args, flag) for flag in flags if getattr(args, flag) is not None}
    return load(dataset, size=size, equalize=equalizes(args, model), check=check, **given)


def find_problems(table):
    """[(kind, what)] of what stops no run."""
    same, splits = collections.defaultdict(list), collections.defaultdict(set)  # ids; splits
    for row in table.rows():
        same[hash(table.images[row].tobytes())].append(table.ids[row])  # MIMIC's pixels: 25 GB
        splits[table.patients[row]].add(table.splits[row])
    problems = [("same image", " = ".join(ids)) for ids in same.values() if len(ids) > 1]
    problems += [("patient in two splits", patient)  # what is tested was trained on
                 for patient, found in splits.items() if len(found) > 1]
    problems += [("report without triplets", table.ids[row])  # the rules may lack a word
                 for row in table.rows() if table.reports[row] == []]
    return problems


def print_receipt(table):
    rows = table.rows()
    print(f"{table.dataset} at {table.root}: {len(rows)} of {len(table.ids)} images can be used, "
          f"{len(set(table.patients[rows]))} patients, {table.size} pixels a side")
    counts = [f"{split} {len(table.rows(split))}" for split in ("train", "validate", "test")]
    print(f"splits    {', '.join(counts)} ({table.split_source})")
    if table.has_report.any():
        reports = [table.reports[i] for i in rows]
        values = [t.existence for i in rows for t in table.triplets(i)]
        print(f"reports   {table.has_report[rows].sum()} with triplets, {reports.count([])} "
              f"without, {reports.count(None)} images have none; {values.count(1)} triplets "
              f"present, {values.count(0)} denied")
    print(f"located   {sum(bool(table.located(i)) for i in rows)} images have boxes or masks")
    print(f"\n{'label':<28}{'present':>9}{'absent':>9}{'unknown':>9}")
    for name, column in zip(table.label_names, table.labels[rows].T):
        print(f"{name:<28}{(column == 1).sum():>9}{(column == 0).sum():>9}{(column < 0).sum():>9}")
    for kind, count in collections.Counter(kind for kind, _ in table.problems).most_common():
        example = next(what for k, what in table.problems if k == kind)
        print(f"{count} x {kind}, such as {example}"[:160])  # paths are long


def parse_args(argv=None):
    parser = Parser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="synthetic", choices=DATASETS)
    add_data_flags(parser)
    parser.add_argument("--check", action="store_true",
                        help="read every image anew; exit status 1 if anything is wrong")
    return parser.parse_args(argv)


def main(args):
    table = load_from_args(args, check=args.check)
    if args.check:
        table.problems += find_problems(table)
    print_receipt(table)
    if args.check and table.problems:
        for kind, what in table.problems:
            print(f"{kind}: {what}")
        sys.exit(1)  # 2 would be a mistake of the user's


if __name__ == "__main__":
    run(main, parse_args)
