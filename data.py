"""Radiographs, labels and reports: prepared once, then batches as fast as memory (Sec. III-A).

    python data.py --dataset mimic --root data/mimic        # prepare, print what is there
    python data.py --dataset nih --root data/nih --check    # read every image, list what is wrong
    python data.py --dataset synthetic                      # draws its data first; half a minute

formats/NAME.py reads one data set as its publisher ships it: label files into Items, at each load.
formats/prepare.py decodes every image to S x S pixels and turns every report into triplets, once.
This file makes a Table of both and serves augmented batches.

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
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode, RandomResizedCrop

from cli import InputError, Parser, cores, number, run
from formats import PATHOLOGY
from formats.images import DICOM, read_mask, trouble
from formats.items import FORMATS, find_root, read_items, settle_labels, settle_splits
from formats.prepare import READY, prepare_images, read_reports
from text import ANATOMIES, PATHOLOGIES, Triplet, existence_matrix, swap_sides

DATASETS = tuple(FORMATS)  # a new one: a file in formats/, its name in formats/items.py

# -------------------------------------------------------------------------------------- the table

class Table:
    """N images of one data set, memory-mapped, with what is known about each.

    images uint8 [N,S,S]; ids, patients [N]; splits [N]: train, validate, test, or skipped where
    the file was unusable (that row stays black). label_names [L] and labels int8 [N,L]: 1, 0, -1
    unknown; label_pathologies: their names in our vocabulary, or None. has_report bool [N]:
    whether a report gave a definite triplet. boxes and masks: as the formats' Items have them.
    equalized: whether DICOM files were histogram-equalised.
    """

    def __init__(self, dataset, root, items, names, images, state, reports, uncertain, problems,
                 equalized):
        self.dataset, self.root, self.images, self.size = dataset, root, images, images.shape[1]
        self.equalized, self.problems = equalized, problems
        self.ids, self.patients = [i.id for i in items], [i.patient for i in items]
        self.splits, self.split_source = settle_splits(items, FORMATS[dataset].SHARES)
        self.splits[state != READY] = "skipped"
        self.boxes, self.masks = [i.boxes for i in items], [i.masks for i in items]
        self.absent = [i.absent for i in items]  # labels absent if unmasked; None: all
        self.drawn = [[Triplet(*pair, 1) for pair in i.truth] for i in items]  # phantoms only
        self.names, self.start = reports["names"].tolist(), reports["start"]    # start [N+1]
        self.flat, self.reports_read = reports["cells"], reports["read"]        # [cells,3], [N]
        self.has_report = self.reports_read == 1  # 0: no definite triplet in it; -1: no report
        self.hidden = set()  # left out, also of the bucket of rare findings: train.py --hold-out
        self.label_names, self.labels = list(names), settle_labels(items, names, uncertain)
        if not names and self.has_report.any():  # ROCOv2 has captions only
            self.label_from_reports()
        self.label_pathologies = [PATHOLOGY.get(name) for name in self.label_names]

    def rows(self, split="all"):
        """Row numbers of a split, or of all usable images."""
        chosen = self.splits != "skipped" if split == "all" else self.splits == split
        return np.flatnonzero(chosen)

    def triplets(self, i):
        """[Triplet] of image i's report, concepts by their own names, without what is in doubt."""
        every = [Triplet(self.names[p], self.names[a], int(v))
                 for p, a, v in self.flat[self.start[i]:self.start[i + 1]]]
        return [t for t in every if t.pathology not in self.hidden]

    def existence(self, rows, pathologies, anatomies):
        """int8 [B,n,m] of the reports of `rows`: 1 present, 0 denied, -1 not mentioned."""
        return np.stack([existence_matrix(self.triplets(i), pathologies, anatomies) for i in rows])

    def truth(self, rows, pathologies, anatomies):
        """int8 [B,n,m] of what phantom.py drew (1) and did not draw (0); None for real data. -1 at
        names that are never drawn ("intact", "both lung bases"): there nobody knows the truth."""
        if self.dataset != "synthetic":  # reports are all that is known, and they leave things out
            return None
        truth = np.stack([existence_matrix(self.drawn[i], pathologies, anatomies, blank=0)
                          for i in rows])                                       # [B,n,m]
        drawn = {name for triplets in self.drawn for t in triplets for name in t[:2]}
        truth[:, [name not in drawn for name in anatomies]] = -1
        truth[:, :, [name not in drawn for name in pathologies]] = -1
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

    def label_from_reports(self):
        """Labels of a data set that has none: each pathology that at least ten test reports assert;
        what a report does not mention is absent."""
        names = [name for name in PATHOLOGIES if not name.endswith("_obs")]  # without the buckets
        existence = self.existence(range(len(self.ids)), names, ANATOMIES)      # [N,n,73]
        present = (existence == 1).any(1).astype(np.int8)                       # [N,73]
        often = np.flatnonzero(present[self.rows("test")].sum(0) >= 10)  # else AUROC says little
        self.label_names, self.labels = [names[j] for j in often], present[:, often]

    def located(self, i):
        """The labels that boxes or masks locate in image i."""
        return sorted({mark[0] for mark in (*self.boxes[i], *(self.masks[i] or ()))})

    def mask(self, i, label):
        """bool [H,W]: image i's masks of a label joined; else its boxes filled, on the S x S grid;
        None where nobody looked for it. InputError if a mask file cannot be read."""
        masks = [mask for mask in self.masks[i] or () if mask.label == label]
        if masks:
            try:
                return np.any([read_mask(self.root, mask) for mask in masks], axis=0)  # [H,W]
            except Exception:  # a decoder raises anything on a damaged file
                path = os.path.join(self.root, masks[0].source)
                raise InputError(f"the mask {path} is {trouble(path)}; download it again") from None
        boxes = [box for box in self.boxes[i] if box[0] == label]
        # without a box a label is absent only where somebody looked for it; else unknown
        looked = self.absent[i] is None or label in self.absent[i]
        if not boxes and (self.masks[i] is None or not looked):
            return None
        filled = np.zeros((self.size, self.size), bool)                         # [S,S]
        for _, x, y, width, height in boxes:
            left, right = round(x * self.size), round((x + width) * self.size)
            top, bottom = round(y * self.size), round((y + height) * self.size)
            # a thin box keeps one pixel: an empty mask would say that nothing is there
            filled[top:max(bottom, top + 1), left:max(right, left + 1)] = True
        return filled


