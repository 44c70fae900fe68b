"""What is the encoder worth? A new head on it, from 1, 10 or 100 % of a data set (Table V).

    python finetune.py --task segmentation --dataset siim --seed 1 --out-dir out/1
    python finetune.py --task classification --dataset nih --init random --unfreeze
    python finetune.py --task classification --ratio 0.1    # phantoms; a minute, after train.py

Classification is a linear layer on the mean of the encoder's last map, segmentation a U-shaped
decoder on its maps of every resolution. The weights are written beside the scores, as .pt.

Differs from the paper and the released code:
- The encoder is frozen as in the paper, batch norm too (released: trained along). Its features are
  standardised for classification, so that one learning rate suits an encoder of any scale.
- `--protocol honest`: the validation part chooses the epoch and the thresholds of labels (masks:
  0.5), and --ratio is of the patients, each class in proportion. `published`, for Table V: all
  images outside the test split are learned from, --ratio is of images at random, and the test split
  chooses, as released, which flatters; by the loss (released: by AUROC), on features of layer3
  (released: an untrained layer4).
- Epochs, rate and weight decay are those of Table II (released, for labels: 200, 1e-5, 0.02).
- dice is a mean over test images with a mask; dice_all, as published, over all, where an empty
  mask left empty counts 1: 0.778 on SIIM for a network that never finds anything.
"""
import copy
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.models.resnet import BasicBlock
from torchvision.ops import Conv2dNormActivation
from torchvision.transforms import v2
from torchvision.tv_tensors import Image, Mask

import data
import figures
import metrics
from checkpoint import load_model
from cli import (InputError, Parser, number, pick_amp, pick_device, print_table, run,
                 save_tensors)
from evaluate import add_flags, write_results
from model import build_backbone
from train import learning_rate

# Flags left out: Table II, then a CPU's minutes. Epochs are added until there are min_steps steps.
COLUMNS = ("epochs", "min_steps", "batch_size", "lr", "warmup_epochs", "backbone", "image_size")
SETTINGS = {
    "classification": (100, 1, 64, 1e-4, 20, "resnet50", 224),
    "segmentation": (1000, 1, 64, 1e-5, 50, "resnet50", 224),
    "synthetic classification": (30, 500, 64, 1e-2, 2, "small", 64),
    "synthetic segmentation": (4, 200, 64, 3e-3, 0.5, "small", 64),
    "covid-chestxray classification": (100, 1, 64, 1e-2, 5, "small", 128),
    "covid-chestxray segmentation": (30, 1, 16, 3e-3, 2, "small", 128)}
PROTOCOLS = {  # splits to learn from, to choose epoch and thresholds by, and to score
    "honest": (["train"], ["validate"], ["test"]),
    "published": (["train", "validate"], ["test"], ["test"])}
CHANNELS = {  # of the maps at 1/2, 1/4, 1/8, 1/16 of the image's size
    "small": (32, 96, 96, 96), "resnet18": (64, 64, 128, 256), "resnet50": (64, 256, 512, 1024)}
MIN_LR, WEIGHT_DECAY = 1e-5, 5e-4  # Table II; the rate goes from MIN_LR to --lr and back
MASKS = {"synthetic": "pneumothorax", "siim": "Pneumothorax", "covid-chestxray": "lung"}


def parse_args(argv=None):
    p = Parser(description=__doc__.split("\n")[0])
    p.add_argument("--task", required=True, choices=["classification", "segmentation"])
    p.add_argument("--ratio", type=number(float, 1e-6, 1), default=1.0, help="share of the data")
    p.add_argument("--protocol", choices=PROTOCOLS, default="honest", help="see the file's head")
    p.add_argument("--label", metavar="A,B", help="only these labels; of masks always one")
    p.add_argument("--init", choices=["pretrained", "random"], default="pretrained")
    p.add_argument("--backbone", choices=CHANNELS, help="of --init random")
    p.add_argument("--unfreeze", action="store_true", help="train the encoder, too")
    p.add_argument("--epochs", type=number(int, 1), help="left out: SETTINGS, as the next two")
    p.add_argument("--lr", type=number(float, 0))
    p.add_argument("--warmup-epochs", type=number(float, 0))
    p.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto")
    add_flags(p)
    return p.parse_args(argv)


