"""Fine-tune the image encoder on the labels or masks of 1, 10 or 100 % of a data set (Table V).

    python finetune.py --task classification --dataset nih --ratio 0.01
    python finetune.py --task segmentation --dataset siim --ratio 0.1 --seeds 3
    python finetune.py --task classification --ratio 0.1    # phantoms, a minute after train.py

Classification: a linear layer on the mean of the encoder's last map. Segmentation: a ResUNet
decoder on its maps of every resolution. With `--init random --unfreeze` the whole network is
trained on the labels alone: the supervised rival of pre-training.

Differs from the paper and the released code:
- The encoder is frozen as in the paper, batch-norm statistics too (released: trained along). For
  classification it then sees each image once, not augmented, and the linear layer is fitted to
  standardised features: the same functions, with steps that suit an encoder of any scale.
- The epoch and the thresholds are chosen on the validation split (released: on the test split).
- Dice and IoU are means over the test images that have a mask. Over all images, where an empty mask
  left empty counts 1 (released), they are called dice_all and iou_all.
"""
import copy
import json
import math
import sys
from collections import namedtuple
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import torchvision
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2
from tqdm import tqdm

import data
import figures
from checkpoint import load_model, read_checkpoint
from cli import InputError, Parser, atomic, cores, number, pick_amp, pick_device, run
from metrics import bootstrap, bootstrap_ci, central, class_aurocs, classification_scores
from model import Residual, build_backbone
from train import learning_rate

PAPER = dict(batch_size=64, weight_decay=5e-4, min_lr=1e-5, min_steps=0, backbone="resnet50",
             image_size=224)
SETTINGS = {  # of flags that are left out: Table II, then what two CPU cores finish in minutes
    "classification": dict(PAPER, epochs=100, lr=1e-4, warmup_epochs=20),
    "segmentation": dict(PAPER, epochs=1000, lr=1e-5, warmup_epochs=50),
    "synthetic classification": dict(
        epochs=30, min_steps=500, lr=1e-2, warmup_epochs=2, backbone="small", image_size=64),
    "synthetic segmentation": dict(
        epochs=4, min_steps=200, lr=3e-3, warmup_epochs=0.5, backbone="small", image_size=64),
    "covid-chestxray classification": dict(
        lr=1e-2, warmup_epochs=5, backbone="small", image_size=128),
    "covid-chestxray segmentation": dict(
        epochs=30, lr=3e-3, warmup_epochs=2, batch_size=16, backbone="small", image_size=128)}
MASKS_OF = {"synthetic": "pneumothorax", "siim": "Pneumothorax", "covid-chestxray": "lung"}


def parse_args(argv=None):
    p = Parser(description=__doc__.split("\n")[0])
    data.add_data_flags(p)
    g = p.add_argument_group("what to learn")
    g.add_argument("--task", required=True, choices=["classification", "segmentation"])
    g.add_argument("--dataset", choices=data.DATASETS, default="synthetic")
    g.add_argument("--ratio", type=number(float, 1e-6, 1), default=1.0, help="share of the training "
                   "patients; of one seed, a smaller share lies within a larger one")
    g.add_argument("--label", metavar="A,B", help="only these labels; of masks always one")
    g = p.add_argument_group("encoder")
    g.add_argument("--init", choices=["pretrained", "random", "imagenet"], default="pretrained")
    g.add_argument("--checkpoint", metavar="FILE_OR_HUB_ID", default="out/ckpt.pt")
    g.add_argument("--unfreeze", action="store_true", help="train the encoder along")
    g.add_argument("--backbone", choices=["resnet18", "resnet50", "small"], help="(checkpoint's)")
    g.add_argument("--image-size", type=number(int, 16), help="pixels a side (checkpoint's)")
    g = p.add_argument_group("optimisation (Table II; synthetic, covid-chestxray: a CPU's minutes)")
    g.add_argument("--epochs", type=number(int, 1))
    g.add_argument("--min-steps", type=number(int, 0), help="add epochs until so many steps")
    g.add_argument("--batch-size", type=number(int, 2))
    g.add_argument("--lr", type=number(float, 0), help="peak learning rate")
    g.add_argument("--min-lr", type=number(float, 0), help="where warm-up starts and cosine ends")
    g.add_argument("--warmup-epochs", type=number(float, 0))
    g.add_argument("--weight-decay", type=number(float, 0))
    g.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto")
    g = p.add_argument_group("run")
    g.add_argument("--seed", type=number(int, 0), default=0, help="of subset, weights and order")
    g.add_argument("--seeds", type=number(int, 1), default=1, help="repeat with seed + 1, ...")
    g.add_argument("--bootstrap", type=number(int, 1), default=1000, help="for 95 %% intervals")
    g.add_argument("--device", help="cuda where there is one, else cpu")
    g.add_argument("--out-dir", metavar="DIR", default="out")
    return p.parse_args(argv)


