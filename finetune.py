"""Fine-tune the image encoder on the labels or masks of 1, 10 or 100 % of a data set (Table V).

    python finetune.py --task classification --dataset nih --ratio 0.01
    python finetune.py --task segmentation --dataset siim --ratio 0.1 --seeds 3
    python finetune.py --task segmentation --dataset covid-chestxray   # lungs, minutes on a CPU
    python finetune.py --task classification --ratio 0.1               # phantoms, after train.py

Writes <out-dir>/finetune-<dataset>-<task>.pt, which load_finetuned() reads, and in <out-dir>/eval
what evaluate.py would (.json, .npz, .png, the same names) and the curves of training.

Dice and IoU are means over the test images that have a mask. Over all images, where an empty mask
left empty counts 1 and any other prediction 0, they are called dice_all and iou_all.

Differs from the paper and the released code in:
- The encoder is frozen as the paper says, batch-norm statistics too (released: trained along).
- The epoch is chosen on the validation split (released: on the test split).
- The linear classifier sees features standardised over the training images: the same family of
  functions, with steps that suit an encoder of any scale.
"""
import argparse
import copy
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from data import DATASETS, InputError, Parser, add_data_flags, load_from_args, to_input
from evaluate import (THRESHOLDS, bootstrap_ci, canvas, classification_scores, finish, overlap,
                      pick_device, print_table, replacing, score_classes, shrink)
from model import (CheckpointError, MeDSLIP, MeDSLIPConfig, Residual, build_backbone,
                   read_checkpoint)

# ------------------------------------------------------------------------------------------- flags

COMMON = dict(
    dataset="synthetic", checkpoint="out/ckpt.pt", init="pretrained", unfreeze=False, ratio=1.0,
    seeds=1, seed=0, label=None, cache_features=None, min_steps=0, bootstrap=1000, out_dir="out",
    root=None, cache_dir=None, prepared_size=None, views=None, split_file=None, uncertain="ignore",
    labels=None, triplets="rules", workers=None)  # the last two lines are data.py's, from root on
TABLE_II = {
    "classification": dict(epochs=100, lr=1e-4, min_lr=1e-5, warmup_epochs=20.0, weight_decay=5e-4,
                           batch_size=64),
    "segmentation": dict(epochs=1000, lr=1e-5, min_lr=1e-5, warmup_epochs=50.0, weight_decay=5e-4,
                         batch_size=64)}
PRESETS = {  # what two CPU cores finish in minutes
    ("synthetic", "classification"): dict(epochs=30, lr=1e-2, warmup_epochs=2.0, min_steps=500),
    ("synthetic", "segmentation"): dict(epochs=4, lr=3e-3, warmup_epochs=0.5, min_steps=200),
    ("covid-chestxray", "classification"): dict(epochs=100, lr=1e-2, warmup_epochs=5.0,
                                                image_size=128),
    ("covid-chestxray", "segmentation"): dict(epochs=30, lr=3e-3, warmup_epochs=2.0, batch_size=16,
                                              image_size=128)}
MASKS_OF = {"synthetic": "pneumothorax", "siim": "Pneumothorax", "covid-chestxray": "lung"}
CACHE_LIMIT = 4 << 30  # bytes of features kept in memory