def fill_in(args):
    """Gives every flag that was left out its value. Returns the pre-trained model or None."""
    row, model = f"{args.dataset} {args.task}", None
    settings = dict(zip(COLUMNS, SETTINGS.get(row, SETTINGS[args.task])))
    if args.init == "pretrained":
        if args.backbone:
            raise InputError(f"--backbone goes with --init random; {args.checkpoint} has its own")
        model = load_model(args.checkpoint)
        settings["backbone"], size = model.config.backbone, model.config.image_size
        # a row of its own asks for its pixels, even of an encoder that was trained on fewer
        settings["image_size"] = max(size, settings["image_size"]) if row in SETTINGS else size
    given = {name: value for name, value in vars(args).items() if value is not None}
    vars(args).update(settings | given)
    if args.image_size % 16:  # the decoder meets maps at 1/2 to 1/16 of this size
        raise InputError(f"--image-size {args.image_size} is not a multiple of 16")
    args.device = pick_device(args.device)
    args.dtype, why = pick_amp(args.amp, args.device)
    print("  ".join(f"{name} {value}" for name, value in sorted(vars(args).items())), f"({why})")
    return model


class Images(Dataset):
    """N images of some splits, and what is known of them: labels [N,L] or masks [N,s,s]."""
    def __init__(self, args, table, splits, labels):
        self.table, self.size, self.augment, targets = table, args.image_size, False, {}
        for row in np.flatnonzero(np.isin(table.splits, splits)):
            if args.task == "segmentation":
                mask = table.mask(row, labels[0])                               # bool [H,W]
                if mask is not None:
                    targets[row] = metrics.nearest(mask, self.size, self.size)
            else:
                known = table.labels[row, [table.label_names.index(name) for name in labels]]
                if (known >= 0).any():  # -1: unknown
                    targets[row] = known
        self.rows, self.targets = np.array(list(targets)), np.array(list(targets.values()), np.int8)
        if not ((self.targets == 1).any(0) & (self.targets == 0).any(0)).any():
            raise InputError(f"{args.dataset}: the images of {splits} do not both show and lack "
                             f"any of {labels}; see --label (of masks: {MASKS})")
        self.patients = table.patients[self.rows]
        # mirroring is safe: no label and no mask here says left or right
        self.move = v2.Compose([
            v2.Resize([self.size, self.size]), v2.RandomHorizontalFlip(),
            v2.RandomAffine(degrees=5, translate=(0.05, 0.05), scale=(1, 1.2),
                            interpolation=v2.InterpolationMode.BILINEAR)])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, k):
        image = Image(np.array(self.table.images[self.rows[k]]))                # uint8 [1,S,S]
        target = torch.from_numpy(self.targets[k])                              # [L] or [s,s]
        if self.augment:
            # a mask moves with its image; labels stay as they are
            image, target = self.move(image, Mask(target) if target.dim() == 2 else target)
        return data.to_input(image, self.size)[0], target                       # [3,s,s]


def subset(patients, present, ratio, seed, protocol):
    """Which of N images are a share of them. patients: N ids; present: bool [N,L]."""
    rng = np.random.default_rng(seed)  # of its own: the same share for any network
    if protocol == "published":
        return rng.permutation(len(patients))[:max(2, round(ratio * len(patients)))]
    # A patient belongs to the rarest class of any of its images. The patients of each class are
    # shuffled and spread evenly over one queue. A share is the front of the queue: it has the
    # classes in proportion, and 1 % is a part of 10 %.
    names, patient = np.unique(patients, return_inverse=True)                   # patient [N]
    present, nothing = present[:, np.argsort(present.mean(0))], present.shape[1]  # rarest first
    rarest = np.where(present.any(1), present.argmax(1), nothing)               # [N]
    stratum, place = np.full(len(names), nothing), np.empty(len(names))  # of each patient
    np.minimum.at(stratum, patient, rarest)  # of all images of a patient
    for k in np.unique(stratum):
        members = rng.permutation(np.flatnonzero(stratum == k))
        place[members] = np.arange(len(members)) / len(members)
    queue = np.lexsort((stratum, place))  # by place; of equal places the rarer class first
    return np.flatnonzero(np.isin(patient, queue[:max(2, round(ratio * len(names)))]))


class Decoder(nn.Module):
    """The way up of a ResUNet to 1/2 of the image's size, where each place answers for 4 pixels."""
    def __init__(self, channels):
        super().__init__()
        base, below, self.up = channels[0] // 4, 0, nn.ModuleList()
        for beside, width in zip(reversed(channels), (8 * base, 8 * base, 4 * base, 2 * base)):
            self.up.append(nn.Sequential(Conv2dNormActivation(beside + below, width, 1),
                                         BasicBlock(width, width)))
            below = width
        self.last = nn.Conv2d(below, 4, 1)  # one channel for each of the 4 pixels

    def forward(self, maps):  # [B,c,H/2,W/2], [B,c,H/4,W/4], ...
        while len(maps) < 4:  # of `small`: pooled on, to see more than a piece of the chest
            maps = [*maps, F.avg_pool2d(maps[-1], 2)]
        x = self.up[0](maps[3])                                                 # [B,c,H/16,W/16]
        for layer, beside in zip(self.up[1:], (maps[2], maps[1], maps[0])):
            x = layer(torch.cat([beside, F.interpolate(x, scale_factor=2)], 1))
        return F.pixel_shuffle(self.last(x), 2)[:, 0]                           # [B,H,W]


