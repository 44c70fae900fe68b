"""Fine-tune the image encoder on the labels or masks of 1, 10 or 100 % of a data set (Table V).

    python finetune.py --task segmentation --dataset siim --ratio 0.1 --seeds 3
    python finetune.py --task classification --dataset nih --init random --unfreeze
    python finetune.py --task classification --ratio 0.1    # phantoms; a minute, after train.py

Classification is a linear layer on the mean of the encoder's last map, segmentation a ResUNet
decoder on its maps of every resolution; masks are learned and scored at the image size.

Differs from the paper and the released code:
- The encoder is frozen as in the paper, batch-norm statistics too (released: trained along). It
  sees each image once for classification, not augmented, and its features are standardised, so
  that one learning rate suits an encoder of any scale.
- The epoch, and for labels the thresholds, come from validation (released: from the test split).
- Dice and IoU are means over test images with a mask; dice_all, iou_all over all images, where an
  empty mask left empty counts 1 (released).
"""
import copy
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchvision.transforms import v2
from torchvision.tv_tensors import Image, Mask

import data
import figures
from checkpoint import load_model, read_checkpoint
from cli import InputError, Parser, atomic, number, pick_amp, pick_device, run
from metrics import (best_dice_threshold, classification_scores, mask_scores, nearest,
                     scores_with_intervals)
from model import Residual, build_backbone
from train import learning_rate

PAPER = dict(batch_size=64, weight_decay=5e-4, min_lr=1e-5, min_steps=1, backbone="resnet50",
             image_size=224)
SMALL = dict(backbone="small", image_size=64)
# Values of flags that are left out: Table II, then what two CPU cores finish in minutes. Epochs are
# added until there are min_steps steps; the learning rate rises from min_lr to lr and falls again.
SETTINGS = {
    "classification": dict(PAPER, epochs=100, lr=1e-4, warmup_epochs=20),
    "segmentation": dict(PAPER, epochs=1000, lr=1e-5, warmup_epochs=50),
    "synthetic classification": dict(SMALL, epochs=30, min_steps=500, lr=1e-2, warmup_epochs=2),
    "synthetic segmentation": dict(SMALL, epochs=4, min_steps=200, lr=3e-3, warmup_epochs=0.5),
    "covid-chestxray classification": dict(SMALL, image_size=128, lr=1e-2, warmup_epochs=5),
    "covid-chestxray segmentation": dict(SMALL, image_size=128, epochs=30, batch_size=16, lr=3e-3,
                                         warmup_epochs=2)}
CHANNELS = {  # of the backbone's last map at 1/2, 1/4, 1/8, 1/16 of the image's size
    "small": (32, 96), "resnet18": (64, 64, 128, 256), "resnet50": (64, 256, 512, 1024)}
MASKS = {"synthetic": "pneumothorax", "siim": "Pneumothorax", "covid-chestxray": "lung"}


def parse_args(argv=None):
    p = Parser(description=__doc__.split("\n")[0])
    data.add_data_flags(p)
    g = p.add_argument_group("what to learn, with which encoder")
    g.add_argument("--task", required=True, choices=["classification", "segmentation"])
    g.add_argument("--dataset", choices=data.DATASETS, default="synthetic")
    g.add_argument("--ratio", type=number(float, 1e-6, 1), default=1.0, help="of the patients")
    g.add_argument("--label", metavar="A,B", help="only these labels; of masks always one")
    g.add_argument("--init", choices=["pretrained", "random"], default="pretrained")
    g.add_argument("--checkpoint", metavar="FILE_OR_HUB_ID", default="out/ckpt.pt")
    g.add_argument("--backbone", choices=["resnet18", "resnet50", "small"], help="(checkpoint's)")
    g.add_argument("--unfreeze", action="store_true", help="train the encoder, too")
    g = p.add_argument_group("training (Table II; synthetic, covid-chestxray: a CPU's minutes)")
    for flag in ("--image-size", "--epochs", "--min-steps", "--batch-size"):
        g.add_argument(flag, type=number(int, 1))
    for flag in ("--lr", "--min-lr", "--warmup-epochs", "--weight-decay"):
        g.add_argument(flag, type=number(float, 0))
    g.add_argument("--seed", type=number(int, 0), default=0, help="of subset, weights and order")
    g.add_argument("--seeds", type=number(int, 1), default=1, help="repeat with seed + 1, ...")
    g.add_argument("--bootstrap", type=number(int, 1), default=1000, help="for 95 %% intervals")
    g.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto")
    g.add_argument("--device", help="cuda where there is one, else cpu")
    g.add_argument("--out-dir", metavar="DIR", default="out")
    return p.parse_args(argv)