def parse_args(argv=None):
    """Only the flags given; `resolve` fills in the rest."""
    p = Parser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    add_data_flags(p)
    g = p.add_argument_group("what to learn")
    g.add_argument("--task", required=True, choices=list(TABLE_II))
    g.add_argument("--dataset", choices=DATASETS, help="(synthetic)")
    g.add_argument("--ratio", type=float, help="share of the training patients, 0..1; of one seed "
                   "a smaller share lies within a larger one")
    g.add_argument("--label", metavar="A,B", help="classification: only these; segmentation: whose "
                   "masks (synthetic: pneumothorax, as in SIIM)")
    g = p.add_argument_group("encoder")
    g.add_argument("--init", choices=["pretrained", "random", "imagenet"])
    g.add_argument("--checkpoint", metavar="FILE_OR_HUB_ID", help="if pretrained (out/ckpt.pt)")
    g.add_argument("--unfreeze", action="store_true", help="train the encoder along")
    g.add_argument("--backbone", choices=["resnet18", "resnet50", "small"],
                   help="if not pretrained (resnet50; synthetic and covid-chestxray: small)")
    g.add_argument("--image-size", type=int, help="pixels a side (the checkpoint's; "
                   "covid-chestxray: at least 128)")
    g.add_argument("--cache-features", action=argparse.BooleanOptionalAction,
                   help="frozen encoder: run it once, on images as they are, and keep what it says "
                   "(default where 4 GB hold it); no: augment the images, run it every step")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=int, help="paper: 100, segmentation 1000")
    g.add_argument("--min-steps", type=int, help="add epochs until there are so many steps")
    g.add_argument("--batch-size", type=int)
    g.add_argument("--lr", type=float, help="peak learning rate")
    g.add_argument("--min-lr", type=float, help="where warm-up starts and the cosine ends")
    g.add_argument("--warmup-epochs", type=float)
    g.add_argument("--weight-decay", type=float)
    g = p.add_argument_group("run")
    g.add_argument("--seeds", type=int, help="repeat with seed, seed + 1, ...: mean and deviation")
    g.add_argument("--seed", type=int, help="of the subset, new weights, order and augmentation")
    g.add_argument("--bootstrap", type=int, help="resamples of patients for a 95 %% interval")
    g.add_argument("--device", help="cuda where there is one, else cpu")
    g.add_argument("--out-dir", metavar="DIR")
    return p.parse_args(argv)


def resolve(given):
    """-> (Namespace of every setting, the pre-trained MeDSLIP or None)."""
    given = {k: v for k, v in vars(given).items() if v is not None}
    args = argparse.Namespace(**{**COMMON, **TABLE_II[given["task"]], **given})
    preset, model = PRESETS.get((args.dataset, args.task), {}), None
    if args.init == "pretrained":
        model = MeDSLIP.from_pretrained(args.checkpoint)
        encoder = model.config
        if given.get("backbone", encoder.backbone) != encoder.backbone:
            raise InputError(f"--backbone {args.backbone}, but {args.checkpoint} holds a "
                             f"{encoder.backbone}; leave --backbone out")
    else:
        encoder = MeDSLIPConfig(backbone="small", image_size=64) if preset else MeDSLIPConfig()
    size = max(encoder.image_size, preset.get("image_size", 0))
    args = argparse.Namespace(**{**vars(args), **preset, "backbone": encoder.backbone,
                                 "image_size": size, **given})
    args.device = given.get("device", "cuda" if torch.cuda.is_available() else "cpu")
    pick_device(args.device)
    for name in ("seed", "lr", "min_lr", "weight_decay", "warmup_epochs"):
        if not getattr(args, name) >= 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} is below 0")
    if not 0 < args.ratio <= 1:
        raise InputError(f"--ratio {args.ratio:g} is not in 0..1; the paper has 0.01, 0.1 and 1")
    if min(args.epochs, args.batch_size, args.seeds, args.bootstrap, args.image_size) < 1:
        raise InputError("--epochs, --batch-size, --seeds, --bootstrap, --image-size: at least 1")
    if args.task == "segmentation" and args.image_size % 16:
        raise InputError(f"--image-size {args.image_size} is not a multiple of 16")
    if args.cache_features and args.unfreeze:
        raise InputError("--cache-features needs a frozen encoder; leave out it or --unfreeze")
    if args.init == "imagenet" and args.backbone == "small":
        raise InputError("ImageNet weights are of --backbone resnet18 or resnet50, not of small")
    return args, model


# ------------------------------------------------------------------------------ what to learn from

def nested_subset(patients, present, ratio, seed):
    """Which images to learn from: those of a share of the patients, stratified; int64, ascending.

    patients: N ids; present: bool [N,L]. The patients are put in an order that does not depend on
    the share, and the first ones are taken, so a smaller share lies within a larger one. Their
    stratum is the rarest class among their images, and the k-th patient of a stratum of s stands at
    k / s: each share holds each stratum in proportion, rounded up, so a rare class is not lost.
    """
    names, patient = np.unique(patients, return_inverse=True)
    rate = np.append(present.mean(0), 2.0)                                      # [L+1], last: none
    stratum = np.full(len(names), present.shape[1])
    for k in np.argsort(-rate[:-1]):                                            # the rarest last
        stratum[patient[present[:, k]]] = k
    order = np.random.default_rng(seed).permutation(len(names))
    place = np.zeros(len(names))
    for k in np.unique(stratum):
        some = order[stratum[order] == k]
        place[some] = np.arange(len(some)) / len(some)
    order = order[np.lexsort((rate[stratum[order]], place[order]))]
    return np.flatnonzero(np.isin(patient, order[:max(1, round(ratio * len(names)))]))