def load(dataset, root=None, size=256, views=None, cache_dir=None, workers=None,
         uncertain=None, labels=None, triplets=None, check=False, equalize=False):
    """A data set as a Table. The first call prepares it; later ones map its images into memory.

    size: pixels a side; check: read every image anew and list every problem; the rest: see
    add_data_flags, whose defaults None stands for. InputError where the data cannot be used.
    """
    root = os.path.abspath(root or os.path.join("data", dataset))
    workers = cores() if workers is None else workers
    if dataset == "synthetic" and not (os.path.isdir(root) and os.listdir(root)):
        draw_synthetic(root, workers)
    root, views = find_root(dataset, root), views or FORMATS[dataset].VIEWS
    labels = labels or ("drawn" if dataset == "synthetic" else "chexpert")  # drawn by phantom.py
    names, items, problems = read_items(dataset, root, views, labels)
    # other images (another download, other views) or other pixels: another folder
    digest = hashlib.sha256("\n".join(item.id for item in items).encode()).hexdigest()[:8]
    equalize = equalize and any(item.path.lower().endswith(DICOM) for item in items)
    kind = f"{size}-eq" if equalize else size
    folder = Path(cache_dir or root, f"prepared-{kind}-{digest}")
    try:
        images, state, reasons = prepare_images(root, items, folder, size, workers, check, equalize)
        reports = read_reports(root, items, folder, triplets or "rules", workers)
    except OSError as error:  # no space left, or a root that is read-only
        raise InputError(f"cannot prepare {folder} ({error.strerror}); what was finished is kept; "
                         "--cache-dir DIR puts it elsewhere") from None
    problems += [(reason, items[row].path) for row, reason in reasons.items()]
    table = Table(dataset, root, items, names, images, state, reports, uncertain or "ignore",
                  problems, equalize)
    if not len(table.rows()):
        raise InputError(f"{root}: none of {len(items)} images can be used: {problems[-1]}")
    if check:
        problems += find_problems(table)
    return table


def draw_synthetic(root, workers, count=12_500):
    """12,500 phantoms of 64 pixels, 8 of 10 patients for training."""
    import phantom  # here, because only a first run needs it
    print(f"drawing {count:,} synthetic radiographs into {root} (once)", file=sys.stderr)
    draft = f"{root}.{os.getpid()}"  # so a set that was drawn halfway is never taken for a whole
    try:
        phantom.write("mimic", draft, count, workers=workers)
        os.rename(draft, root)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        if not os.path.isdir(root):  # else another process has drawn the same set meanwhile
            raise InputError(f"cannot draw into {root} ({error.strerror})") from None