def fill_in(args):
    """Give every flag that was left out its value. Returns the pre-trained model or None."""
    preset, model = SETTINGS.get(f"{args.dataset} {args.task}", {}), None
    settings = SETTINGS[args.task] | preset
    if args.init == "pretrained":
        model = load_model(args.checkpoint)
        settings["backbone"] = model.config.backbone
        settings["image_size"] = max(model.config.image_size, preset.get("image_size", 0))
        if args.backbone not in (None, model.config.backbone):
            raise InputError(f"{args.checkpoint} holds a {model.config.backbone}, not a "
                             f"{args.backbone}; leave --backbone out")
    for name, value in settings.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.image_size % 16:
        raise InputError(f"--image-size {args.image_size} is not a multiple of 16")
    args.device = pick_device(args.device)
    args.dtype, why = pick_amp(args.amp, args.device)
    print("  ".join(f"{name} {value}" for name, value in sorted(vars(args).items())), f"({why})")
    return model


class Images(Dataset):
    """Rows [N] of a table with what is to be learned of them: labels [N,L] or masks [N,s,s]."""
    def __init__(self, table, rows, targets, size, augment=False):
        self.table, self.rows, self.targets, self.size = table, rows, targets, size
        self.patients, self.augment = np.array(table.patients)[rows], augment
        affine = v2.RandomAffine(degrees=5, translate=(0.05, 0.05), scale=(1, 1.2),
                                 interpolation=v2.InterpolationMode.BILINEAR)
        # mirroring is safe: no label and no mask here says left or right
        self.move = v2.Compose([v2.Resize([size, size]), v2.RandomHorizontalFlip(), affine])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, k):
        image = Image(np.array(self.table.images[self.rows[k]]))                # uint8 [1,S,S]
        target = self.targets[k]
        if target.dim() == 2:
            target = Mask(target)  # moves with its image; labels stay as they are
        if self.augment:
            image, target = self.move(image, target)                            # uint8 [1,s,s]
        return data.to_input(image, self.size)[0], target                       # [3,s,s]


def read_split(args, table, split, labels):
    """The Images of a split of which something is known; masks are scaled to the image size."""
    rows, targets = [], []
    for row in table.rows(split):
        if args.task == "segmentation":
            mask = table.mask(row, labels[0])                                   # bool [H,W]
            target = None if mask is None else nearest(mask, args.image_size, args.image_size)
        else:
            target = table.labels[row, [table.label_names.index(name) for name in labels]]
        if target is not None and (target >= 0).any():                          # -1: unknown
            rows.append(row)
            targets.append(target)
    targets = torch.from_numpy(np.array(targets, np.int8))
    if not ((targets == 1).any(0) & (targets == 0).any(0)).any():
        raise InputError(f"the {split} images of {args.dataset} do not both show and lack any of "
                         f"{labels}; data sets with masks: {MASKS}")
    return Images(table, np.array(rows), targets, args.image_size)