def read_masks(table, label, size):
    """{row: bool [size,size]} of the images that somebody drew on, or looked at and left empty.

    Sampled at the middle of each pixel, so masks stay binary. InputError if there are none, or if
    one has not the shape of its image; another number of pixels is fine.
    """
    masks, scaled = {}, 0
    for i in tqdm(table.rows(), desc="masks", unit=" images", disable=None, leave=False):
        mask = table.mask(i, label)
        if mask is not None:
            (height, width), (h, w) = table.shape[i], mask.shape
            if abs(h * width / (w * height) - 1) > 0.02:
                raise InputError(f"the mask of {table.ids[i]} has {w} x {h} pixels, the image "
                                 f"{width} x {height}: not the same picture; mend it, or leave the "
                                 "image out by --split-file")
            scaled += (h, w) != (height, width)
            masks[i] = shrink(mask, size)
    if not any(mask.any() for mask in masks.values()):
        raise InputError(f"{table.dataset} has no masks of {label}; --task segmentation takes "
                         + ", ".join(f"--dataset {d} ({name})" for d, name in MASKS_OF.items()))
    if scaled:
        print(f"{scaled} masks have more or fewer pixels than their image; they are scaled to it")
    return masks


def split_parts(args, table, labels):
    """{split: part}: rows of the images and what to learn of them, int8 [N,L] in {1,0,-1} or masks
    [N,S,S] in {1,0}; features: what `encode` kept, a list of tensors, or None."""
    if args.task == "segmentation":
        targets = read_masks(table, labels[0], args.image_size)
        blank = np.zeros((0, args.image_size, args.image_size))
    else:
        values = table.labels[:, [table.label_names.index(name) for name in labels]]
        targets = {i: values[i] for i in table.rows() if (values[i] >= 0).any()}
        blank = np.zeros((0, len(labels)))
    parts = {}
    for split in ("train", "validate", "test"):
        rows = np.array([i for i in table.rows(split) if i in targets], int)
        values = np.array([targets[i] for i in rows] or blank, np.int8)
        parts[split] = dict(rows=rows, targets=torch.from_numpy(values), features=None)
        if split != "validate" and not {0, 1} <= {*np.unique(values)}:
            raise InputError(f"the {split} split of {args.dataset} has {len(rows)} usable images; "
                             f"they do not both show and lack {' or '.join(labels[:3])}; "
                             "--split-file makes another split")
    return parts


def augment_pair(images, masks, generator):
    """Turn by up to 10 degrees, crop to half the area or more, mirror, brightness and contrast.

    images float [B,3,S,S] and masks [B,S,S] (or None) move together, masks to the nearest pixel so
    that they stay binary. Mirroring is safe: no label and no mask here says left or right.
    """
    u = torch.rand(7, len(images), generator=generator)  # on the CPU: the same on every device
    angle, scale = (u[0] * 2 - 1) * math.radians(10), (1 - 0.5 * u[1]).sqrt()
    mirror, slack = torch.where(u[2] < 0.5, -1.0, 1.0), 1 - scale
    sin, cos = scale * angle.sin(), scale * angle.cos()
    theta = torch.stack([mirror * cos, -sin, (u[3] * 2 - 1) * slack,
                         mirror * sin, cos, (u[4] * 2 - 1) * slack], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta.to(images.device), images.shape, align_corners=False)
    images = F.grid_sample(images, grid, "bilinear", "border", align_corners=False)
    contrast, shift = (u[5:].to(images)[:, :, None, None, None] - 0.5) * 0.4    # [B,1,1,1] each
    images = images * (1 + contrast) + shift
    if masks is not None:
        masks = F.grid_sample(masks[:, None].float(), grid, "nearest", "border",
                              align_corners=False)[:, 0]
    return images, masks


# ----------------------------------------------------------------------------------------- networks

class Linear(nn.Module):
    """The classifier: pooled features, standardised, then one linear layer."""

    def __init__(self, channels, classes):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.last = nn.Linear(channels, classes)

    def forward(self, features):  # [B,C] alone in a list
        return self.last((features[0] - self.mean) / self.std)                  # [B,L]