# ---------------------------------------------------------------------------- batches, augmentation

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as released


def normalise(images):
    """[B,S,S] in 0..255 -> float [B,3,S,S], grey in all channels, ImageNet mean and std."""
    images = images.float()[:, None].expand(-1, 3, -1, -1) / 255                # [B,3,S,S]
    return TF.normalize(images, MEAN, STD)


def to_input(images, size):
    """uint8 [B,S,S] -> float [B,3,size,size], not augmented."""
    images = TF.resize(images[:, None].float(), [size, size], antialias=True)   # [B,1,size,size]
    return normalise(images[:, 0])


def released_operation(image):
    """One of the ten operations of the released RandAugment, with probability 1/2.

    torchvision's RandAugment(2, 7) is another one: 14 operations, always applied, at level 7 of 30.
    """
    choice = int(torch.randint(10, ()))
    if torch.rand(()) >= 0.5:
        return image
    sign = -1 if torch.rand(()) < 0.5 else 1
    shear = sign * math.degrees(math.atan(0.21))  # 0.3 at level 10, so 0.21 at the released 7
    shift = sign * 7                              # pixels, of 10
    grey, corner = [128], [0, 0]                  # what comes in from outside is grey, as released
    linear = {"interpolation": InterpolationMode.BILINEAR}
    operations = [
        lambda: image,
        lambda: TF.autocontrast(image),
        lambda: TF.equalize(image),
        lambda: TF.adjust_brightness(image, 1.36),  # 0.1 + 1.8 * 0.7, never darker, as released
        lambda: TF.adjust_sharpness(image, 1.36),
        lambda: TF.affine(image, 0, [0, 0], 1, [shear, 0], fill=grey, center=corner, **linear),
        lambda: TF.affine(image, 0, [0, 0], 1, [0, shear], fill=grey, center=corner, **linear),
        lambda: TF.affine(image, 0, [shift, 0], 1, [0, 0], fill=grey, **linear),
        lambda: TF.affine(image, 0, [0, shift], 1, [0, 0], fill=grey, **linear),
        lambda: TF.rotate(image, sign * 21, fill=grey, **linear)]  # degrees, of 30
    return operations[choice]()


def can_mirror(triplets, anatomies):
    """Whether each query place that a report names has its mirror partner among the queries."""
    named = {t.anatomy for t in triplets} & set(anatomies)
    return all(swap_sides(name) in anatomies for name in named)  # right_atrium, for one, has none


class Batches(Dataset):
    """Training batches by global step number: step s is the same batch whenever it is asked for.

    batch_size is the global one; of its images rank r of `world` gets the r-th part. Images without
    a usable report are left out.
    Item: {"images" uint8 [B,size,size], "existence" int8 [B,n,m]}. Use with
    DataLoader(batches, batch_size=None, sampler=range(first_step, last_step)).
    flip: "swap" mirrors an image with probability 1/2 and exchanges left and right in its triplets,
    unless `can_mirror` says no; "naive" mirrors and does not exchange (released); "none".
    """

    def __init__(self, table, rows, batch_size, seed, pathologies, anatomies, size, crop=0.2,
                 operations=2, flip="swap", rank=0, world=1):
        self.rows = rows[table.has_report[rows]]
        self.table, self.batch_size, self.seed = table, batch_size, seed
        self.pathologies, self.anatomies = pathologies, anatomies
        self.operations, self.flip, self.rank, self.world = operations, flip, rank, world
        # released: an area of 0.2 to 1, bicubic
        self.crop = RandomResizedCrop(size, (crop, 1.0), interpolation=InterpolationMode.BICUBIC)
        self.steps = max(1, len(self.rows) // batch_size)  # per epoch; the rest is left out

    def __len__(self):
        return self.steps

    def __getitem__(self, step):
        epoch, step = divmod(int(step), self.steps)
        # one permutation per epoch, the same in every process: nothing is sent between them
        order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)
        batch = order[step * self.batch_size:(step + 1) * self.batch_size]
        batch = np.resize(batch, self.batch_size)  # fewer images than one batch: repeated
        share = self.batch_size // self.world  # train.py sees to it that this divides
        batch = batch[self.rank * share:(self.rank + 1) * share]                # [B]
        images, existence = zip(*[self.augmented(epoch, int(row)) for row in batch])
        return {"images": torch.stack(images), "existence": torch.stack(existence)}

    def augmented(self, epoch, row):
        """(uint8 [size,size], existence int8 [n,m]) of one image."""
        # drawn from (seed, epoch, row): the same for any number of workers and processes
        seed = np.random.SeedSequence([self.seed, epoch, row]).generate_state(1)
        torch.default_generator.manual_seed(int(seed[0]))  # torchvision draws from it
        triplets = self.table.triplets(row)
        image = self.crop(Image.fromarray(self.table.images[row]))  # Pillow: 0.7 ms, tensors 1.3
        mirrored = self.flip != "none" and torch.rand(()) < 0.5  # 0.5 as released
        if mirrored and self.flip == "swap":
            mirrored = can_mirror(triplets, self.anatomies)
        if mirrored:
            image = TF.horizontal_flip(image)
            if self.flip == "swap":
                triplets = [t._replace(anatomy=swap_sides(t.anatomy)) for t in triplets]
        for _ in range(self.operations):  # with replacement, as released
            image = released_operation(image)
        existence = existence_matrix(triplets, self.pathologies, self.anatomies)  # [n,m]
        return torch.from_numpy(np.array(image)), torch.from_numpy(existence)