def nested_subset(patients, present, ratio, seed):
    """Rows of the images of a share of the patients. patients: N ids; present: bool [N,L].
    A stratum is the patients of one rarest class. In random order, number k of its s patients
    stands at place k / s of a queue: a smaller share lies within a larger one."""
    names, patient = np.unique(patients, return_inverse=True)
    rarest_first = np.argsort(present.mean(0))
    stratum = np.full(len(names), -1)  # -1: shows nothing
    for k in reversed(rarest_first):
        stratum[patient[present[:, k]]] = k
    queue, rng = [], np.random.default_rng(seed)
    for rank, k in enumerate([*rarest_first, -1]):
        members = rng.permutation(np.flatnonzero(stratum == k))
        queue += [(place / len(members), rank, who) for place, who in enumerate(members)]
    chosen = [who for _, _, who in sorted(queue)[:max(1, round(ratio * len(names)))]]
    return np.flatnonzero(np.isin(patient, chosen))


def block(channels_in, channels_out, kernel=1, stride=1, padding=0):
    convolution = nn.Conv2d(channels_in, channels_out, kernel, stride, padding, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU(),
                         Residual(channels_out))


class Decoder(nn.Module):
    """The way up of a ResUNet to 1/2 of the image's size, where each place answers for 4 pixels.
    `small` stops before 1/16 and is continued to there, to see more than a piece of the chest."""
    def __init__(self, channels):
        super().__init__()
        base, channels, below = channels[0] // 4, list(channels), 0
        widths = (2 * base, 4 * base, 8 * base, 8 * base)  # at 1/2, 1/4, 1/8, 1/16
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        while len(channels) < 4:
            width = widths[len(channels)]
            self.down.append(block(channels[-1], width, 4, 2, 1))
            channels.append(width)
        for level in (3, 2, 1, 0):
            self.up.append(block(channels[level] + below, widths[level]))
            below = widths[level]
        self.last = nn.Conv2d(below, 4, 1)

    def forward(self, maps):  # [B,c,H/2,W/2], [B,c,H/4,W/4], ...
        for layer in self.down:
            maps = [*maps, layer(maps[-1])]
        x = self.up[0](maps[3])                                                 # [B,c,H/16,W/16]
        for layer, level in zip(self.up[1:], (2, 1, 0)):
            x = layer(torch.cat([maps[level], F.interpolate(x, scale_factor=2)], 1))
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
            self.head = Decoder(CHANNELS[backbone])

    def train(self, mode=True):
        super().train(mode)
        self.backbone.train(mode and not self.config["frozen"])
        return self

    def features(self, images):
        """What the head is given: the mean of the last map, or the last map of each resolution."""
        x, maps = images, {}
        for layer in self.backbone:
            x = layer(x)
            maps[x.shape[-1]] = x
        return x.mean((2, 3)) if self.config["task"] == "classification" else list(maps.values())

    def forward(self, images):
        return self.head(self.features(images))


def loss_of(logits, targets):
    """Cross-entropy over what is known; of masks also 1 - Dice over all images at once."""
    known = targets >= 0
    loss = F.binary_cross_entropy_with_logits(logits[known], targets[known].float())
    if targets.dim() == 3:
        p = logits.sigmoid()
        loss = loss + 1 - (2 * (p * targets).sum() + 1) / (p.sum() + targets.sum() + 1)
    return loss


@torch.no_grad()
def outputs(function, images, args):
    """(function(inputs), targets) of a whole data set, on the CPU."""
    values, targets = [], []
    for inputs, target in DataLoader(images, args.batch_size):
        with torch.autocast(args.device.type, args.dtype, enabled=args.dtype is not None):
            values.append(function(inputs.to(args.device)).float().cpu())
        targets.append(target)
    return torch.cat(values), torch.cat(targets)