class Decoder(nn.Module):
    """The way up of a ResUNet. Where the image is s times reduced it is w s channels wide, at most
    8 w, w being a quarter of the backbone's first stage: 16 for a ResNet, 8 for `small`.

    A backbone that stops before s = 16, as `small` does, is first continued to there by new layers:
    a decoder must see more of the chest than a piece of its wall. The last step from half to full
    resolution is no layer: each place answers for its four pixels, of which it is shown the image.
    That halves the time of a step on a CPU.
    """

    def __init__(self, channels, strides):  # of the backbone's stages
        super().__init__()
        channels, strides, base, width = list(channels), list(strides), channels[0] // 4, 0
        channels[0] += 4
        self.down, self.up = nn.ModuleList(), nn.ModuleList()

        def block(c_in, stride, *kernel):
            c = base * min(stride, 8)
            return c, nn.Sequential(nn.Conv2d(c_in, c, *kernel, bias=False), nn.BatchNorm2d(c),
                                    nn.ReLU(inplace=True), Residual(c))
        while strides[-1] < 16:
            strides.append(2 * strides[-1])
            c, layer = block(channels[-1], strides[-1], 4, 2, 1)
            channels.append(c)
            self.down.append(layer)
        for c, stride in zip(channels[::-1], strides[::-1]):
            width, layer = block(c + width, stride, 1)
            self.up.append(layer)
        self.last = nn.Conv2d(width, 4, 1)

    def forward(self, features):  # [B,1,H,W], then [B,c,H/s,W/s] for s = 2, 4, ...
        image, first, *rest = features
        skips = [torch.cat([first, F.pixel_unshuffle(image, 2)], 1), *rest]
        for layer in self.down:
            skips.append(layer(skips[-1]))
        x = self.up[0](skips.pop())
        for layer in self.up[1:]:
            x = layer(torch.cat([F.interpolate(x, scale_factor=2), skips.pop()], 1))
        return F.pixel_shuffle(self.last(x), 2)[:, 0]                           # [B,H,W]