# -------------------------------------------------------------------------------------- the command

def add_data_flags(parser):
    """The flags that every script shares; `load_from_args` reads them."""
    group = parser.add_argument_group("data")
    group.add_argument("--root", help="the data as downloaded (default data/<dataset>)")
    group.add_argument("--cache-dir", help="where prepared images go (default: inside the root)")
    group.add_argument("--views", choices=("frontal", "all"), help="default: frontal for chexpert, "
                       "openi and covid-chestxray, else all")
    group.add_argument("--uncertain", choices=("ignore", "zeros", "ones"),
                       help="what uncertain labels count as (ignore)")
    group.add_argument("--labels", choices=("chexpert", "negbio", "manual"),
                       help="label file of mimic (chexpert); manual: by radiologists")
    group.add_argument("--triplets", help="rules (default), a RadGraph .json, or the folder of "
                       "landmark_observation_adj_mtx.npy and train.json")
    group.add_argument("--equalize", choices=("on", "off"), help="make the histograms of DICOM "
                       "files even, as MIMIC-CXR-JPG's are (default: on for a model of MIMIC)")
    group.add_argument("--workers", type=number(int, 0), help="processes (default: one per core to "
                       "prepare data; to train 4 with a GPU, none without)")


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
    return load(dataset, args.root, size, args.views, args.cache_dir, args.workers, args.uncertain,
                args.labels, args.triplets, check, equalizes(args, model))


def find_problems(table):
    """[(kind, what)] of what stops no run: equal pixels, one patient in two splits, reports that
    give no triplet."""
    problems, first, split_of = [], {}, {}
    for row in table.rows():
        digest = hashlib.sha256(table.images[row].tobytes()).digest()  # MIMIC's pixels: 25 GB
        twin = first.setdefault(digest, row)
        if twin != row:
            problems.append(("same image", f"{table.ids[row]} = {table.ids[twin]}"))
        split = split_of.setdefault(table.patients[row], table.splits[row])
        if split != table.splits[row]:  # what is tested was trained on
            problems.append(("patient in two splits", table.patients[row]))
        if table.reports_read[row] == 0:  # it teaches nothing; the rules may lack a word
            problems.append(("report without triplets", table.ids[row]))
    return problems


def print_receipt(table):
    rows = table.rows()
    print(f"{table.dataset} at {table.root}: {len(rows)} of {len(table.ids)} images can be used, "
          f"{len({table.patients[i] for i in rows})} patients, {table.size} pixels a side")
    if table.equalized:
        print("DICOM     histogram-equalised")
    counts = [f"{split} {len(table.rows(split))}" for split in ("train", "validate", "test")]
    print(f"splits    {', '.join(counts)} ({table.split_source})")
    if table.has_report.any():
        read = table.reports_read[rows]
        values = np.concatenate([table.flat[table.start[i]:table.start[i + 1], 2] for i in rows])
        print(f"reports   {(read == 1).sum()} with triplets, {(read == 0).sum()} without, "
              f"{(read < 0).sum()} images have none; {(values == 1).sum()} triplets present, "
              f"{(values == 0).sum()} denied")
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
    print_receipt(table)
    if args.check and table.problems:
        for kind, what in table.problems:
            print(f"{kind}: {what}")
        sys.exit(1)  # 2 would be a mistake of the user's


if __name__ == "__main__":
    run(main, parse_args)