def fit(learner, train, held, args):
    """Train what is not frozen, keep the best of 20 to 39 validations; returns the loss curve."""
    workers = args.workers
    if workers is None:  # beside the training on a CPU they would only take turns with it
        workers = 4 if args.device.type == "cuda" else 0
    batches = DataLoader(train, args.batch_size, shuffle=True, num_workers=workers,
                         drop_last=len(train) > args.batch_size, persistent_workers=workers > 0)
    epochs = max(args.epochs, math.ceil(args.min_steps / len(batches)))
    total = epochs * len(batches)
    # stretched where --min-steps adds epochs; at most half of a run that --epochs cuts short
    warmup = total * min(args.warmup_epochs / args.epochs, 0.5)
    optimizer = torch.optim.AdamW([p for p in learner.parameters() if p.requires_grad],
                                  weight_decay=args.weight_decay)
    scaler = torch.amp.GradScaler(args.device.type, enabled=args.dtype == torch.float16)
    step, best, curve = 0, math.inf, []
    for epoch in range(1, epochs + 1):
        learner.train()
        losses = []
        for inputs, targets in batches:
            optimizer.param_groups[0]["lr"] = learning_rate(step, warmup, total, args.lr,
                                                            args.min_lr)
            with torch.autocast(args.device.type, args.dtype, enabled=args.dtype is not None):
                logits = learner(inputs.to(args.device))
            loss = loss_of(logits.float(), targets.to(args.device))
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.detach())
            step += 1
        if epoch % max(1, epochs // 20) == 0 or epoch == epochs:
            mean = torch.stack(losses).mean().item()
            validation = loss_of(*outputs(learner.eval(), held, args)).item()
            if not math.isfinite(mean + validation):
                sys.exit(f"finetune.py: the loss is no number in epoch {epoch}; try a lower --lr")
            curve.append({"epoch": epoch, "loss": mean, "validation": validation})
            if validation < best:
                best, weights = validation, copy.deepcopy(learner.state_dict())
    learner.load_state_dict(weights)
    return curve


def one_run(args, seed, labels, train, held, test, model):
    """One seed, from the subset to the test -> (network, scores, arrays for the .npz)."""
    torch.manual_seed(seed)
    present = train.targets == 1                                                # [N,L] or [N,s,s]
    if args.task == "segmentation":
        present = present.flatten(1).any(1, keepdim=True)                       # [N,1]
    subset = nested_subset(train.patients, present.numpy(), args.ratio, seed)
    train = Images(train.table, train.rows[subset], train.targets[subset], args.image_size)
    print(f"seed {seed}: {len(train)} images to learn from, {len(held)} to choose by")
    if len(train) < 2:
        raise InputError(f"--ratio {args.ratio} leaves {len(train)} image; take a larger one")
    net = FineTuned(args.task, labels, args.backbone, args.image_size, not args.unfreeze)
    if model is not None:
        net.backbone.load_state_dict(model.backbone.state_dict())
    rate = (train.targets == 1).float().mean()  # the head starts at the rate of positives
    last_layer = list(net.head.modules())[-1]
    nn.init.constant_(last_layer.bias, torch.logit(rate.clamp(0.001, 0.999)))
    net.to(args.device, memory_format=torch.channels_last).eval()
    if args.task == "classification" and not args.unfreeze:
        features = [TensorDataset(*outputs(net.features, part, args)) for part in (train, held)]
        curve = fit(net.head, *features, args)
    else:
        train.augment = True
        curve = fit(net, train, held, args)
    logits, targets = outputs(net, test, args)
    if args.task == "classification":
        held_logits, held_labels = outputs(net, held, args)
        best = classification_scores(held_labels, held_logits.sigmoid(), names=labels)["threshold"]
        thresholds = [0.5 if best[name] is None else best[name] for name in labels]
        scores = scores_with_intervals(targets.numpy(), logits.sigmoid().numpy(), thresholds,
                                       labels, args.bootstrap, 0, test.patients)
    else:
        masks = train.targets.numpy() == 1
        masks = masks[masks.any((1, 2))]
        mean = masks.mean(0) / masks.mean(0).max()  # a fixed region needs no look at the image
        fixed = mean > best_dice_threshold([mean] * len(masks), masks)          # [s,s]
        scores = mask_scores(logits.numpy() > 0, targets.numpy() == 1, fixed, test.patients,
                             args.bootstrap)
    arrays = {"ids": [test.table.ids[row] for row in test.rows], "names": labels,
              "labels": targets.numpy(), "scores": logits.sigmoid().numpy()}
    return net, scores | {"seed": seed, "n_train": len(train), "curve": curve}, arrays


def main(args):
    model = fill_in(args)
    table = data.load_from_args(args, args.image_size)
    if args.task == "segmentation":
        labels = [args.label or MASKS.get(args.dataset, "lung")]
    else:
        labels = args.label.split(",") if args.label else table.label_names
        if not set(labels) <= set(table.label_names):
            raise InputError(f"--label {args.label}: {args.dataset} has {table.label_names}")
    splits = [read_split(args, table, split, labels) for split in ("train", "validate", "test")]
    network = Path(args.out_dir, f"finetune-{args.dataset}-{args.task}.pt")
    stem = Path(args.out_dir, "eval", f"{args.dataset}_finetune-{args.task}")
    runs = []
    for seed in range(args.seed, args.seed + args.seeds):
        net, scores, arrays = one_run(args, seed, labels, *splits, model)
        runs.append(scores)
        parts = {"": scores, "at thresholds of the test split, ": scores.get("customary", {}),
                 "trivial answer, ": scores.get("trivial", {})}
        for title, part in parts.items():
            for name, value in part.items():
                if isinstance(value, (float, tuple)):
                    print(f"{title}{name}: {np.round(value, 3)}")
        if seed == args.seed:  # the first one gives the checkpoint, the predictions and the figure
            with atomic(network) as draft:
                torch.save({"model": net.state_dict(), "config": net.config}, draft)
            with atomic(f"{stem}.npz") as draft, open(draft, "wb") as file:
                np.savez_compressed(file, **arrays)
            test, truth, answers = splits[2], arrays["labels"], arrays["scores"]
            with atomic(f"{stem}.png") as draft:
                if args.task == "classification":
                    figures.draw_classes(draft, scores["per_class"], labels, truth, answers)
                else:  # the first test images with a mask, not the best
                    examples = [(test.table.images[test.rows[k]], truth[k] == 1, answers[k],
                                 arrays["ids"][k][-24:])
                                for k in np.flatnonzero(truth.any((1, 2)))[:8]]
                    figures.draw_masks(draft, examples, labels[0])
    result = {"task": args.task, "dataset": args.dataset, "labels": labels, **runs[0],
              "args": vars(args), "runs": runs}
    if args.seeds > 1:
        key = "auroc" if args.task == "classification" else "dice"
        values = [run[key] for run in runs]
        mean, deviation = np.mean(values), np.std(values, ddof=1)
        print(f"over {args.seeds} seeds: {key} {mean:.3f}, deviation {deviation:.3f}")
        result |= {f"{key}_mean": mean, f"{key}_std": deviation}
    with atomic(f"{stem}.json") as draft:
        draft.write_text(json.dumps(result, indent=1, default=str) + "\n")
    with atomic(f"{stem}_curve.png") as draft:
        figures.draw_curves(draft, [run["curve"] for run in runs], "loss")
    print(f"written: {network}, {stem}.json .npz .png _curve.png")


def load_finetuned(path, map_location="cpu"):
    """The network of a finetune-*.pt in eval mode; InputError for any other file."""
    saved = read_checkpoint(path, map_location)
    try:
        net = FineTuned(**saved["config"]).to(map_location)
        net.load_state_dict(saved["model"])
    except (KeyError, TypeError, RuntimeError):
        raise InputError(f"{path} was not written by finetune.py") from None
    return net.eval()


if __name__ == "__main__":
    run(main, parse_args)