class FineTuned(nn.Module):
    """Backbone and new head: images [B,3,H,W] -> logits, [B,L] of labels or [B,H,W] of a mask."""
    def __init__(self, task, n_labels, backbone, frozen):
        super().__init__()
        self.task, self.frozen = task, frozen
        self.backbone, channels, _, _ = build_backbone(backbone)
        self.backbone.requires_grad_(not frozen)
        if task == "classification":  # batch norm without weights standardises the features
            self.head = nn.Sequential(nn.BatchNorm1d(channels, affine=False),
                                      nn.Linear(channels, n_labels))
        else:
            self.head = Decoder(CHANNELS[backbone])

    def features(self, images):
        """What the head is given: the mean of the last map, or the last map of each resolution."""
        # a frozen batch norm keeps its statistics, else the encoder would change all the same
        self.backbone.train(self.training and not self.frozen)
        x, maps = images, {}
        for layer in self.backbone:
            x = layer(x)
            maps[x.shape[-1]] = x  # a later map of the same resolution takes its place
        return x.mean((2, 3)) if self.task == "classification" else list(maps.values())

    def forward(self, images):
        return self.head(self.features(images))


def loss_of(logits, targets):
    """Cross-entropy over what is known; of masks also 1 - Dice over all given images at once."""
    known = targets >= 0
    loss = F.binary_cross_entropy_with_logits(logits[known], targets[known].float())
    if targets.dim() == 3:
        p = logits.sigmoid()  # the 1 keeps a batch without any mask from dividing by zero
        loss = loss + 1 - (2 * (p * targets).sum() + 1) / (p.sum() + targets.sum() + 1)
    return loss


@torch.no_grad()
def outputs(function, images, args):
    """(function(inputs), targets) of a whole data set, on the CPU."""
    values, targets = [], []
    for inputs, target in DataLoader(images, args.batch_size):
        with torch.autocast(args.device.type, args.dtype, enabled=args.dtype is not None):
            values.append(function(inputs.to(args.device)).float().cpu())  # numpy has no bf16
        targets.append(target)
    return torch.cat(values), torch.cat(targets)                                # [N,...] both