def fill_in(args):
    """Give every flag that was left out its value. Returns the pre-trained model or None."""
    preset = SETTINGS.get(f"{args.dataset} {args.task}", {})
    settings, model = SETTINGS[args.task] | preset, None
    if args.init == "pretrained":
        model = load_model(args.checkpoint)
        settings["backbone"] = model.config.backbone
        settings["image_size"] = max(model.config.image_size, preset.get("image_size", 0))
        if args.backbone not in (None, model.config.backbone):
            raise InputError(f"--backbone {args.backbone}, but {args.checkpoint} holds a "
                             f"{model.config.backbone}; leave --backbone out")
    for name, value in settings.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.image_size % 16:
        raise InputError(f"--image-size {args.image_size} is not a multiple of 16")
    args.device = pick_device(args.device)
    args.dtype, why = pick_amp(args.amp, args.device)
    print(f"{args.backbone}, {args.image_size} pixels, {args.device}, {args.dtype} ({why})")
    return model


# ------------------------------------------------------------------------------ what to learn from

Part = namedtuple("Part", "rows targets")  # rows of the table [N]; labels [N,L] or masks [N,s,s]


def choose_labels(args, table):
    """The names to learn; of masks always one."""
    if args.task == "segmentation":
        return [args.label or MASKS_OF.get(args.dataset, "lung")]
    names = args.label.split(",") if args.label else table.label_names
    for name in names:
        if name not in table.label_names:
            raise InputError(f"{args.dataset} has no label {name}; it has "
                             f"{', '.join(table.label_names)}")
    return names


def read_masks(table, rows, label, size):
    """Part of the rows that somebody looked at, masks scaled to [size,size]."""
    kept, masks = [], []
    for row in tqdm(rows, desc="masks", disable=None, leave=False):
        mask = table.mask(row, label)                                           # bool [H,W]
        if mask is not None:
            kept.append(row)
            masks.append(v2.functional.resize(torch.from_numpy(mask)[None], [size, size],
                                              InterpolationMode.NEAREST_EXACT))
    masks = torch.cat(masks) if masks else torch.zeros(0, size, size)
    return Part(np.array(kept, int), masks.to(torch.int8))


def read_part(args, table, split, labels):
    """The Part of a split: all images of which something is known."""
    rows = table.rows(split)
    if args.task == "segmentation":
        part = read_masks(table, rows, labels[0], args.image_size)
    else:
        columns = [table.label_names.index(name) for name in labels]
        values = table.labels[rows][:, columns]                                 # [N,L], -1 unknown
        known = (values >= 0).any(1)
        part = Part(rows[known], torch.from_numpy(values[known]))
    if not (part.targets == 1).any():
        raise InputError(f"no {split} image of {args.dataset} shows {' or '.join(labels)}; masks "
                         "are in " + ", ".join(f"{name} ({MASKS_OF[name]})" for name in MASKS_OF))
    return part