class FineTuned(nn.Module):
    """Backbone and new head: images [B,3,H,W] -> logits, [B,L] of labels or [B,H,W] of a mask."""

    def __init__(self, task, labels, backbone, image_size, frozen):
        super().__init__()
        self.config = dict(task=task, labels=labels, backbone=backbone, image_size=image_size,
                           frozen=frozen)
        self.backbone, channels = build_backbone(backbone)[:2]
        self.backbone.requires_grad_(not frozen)
        x, shapes = torch.zeros(1, 3, 64, 64), []
        self.backbone.eval()  # or these zeros would count in the batch-norm statistics
        with torch.no_grad():
            for layer in self.backbone:
                x = layer(x)
                shapes.append(x.shape)
        # skip connections tap the last child at each resolution
        self.taps = [k for k, shape in enumerate(shapes)
                     if k + 1 == len(shapes) or shapes[k + 1][2] != shape[2]]
        stages = [(shapes[k][1], 64 // shapes[k][2]) for k in self.taps]
        self.head = (Decoder(*zip(*stages)) if task == "segmentation" else
                     Linear(channels, len(labels)))

    def train(self, mode=True):
        super().train(mode)
        self.backbone.train(mode and not self.config["frozen"])  # statistics freeze, too
        return self

    def features(self, images):
        """What the head is given: raw tokens' mean [B,C], or the image and a map a resolution."""
        x, stages = images, [images[:, :1]]
        for k, layer in enumerate(self.backbone):
            x = layer(x)
            if k in self.taps:
                stages.append(x)
        return stages if self.config["task"] == "segmentation" else [x.mean((2, 3))]

    def forward(self, images):
        return self.head(self.features(images))


def build(args, labels, model):
    """A network with a new head on the encoder that --init asks for."""
    torch.manual_seed(args.seed)
    net = FineTuned(args.task, labels, args.backbone, args.image_size, not args.unfreeze)
    if args.init == "pretrained":
        net.backbone.load_state_dict(model.backbone.state_dict())
    elif args.init == "imagenet":
        import torchvision
        try:
            resnet = getattr(torchvision.models, args.backbone)(weights="IMAGENET1K_V1")
        except OSError as error:  # URLError is one
            raise InputError(f"the ImageNet weights of {args.backbone} cannot be downloaded "
                             f"({error}); put torchvision's file into {torch.hub.get_dir()}"
                             "/checkpoints, or choose another --init") from None
        net.backbone.load_state_dict(nn.Sequential(*list(resnet.children())[:7]).state_dict())
    return net.to(args.device, memory_format=torch.channels_last)


def load_finetuned(path, map_location="cpu"):
    """The network of a finetune-*.pt in eval mode; `.config` has task, labels and image_size.

    Call it on data.to_input(images, image_size); the sigmoid of what it returns is a probability.
    CheckpointError for a file that is missing, damaged or of another kind.
    """
    checkpoint = read_checkpoint(path, map_location)
    try:
        net = FineTuned(**checkpoint["config"]).to(map_location)
        net.load_state_dict(checkpoint["model"])
    except (KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"{path} was not written by this finetune.py "
                              f"({' '.join(str(error).split())[:120]})") from None
    return net.eval()


# ----------------------------------------------------------------------------------------- training

def chunks(count, size=64):
    return np.split(np.arange(count), range(size, count, size))


def images_of(table, rows, args):
    images = np.ascontiguousarray(table.images[rows])                           # uint8 [B,S,S]
    return to_input(torch.from_numpy(images).to(args.device), args.image_size)  # [B,3,size,size]


@torch.no_grad()
def encode(net, table, rows, args):
    """The features of images as they are; maps in half precision, plenty for a decoder."""
    if not len(rows):
        return None
    net.eval()
    kind = torch.half if args.task == "segmentation" else torch.float
    parts = [[f.to("cpu", kind) for f in net.features(images_of(table, rows[index], args))]
             for index in chunks(len(rows))]
    return [torch.cat(column) for column in zip(*parts)]


def logits_of(net, table, part, index, args, generator=None):
    """(logits, targets) of some images of a part, from kept features, else from pixels, which are
    augmented where there is a generator."""
    targets = part["targets"][index].to(args.device)
    if part["features"]:
        return net.head([f[index].to(args.device, torch.float) for f in part["features"]]), targets
    images = images_of(table, part["rows"][index], args)
    if generator:
        images, masks = augment_pair(images, targets if targets.dim() == 3 else None, generator)
        targets = targets if masks is None else masks
    return net(images), targets


@torch.no_grad()
def predict(net, table, part, args):
    """Probabilities [N,L] or [N,S,S] on the CPU."""
    net.eval()
    return torch.cat([logits_of(net, table, part, index, args)[0].sigmoid().cpu()
                      for index in chunks(len(part["rows"]))])


def loss_of(logits, targets):
    """Labels: BCE over the known ones. Masks: BCE + 1 - Dice, the latter over the whole batch: a
    mean of Dices an image would be governed by the images whose mask is empty."""
    targets, known = targets.clamp(min=0).float(), (targets >= 0).float()
    bce = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    bce = (bce * known).sum() / known.sum().clamp(min=1)
    if logits.dim() == 2:
        return bce
    p = logits.sigmoid()
    return bce + 1 - (2 * (p * targets).sum() + 1) / (p.sum() + targets.sum() + 1)


def validation_score(net, table, part, args):
    """What chooses the epoch: macro AUROC, or Dice over the pixels of all images at once, which
    minds both a lesion missed and one invented. nan where there is nothing to go by."""
    if not (part["targets"] == 1).any():
        return float("nan")
    scores, targets = predict(net, table, part, args), part["targets"]
    if args.task == "classification":
        auroc = classification_scores(targets.numpy(), scores.numpy())["auroc"]
        return float("nan") if auroc is None else auroc
    guess, truth = scores > 0.5, targets > 0
    return (2 * (guess & truth).sum() / (guess.sum() + truth.sum())).item()


def start(net, table, train, args):
    """Sets the classifier's standardisation, and the bias at the base rate of the targets."""
    targets, axes = train["targets"], (0,) if args.task == "classification" else (0, 1, 2)
    rate = (targets == 1).sum(axes) / (targets >= 0).sum(axes).clamp(min=1)
    net.head.last.bias.data.copy_(torch.logit(rate.clamp(0.001, 0.999)))
    if args.task == "classification":
        x, = train["features"] or encode(net, table, train["rows"][:2048], args)  # [N,C]
        net.head.mean.copy_(x.mean(0))
        net.head.std.copy_(x.std(0, correction=0) + 1e-3 * x.std() + 1e-6)  # channels may be dead


def fit(net, table, train, held, args):
    """Trains what is not frozen and leaves the network as it was at its best validation score.
    It is asked 20 to 39 times, or after each of fewer epochs. Returns the curve: epoch, loss and
    validation score."""
    start(net, table, train, args)
    count, size = len(train["rows"]), args.batch_size
    epochs = max(args.epochs, math.ceil(args.min_steps / math.ceil(count / size)))
    total = epochs * math.ceil(count / size)
    warmup = total * args.warmup_epochs / args.epochs  # stretched when --min-steps adds epochs
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=args.lr,
                                  weight_decay=args.weight_decay)
    learner = net.head if net.config["frozen"] else net
    step, best, curve = 0, (-1.0, None), []
    for epoch in tqdm(range(1, epochs + 1), unit="epoch", disable=None, leave=False):
        order = np.random.default_rng([args.seed, epoch]).permutation(count)
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + epoch)
        losses = 0
        net.train()
        for index in np.split(order, range(size, count, size)):
            part = step / warmup if step < warmup else 0.5 * (
                1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
            optimizer.param_groups[0]["lr"] = args.min_lr + (args.lr - args.min_lr) * part
            with torch.autocast("cuda", torch.bfloat16, enabled=args.device.startswith("cuda")):
                logits, targets = logits_of(net, table, train, index, args, generator)
            loss = loss_of(logits.float(), targets)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses, step = losses + loss.detach() * (len(index) / count), step + 1
        if epoch % max(1, epochs // 20) == 0 or epoch == epochs:
            if not math.isfinite(losses.item()):
                sys.exit(f"finetune.py: the loss is no number in epoch {epoch}; try a lower --lr")
            score = validation_score(net, table, held, args)
            curve.append(dict(epoch=epoch, loss=losses.item(),
                              validation=None if math.isnan(score) else score))
            if not score <= best[0]:  # nan: nothing to choose by, so the last epoch stands
                best = score, copy.deepcopy(learner.state_dict())
    learner.load_state_dict(best[1])
    return curve


# ----------------------------------------------------------------------------------- the test, once

def score_labels(net, table, labels, trained, args):
    """evaluate.py's (metrics, arrays, figure); thresholds from validation, intervals by patient."""
    columns = [labels.index(name) for name in trained]

    def gather(rows):
        part = dict(rows=rows, targets=torch.zeros(len(rows), len(labels)), features=None)
        values = table.labels[rows][:, [table.label_names.index(name) for name in trained]]
        return values, predict(net, table, part, args).double().numpy()[:, columns]

    blocks, arrays, draw = score_classes(argparse.Namespace(**vars(args), split="test"), table,
                                         table.rows("test"), {args.init: trained}, gather)
    return blocks[args.init] | {"n": len(table.rows("test")), "not_learned": [
        name for name in labels if name not in trained]}, arrays, draw


def scale_to(probability, shape):
    """[S,S] -> [H,W] > 0.5, bilinear."""
    x = F.interpolate(probability[None, None].float(), shape, mode="bilinear", align_corners=False)
    return (x[0, 0] > 0.5).numpy()


def dice_iou(mask, guess):
    """Of two bool arrays; (1, 1) if both are empty."""
    both, total = (mask & guess).sum(), mask.sum() + guess.sum()
    return (2 * both / total, both / (total - both)) if total else (1.0, 1.0)


def fixed_mask(masks):
    """What one can say without a look: the part of the mean mask that has the best Dice, [S,S]."""
    masks = masks[masks.flatten(1).any(1)].numpy()[:500] > 0
    mean = masks.mean(0) / masks.mean(0).max()
    dice = np.mean([overlap(mean, mask, THRESHOLDS)[0] for mask in masks], axis=0)
    return torch.from_numpy(mean > THRESHOLDS[dice.argmax()])


def score_masks(net, table, label, train, test, args):
    """(metrics, arrays, figure): what is predicted above 0.5, at the masks' own resolution."""
    values, fixed, scores = [], fixed_mask(train["targets"]), predict(net, table, test, args)
    for i, score in zip(test["rows"], scores):
        mask = table.mask(i, label)
        guess, trivial = scale_to(score, mask.shape), scale_to(fixed, mask.shape)
        values.append([mask.any(), guess.any(), *dice_iou(mask, guess), *dice_iou(mask, trivial)])
    sick, alarm, dice, iou, fixed_dice, _ = np.array(values, float).T           # [N] each
    patients, sick = np.array([table.patients[i] for i in test["rows"]]), sick > 0
    metrics = {"n": int(sick.sum()), "n_all": len(sick), "label": label, "threshold": 0.5,
               "false_alarms": float(alarm[~sick].mean()) if (~sick).any() else None,
               "trivial": {"fixed_dice": float(fixed_dice[sick].mean())}}
    for end, some in (("", sick), ("_all", sick | True)):
        for key, value in (("dice", dice[some]), ("iou", iou[some])):
            metrics[key + end] = float(value.mean())
            metrics[f"{key}{end}_ci95"] = bootstrap_ci(
                lambda _, v: v.mean(), value, value, args.bootstrap, args.seed, patients[some])
    m = metrics
    print_table(["", "n", "Dice", "95 %", "", "IoU", "fixed Dice"], [
        [f"{label}, images with a mask", m["n"], m["dice"], *m["dice_ci95"], m["iou"],
         m["trivial"]["fixed_dice"]],
        ["all, an empty mask left empty = 1", m["n_all"], m["dice_all"], *m["dice_all_ci95"],
         m["iou_all"], None]])
    arrays = dict(ids=np.array([table.ids[i] for i in test["rows"]]), dice=dice, iou=iou,
                  has_mask=sick, predicted_any=alarm > 0,
                  probability=(scores * 255).round().byte().numpy())              # [N,S,S]
    first = np.flatnonzero(sick)[:8]  # the first ones, not the best
    return metrics, arrays, lambda path: draw_masks(path, table, label, [
        (test["rows"][k], scores[k], dice[k]) for k in first])


def draw_masks(path, table, label, examples):
    figure, axes = canvas(-(-len(examples) // 4), 4, 12, 3.4 * -(-len(examples) // 4))
    for axis in axes.flat:
        axis.axis("off")
    for axis, (i, score, dice) in zip(axes.flat, examples):
        mask = table.mask(i, label)
        axis.imshow(table.images[i], cmap="gray",
                    extent=(-0.5, mask.shape[1] - 0.5, mask.shape[0] - 0.5, -0.5))
        for region, colour in ((mask, "cyan"), (scale_to(score, mask.shape), "yellow")):
            if region.any():
                axis.contour(region, [0.5], colors=colour, linewidths=1.1)
        axis.set_title(f"{table.ids[i][-28:]}\nDice {dice:.2f}", fontsize=8)
    figure.suptitle(f"{label}, the first test images with a mask (cyan); yellow: predicted",
                    fontsize=9)
    finish(figure, path)


def draw_curves(path, curves, measure):
    figure, axes = canvas(1, 2, 9, 3.4)
    for axis, key, name in zip(axes[0], ("loss", "validation"), ("loss", f"validation {measure}")):
        for curve in curves:
            axis.plot([p["epoch"] for p in curve], np.array([p[key] for p in curve], float))
        axis.set(xlabel="epoch", ylabel=name)
    finish(figure, path)


# -------------------------------------------------------------------------------------- the command

def choose_labels(args, table):
    if args.task == "segmentation":
        return [args.label or MASKS_OF.get(args.dataset, "lung")]
    names = ([name.strip() for name in args.label.split(",")] if args.label else
             list(table.label_names))
    unknown = [name for name in names if name not in table.label_names]
    if unknown or not names:
        raise InputError(f"{args.dataset} has no label {', '.join(unknown)}; its labels: "
                         f"{', '.join(table.label_names) or 'none'}")
    return names


def one_run(args, table, labels, parts, model):
    """One seed, from the subset to the test -> (metrics, arrays, figure, network)."""
    whole, held = parts["train"], dict(parts["validate"])
    present = whole["targets"].flatten(1) == 1                                  # [N,L]
    if args.task == "segmentation":
        present = present.any(1, keepdim=True)                                  # [N,1]
    patients = np.array([table.patients[i] for i in whole["rows"]])
    index = nested_subset(patients, present.numpy(), args.ratio, args.seed)
    train = dict(rows=whole["rows"][index], targets=whole["targets"][index], features=None)
    if len(index) < len(labels):
        raise InputError(f"--ratio {args.ratio:g} leaves {len(index)} images for {len(labels)} "
                         "classes; take a larger one, or fewer classes by --label")
    targets = train["targets"].unbind(1) if args.task == "classification" else [train["targets"]]
    trained = [name for name, t in zip(labels, targets) if {0, 1} <= {*t.unique().tolist()}]
    for name in [name for name in labels if name not in trained]:
        print(f"{name}: the {len(index)} training images do not both show and lack it; left out")
    if not trained:
        raise InputError(f"--ratio {args.ratio:g}: none of {', '.join(labels)} is both present and "
                         f"absent among the {len(index)} training images; take a larger one")

    net = build(args, labels, model)
    if args.cache_features is not False and not args.unfreeze:
        size = sum(f.nbytes for f in encode(net, table, train["rows"][:1], args))
        size *= len(index) + len(held["rows"])
        if args.cache_features or size < CACHE_LIMIT:
            for part in (train, held):
                part["features"] = encode(net, table, part["rows"], args)
        else:
            print(f"the features would take {size / 1e9:.1f} GB and are not kept")
    weights = sum(p.numel() for p in net.parameters() if p.requires_grad)
    print(f"seed {args.seed}: {len(index)} images of {len({*patients[index]})} patients to learn "
          f"from, {len(held['rows'])} to choose by, {len(parts['test']['rows'])} to test; "
          f"{args.init} encoder, {'trained along' if args.unfreeze else 'frozen'}; {weights:,} "
          f"weights to train; {'features kept' if train['features'] else 'images augmented'}")
    curve = fit(net, table, train, held, args)
    if args.task == "segmentation":
        metrics, arrays, draw = score_masks(net, table, labels[0], train, parts["test"], args)
    else:
        metrics, arrays, draw = score_labels(net, table, labels, trained, args)
    metrics |= {"train_ids": [table.ids[i] for i in train["rows"]], "curve": curve}
    return metrics, arrays, draw, net


def main(args):
    """Every seed. Returns what the JSON holds: metrics of the first seed, which also gives the
    checkpoint and the figures, and some of each under `runs`."""
    args, model = resolve(args)
    stem = Path(args.out_dir) / "eval" / f"{args.dataset}_{args.task}"
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {stem.parent} ({error.strerror}); give another --out-dir")
    table = load_from_args(args)
    labels = choose_labels(args, table)
    print("  ".join(f"{k} {v}" for k, v in sorted(vars(args).items())))
    parts, runs, began = split_parts(args, table, labels), [], time.perf_counter()
    path = Path(args.out_dir) / f"finetune-{args.dataset}-{args.task}.pt"
    keys = ("auroc", "f1", "acc") if args.task == "classification" else ("dice", "iou", "dice_all")
    for seed in range(args.seed, args.seed + args.seeds):
        metrics, arrays, draw, net = one_run(
            argparse.Namespace(**{**vars(args), "seed": seed}), table, labels, parts, model)
        runs.append({"seed": seed} | {k: metrics[k] for k in (*keys, "train_ids", "curve")})
        if seed == args.seed:
            result = dict(task=args.task, dataset=args.dataset, split="test",
                          args=vars(args)) | metrics
            with replacing(path) as draft:
                torch.save({"model": net.state_dict(), "config": net.config, "args": vars(args)},
                           draft)
            with replacing(stem.with_suffix(".npz")) as draft, open(draft, "wb") as f:
                np.savez_compressed(f, **arrays)
            with replacing(stem.with_suffix(".png")) as draft:
                draw(draft)
    for key in keys if args.seeds > 1 else ():
        values = [run[key] for run in runs]
        mean, std = float(np.mean(values)), float(np.std(values, ddof=1))
        result |= {f"{key}_mean": mean, f"{key}_std": std}
        print(f"{key:<10}{mean:.4f} +- {std:.4f} over {args.seeds} seeds")
    result["runs"] = runs
    with replacing(stem.with_suffix(".json")) as draft:
        draft.write_text(json.dumps(result, indent=1) + "\n")
    with replacing(stem.with_name(stem.name + "_curve.png")) as draft:
        draw_curves(draft, [run["curve"] for run in runs], keys[0])
    print(f"{time.perf_counter() - began:.0f} s; written: {path}, {stem}.json .npz .png _curve.png")
    return result


if __name__ == "__main__":
    try:
        main(parse_args())
    except (InputError, CheckpointError) as error:
        print(f"finetune.py: {error}", file=sys.stderr)
        sys.exit(2)