def fit(learner, train, held, args):
    """Train what is not frozen, keep the weights of the lowest loss on `held`; -> the curve."""
    # beside the training on a CPU workers would only take turns with it
    workers = args.workers if args.workers is not None else 4 * (args.device.type == "cuda")
    # the rest of an epoch that fills no batch may be one image, too few for batch norm
    batches = DataLoader(train, args.batch_size, shuffle=True, num_workers=workers,
                         drop_last=len(train) > args.batch_size, persistent_workers=workers > 0)
    epochs = max(args.epochs, math.ceil(args.min_steps / len(batches)))
    total = epochs * len(batches)  # steps
    # stretched where min_steps adds epochs; at most half of a run that --epochs cuts short
    warmup = total * min(args.warmup_epochs / args.epochs, 0.5)
    optimizer = torch.optim.AdamW(learner.parameters(), weight_decay=WEIGHT_DECAY)  # skips frozen
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.dtype == torch.float16)
    step, best, curve = 0, math.inf, []
    for epoch in range(1, epochs + 1):
        learner.train()
        losses = []
        for inputs, targets in batches:
            optimizer.param_groups[0]["lr"] = learning_rate(step, warmup, total, args.lr, MIN_LR)
            with torch.autocast(args.device.type, args.dtype, enabled=args.dtype is not None):
                logits = learner(inputs.to(args.device))                        # [B,L] or [B,s,s]
            loss = loss_of(logits.float(), targets.to(args.device))
            optimizer.zero_grad()
            scaler.scale(loss).backward()  # of fp16, whose small gradients would be 0; else idle
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())  # read once an epoch, so that a GPU is not waited for
            step += 1
        if epoch % max(1, epochs // 20) == 0 or epoch == epochs:  # about 20 times in all
            mean = torch.stack(losses).mean().item()
            validation = loss_of(*outputs(learner.eval(), held, args)).item()
            if not math.isfinite(mean + validation):
                sys.exit(f"finetune.py: the loss is no number in epoch {epoch}; try a lower --lr")
            curve.append({"epoch": epoch, "loss": mean, "validation": validation})
            if validation < best:
                best, weights = validation, copy.deepcopy(learner.state_dict())  # else it changes
    learner.load_state_dict(weights)
    return curve


# Both return (scores, probabilities of the test images, a function that draws into a file).

def score_labels(args, net, labels, train, held, test):
    held_answers = outputs(net, held, args)[0].sigmoid().numpy()
    thresholds = metrics.best_thresholds(held.targets, held_answers)            # [L]
    truth, answers = test.targets, outputs(net, test, args)[0].sigmoid().numpy()  # [N,L]
    scores = metrics.scores_with_intervals(truth, answers, thresholds, labels, args.bootstrap, 0,
                                           test.patients)
    lines = {"thresholds as chosen": scores, "thresholds best on test": scores["customary"]}
    print_table("", lines, ("auroc", "auroc_ci95", "ap", "f1", "acc"))
    return scores, answers, lambda path: figures.draw_classes(path, scores["per_class"])


def score_masks(args, net, labels, train, held, test):
    truth, answers = test.targets == 1, outputs(net, test, args)[0].sigmoid().numpy()  # [N,s,s]
    learned = train.targets[(train.targets == 1).any((1, 2))] == 1
    mean = learned.mean(0) / learned.mean(0).max()  # a fixed region needs no look at the image
    fixed = mean > metrics.best_dice_threshold([mean] * len(learned), learned)  # [s,s]
    scores = metrics.mask_scores(answers > 0.5, truth, fixed, test.patients, args.bootstrap)
    lines = {"network": scores,
             "trivial: a fixed region": {"dice": scores["trivial"]["fixed_dice"]},
             "trivial: always empty": {"dice_all": scores["trivial"]["empty_dice_all"]}}
    print_table("", lines, ("n", "dice", "dice_ci95", "iou", "n_all", "dice_all"))
    films = [{"film": test.table.images[test.rows[k]], "mask": truth[k], "region": answers[k],
              "title": test.table.ids[test.rows[k]][-24:]}
             for k in np.flatnonzero(truth.any((1, 2)))[:8]]  # the first ones that have a mask
    return scores, answers, lambda path: figures.gallery(
        path, films, f"{labels[0]}; cyan: truth; yellow: predicted")


def main(args):
    model = fill_in(args)
    table = data.load_from_args(args, args.image_size, model=model)
    labels = args.label.split(",") if args.label else table.label_names
    if args.task == "segmentation":
        labels = [args.label or MASKS.get(args.dataset, "lung")]
    elif not set(labels) <= set(table.label_names):
        raise InputError(f"--label {args.label}: {args.dataset} has {table.label_names}")
    splits = PROTOCOLS[args.protocol]
    train, held, test = [Images(args, table, names, labels) for names in splits]
    torch.manual_seed(args.seed)  # new weights, order of the batches, augmentation
    present = train.targets == 1                                                # [N,L] or [N,s,s]
    if args.task == "segmentation":
        present = present.any((1, 2))[:, None]                                  # [N,1]
    share = subset(train.patients, present, args.ratio, args.seed, args.protocol)
    train.rows, train.targets = train.rows[share], train.targets[share]
    print(f"{len(train)} images of {splits[0]} to learn from, {len(held)} of {splits[1]} to choose "
          f"by, {len(test)} to score")

    net = FineTuned(args.task, len(labels), args.backbone, not args.unfreeze)
    if model is not None:
        net.backbone.load_state_dict(model.backbone.state_dict())
    rate = torch.tensor(train.targets == 1).float().mean()  # of positives: there the head starts
    last_layer = net.head[-1] if args.task == "classification" else net.head.last
    nn.init.constant_(last_layer.bias, torch.logit(rate.clamp(0.001, 0.999)))
    net.to(args.device, memory_format=torch.channels_last).eval()  # the layout is faster in bf16
    if args.task == "classification" and not args.unfreeze:  # the same features in each epoch
        features = [TensorDataset(*outputs(net.features, part, args)) for part in (train, held)]
        curve = fit(net.head, *features, args)
    else:
        train.augment = True
        curve = fit(net, train, held, args)

    score = score_labels if args.task == "classification" else score_masks
    scores, answers, draw = score(args, net, labels, train, held, test)
    result = {"task": args.task, "dataset": args.dataset, "labels": labels, **scores,
              "n_train": len(train), "curve": curve, "args": vars(args)}
    arrays = {"ids": table.ids[test.rows], "names": labels, "labels": test.targets,
              "scores": answers}
    stem = Path(args.out_dir, "eval", f"{args.dataset}_finetune-{args.task}")
    save_tensors(f"{stem}.pt", net.state_dict())
    write_results(stem, result, arrays, draw)


if __name__ == "__main__":
    run(main, parse_args)