def nested_subset(patients, present, ratio, seed):
    """Which images to learn from: those of a share of the patients -> int64, ascending.

    patients: N ids; present: bool [N,L]. A patient's stratum is the rarest class of his images. In
    random order, number k of the s patients of a stratum stands at place k / s of a queue, and the
    first of the queue are taken: a smaller share lies within a larger one, every class has its
    proportion, and a rare one is not lost.
    """
    names, patient = np.unique(patients, return_inverse=True)
    stratum = np.full(len(names), -1)  # -1: shows nothing
    rarest_first = np.argsort(present.mean(0))
    for k in reversed(rarest_first):
        stratum[patient[present[:, k]]] = k
    queue, rng = [], np.random.default_rng(seed)
    for rank, k in enumerate([*rarest_first, -1]):
        members = rng.permutation(np.flatnonzero(stratum == k))
        queue += [(place / len(members), rank, who) for place, who in enumerate(members)]
    count = max(1, round(ratio * len(names)))
    chosen = [who for _, _, who in sorted(queue)[:count]]
    return np.flatnonzero(np.isin(patient, chosen))


class Images(Dataset):
    """The images of a part as the network takes them, with their targets."""

    def __init__(self, table, part, size, augment=False):
        self.table, self.part, self.size, self.move = table, part, size, None
        flip = v2.RandomHorizontalFlip()  # safe: no label and no mask here says left or right
        if augment and part.targets.dim() == 2:  # of labels; as in train.py
            self.move = v2.Compose([v2.RandomResizedCrop(size, (0.5, 1.0)), flip])
        elif augment:  # an affine map, for torchvision's resized crop moves masks by half a pixel
            self.move = v2.Compose([
                v2.Resize([size, size]),
                v2.RandomAffine(10, (0.1, 0.1), (1.0, 1.4), interpolation=InterpolationMode.BILINEAR),
                flip, v2.ColorJitter(0.2, 0.2)])

    def __len__(self):
        return len(self.part.rows)

    def __getitem__(self, k):
        image = tv_tensors.Image(self.table.images[self.part.rows[k]])          # uint8 [1,S,S]
        target = self.part.targets[k]
        if self.move and target.dim() == 1:
            image = self.move(image)
        elif self.move:
            image, target = self.move(image, tv_tensors.Mask(target))
        return data.to_input(image, self.size)[0], target                       # [3,s,s]


def loader(dataset, args, shuffle=False):
    workers = cores() if args.workers is None else args.workers
    if isinstance(dataset, TensorDataset):
        workers = 0
    return DataLoader(dataset, args.batch_size, shuffle, num_workers=workers,
                      drop_last=shuffle and len(dataset) > args.batch_size)


# ----------------------------------------------------------------------------------------- networks

def block(channels_in, channels_out, *kernel):
    return nn.Sequential(nn.Conv2d(channels_in, channels_out, *kernel, bias=False),
                         nn.BatchNorm2d(channels_out), nn.ReLU(inplace=True),
                         Residual(channels_out))


class Decoder(nn.Module):
    """The way up of a ResUNet: the image and the backbone's maps -> logits [B,H,W].

    A backbone that stops before 1/16 of the size, as `small` does, is continued to there by new
    layers: a decoder must see more of the chest than a piece of its wall. The way up ends at half
    the size, where each place answers for its four pixels, of which it is shown the image.
    """

    def __init__(self, channels):  # of the maps at 1/2, 1/4, ... of the image's size
        super().__init__()
        base = channels[0] // 4                                                 # ResNet 16, small 8
        widths = [2 * base, 4 * base, 8 * base, 8 * base]                       # at 1/2 ... 1/16
        channels = [channels[0] + 4, *channels[1:]]
        self.down, self.up, below = nn.ModuleList(), nn.ModuleList(), 0
        while len(channels) < 4:
            self.down.append(block(channels[-1], widths[len(channels)], 4, 2, 1))
            channels.append(widths[len(channels)])
        for level in (3, 2, 1, 0):
            self.up.append(block(below + channels[level], widths[level], 1))
            below = widths[level]
        self.last = nn.Conv2d(below, 4, 1)

    def forward(self, maps):  # [B,3,H,W], [B,c,H/2,W/2], [B,c,H/4,W/4], ...
        image, half, *deeper = maps
        skips = [torch.cat([half, F.pixel_unshuffle(image[:, :1], 2)], 1), *deeper]
        for layer in self.down:
            skips.append(layer(skips[-1]))
        x = self.up[0](skips.pop())                                             # [B,c,H/16,W/16]
        for layer in self.up[1:]:
            x = layer(torch.cat([F.interpolate(x, scale_factor=2), skips.pop()], 1))
        return F.pixel_shuffle(self.last(x), 2)[:, 0]                           # [B,H,W]


class FineTuned(nn.Module):
    """Backbone and new head: images [B,3,H,W] -> logits, [B,L] of labels or [B,H,W] of a mask."""

    def __init__(self, task, labels, backbone, image_size, frozen):
        super().__init__()
        self.config = dict(task=task, labels=labels, backbone=backbone, image_size=image_size,
                           frozen=frozen)
        self.backbone, channels, _, _ = build_backbone(backbone)
        self.backbone.requires_grad_(not frozen)
        if task == "classification":  # batch norm without weights standardises the features
            self.head = nn.Sequential(nn.BatchNorm1d(channels, affine=False),
                                      nn.Linear(channels, len(labels)))
        else:
            self.eval()  # or the zeros would count in the batch-norm statistics
            self.head = Decoder([x.shape[1] for x in self.features(torch.zeros(1, 3, 32, 32))[1:]])

    def train(self, mode=True):
        super().train(mode)
        self.backbone.train(mode and not self.config["frozen"])
        return self

    def features(self, images):
        """What the head is given: [B,C], or [the images, the last map at 1/2 of their size, ...]."""
        maps, x = [], images
        for layer in self.backbone:
            y = layer(x)
            if y.shape[-1] < x.shape[-1]:
                maps.append(x)
            x = y
        return x.mean((2, 3)) if self.config["task"] == "classification" else [*maps, x]

    def forward(self, images):
        return self.head(self.features(images))


def build(args, labels, model):
    """A network with a new head on the encoder that --init asks for."""
    net = FineTuned(args.task, labels, args.backbone, args.image_size, not args.unfreeze)
    if args.init == "pretrained":
        net.backbone.load_state_dict(model.backbone.state_dict())
    if args.init == "imagenet":
        try:
            resnet = torchvision.models.get_model(args.backbone, weights="IMAGENET1K_V1")
        except (OSError, ValueError) as error:
            raise InputError(f"ImageNet weights of {args.backbone}: {error}; choose another --init "
                             "or --backbone, or put torchvision's file into "
                             f"{torch.hub.get_dir()}/checkpoints") from None
        net.backbone.load_state_dict(nn.Sequential(*list(resnet.children())[:7]).state_dict())
    return net.to(args.device, memory_format=torch.channels_last)


def load_finetuned(path, map_location="cpu"):
    """The network of a finetune-*.pt in eval mode; `.config` has task, labels and image_size.

    Call it on data.to_input(images, image_size); the sigmoid of its answer is a probability.
    InputError for a file that is missing, damaged or of another kind.
    """
    saved = read_checkpoint(path, map_location)
    try:
        net = FineTuned(**saved["config"]).to(map_location)
        net.load_state_dict(saved["model"])
    except (KeyError, TypeError, RuntimeError):
        raise InputError(f"{path} was not written by this finetune.py") from None
    return net.eval()


# ----------------------------------------------------------------------------------------- training

def autocast(args):
    return torch.autocast(args.device.type, args.dtype, enabled=args.dtype is not None)


@torch.no_grad()
def outputs(function, dataset, args):
    """(function(inputs), targets) of a whole data set, on the CPU."""
    values, targets = [], []
    for inputs, target in loader(dataset, args):
        with autocast(args):
            values.append(function(inputs.to(args.device)).float().cpu())
        targets.append(target)
    return torch.cat(values), torch.cat(targets)


def loss_of(logits, targets):
    """Cross-entropy over what is known; of masks also 1 - Dice, over the whole batch, for a mean of
    Dices would be ruled by the images whose mask is empty."""
    known = targets >= 0
    loss = F.binary_cross_entropy_with_logits(logits[known], targets[known].float())
    if targets.dim() == 3:
        p = logits.sigmoid()
        loss = loss + 1 - (2 * (p * targets).sum() + 1) / (p.sum() + targets.sum() + 1)
    return loss


def validation_score(logits, targets):
    """What chooses the epoch: macro AUROC, or the Dice of all pixels of all images together, which
    minds both a lesion missed and one invented. None where no class is both present and absent."""
    if targets.dim() == 2:
        return classification_scores(targets, logits)["auroc"]
    guess = logits > 0
    return float(2 * (guess & (targets == 1)).sum() / (guess.sum() + targets.sum()))


def fit(learner, train, held, args):
    """Train what is not frozen and leave the learner as it was at its best validation score, which
    is asked about 20 times. Returns the curve: epoch, loss, validation score."""
    batches = loader(train, args, shuffle=True)
    epochs = max(args.epochs, math.ceil(args.min_steps / len(batches)))
    total = epochs * len(batches)
    warmup = total * args.warmup_epochs / args.epochs  # stretched where --min-steps adds epochs
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad],
                                  weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.dtype == torch.float16)
    step, best, weights, curve = 0, -1.0, None, []
    for epoch in tqdm(range(1, epochs + 1), unit="epoch", disable=None, leave=False):
        learner.train()
        losses = []
        for inputs, targets in batches:
            optimizer.param_groups[0]["lr"] = learning_rate(step, warmup, total, args.lr,
                                                            args.min_lr)
            with autocast(args):
                logits = learner(inputs.to(args.device))
            loss = loss_of(logits.float(), targets.to(args.device))
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
            step += 1
        if epoch % max(1, epochs // 20) and epoch < epochs:
            continue
        mean = torch.stack(losses).mean().item()
        if not math.isfinite(mean):
            sys.exit(f"finetune.py: the loss is no number in epoch {epoch}; try a lower --lr")
        learner.eval()
        score = validation_score(*outputs(learner, held, args))
        curve.append({"epoch": epoch, "loss": mean, "validation": score})
        if score is None or score > best:
            best = -1.0 if score is None else score
            weights = copy.deepcopy(learner.state_dict())
    learner.load_state_dict(weights)
    learner.eval()
    return curve


# ------------------------------------------------------------------------------- the test, once

def score_labels(labels, held, test, patients, args):
    """Metrics of probabilities: held and test are (probabilities [N,L], labels [N,L])."""
    chosen = classification_scores(held[1], held[0], names=labels)["threshold"]
    thresholds = [0.5 if chosen[name] is None else chosen[name] for name in labels]
    metrics = classification_scores(test[1], test[0], thresholds, labels)
    metrics["customary"] = classification_scores(test[1], test[0], None, labels)
    resampled = bootstrap(class_aurocs, test[1], test[0], args.bootstrap, 0, patients)  # [n,L+1]
    metrics["auroc_ci95"] = central(resampled[:, -1])
    print(f"{'':<24}{'n+':>6}{'AUROC':>8}{'95 %':>16}{'F1':>8}{'ACC':>8}{'F1*':>8}{'ACC*':>8}")
    for k, name in enumerate(labels):
        metrics["per_class"][name]["auroc_ci95"] = central(resampled[:, k])
    return metrics


def dice_iou(guess, masks):
    """(Dice [N], IoU [N]) of bool [N,s,s] each; 1 where both are empty."""
    both = (guess & masks).sum((1, 2))
    either = (guess | masks).sum((1, 2))
    empty = either == 0
    return (np.where(empty, 1, 2 * both / np.maximum(both + either, 1)),
            np.where(empty, 1, both / np.maximum(either, 1)))
