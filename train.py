"""Pre-train MeDSLIP: images and reports in, out/ckpt.pt out (arXiv 2403.10635, Sec. II-III).

    torchrun --nproc_per_node=4 train.py --data mimic          # the paper's sizes on four GPUs
    python train.py                                            # --data synthetic: CPU, minutes
    python train.py --max-steps 60                             # a minute

Dropout and drawn negatives depend on (seed, step, part of the batch) alone, the order of the images
on (seed, epoch), their augmentation on (seed, epoch, row). So a resumed run repeats an
uninterrupted one (on a CPU to the last bit), and two processes learn the weights that one learns
with `--accumulate 2`; the running statistics of batch norm are those of the first process.
`--recipe` sets the rows of RECIPES; RESULTS.md lists what no recipe sets. The other files say at
their top where they differ.
"""
import json
import math
import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from tqdm import tqdm

from checkpoint import ask, build_queries, load_model, training_state
from cli import (InputError, Parser, ignore_sigterm, join_processes, number, open_log, pick_amp,
                 run, save_tensors)
from data import DATASETS, Batches, add_data_flags, load_from_args, to_input
from losses import image_labels, medslip_loss
from metrics import classification_scores
from model import MeDSLIP, MeDSLIPConfig
from text import CLINICAL_BERT

# ------------------------------------------------------------------------------------------- flags

RECIPES = {  # flag: paper, released, ours. Where the paper is silent it gets the released value.
    "mask":        ("sigmoid", "linear", "sigmoid"),    # Eq. 1; Sec. II-B.1: M is in 0..1
    "icl":         ("bare", "dot", "cosine"),           # Eq. 5; dots are about 76 at the start
    "existence":   ("embedding", "embedding", "evidence"),  # Eq. 2; ours: see model.Stream
    "unmentioned": ("negative", "ignore", "negative"),  # Sec. II-A, end
    "proto_from":  ("dropped", "dropped", "queried"),   # paper: silent; I_q after or before dropout
    "place_words": ("published", "published", "ours"),  # "left_pleural", "the left pleural space"
    "flip":        ("naive", "naive", "swap"),          # paper: silent; 25 of 51 places have a side
    "crop":        (0.2, 0.2, "preset"),                # paper: silent; smallest area
    "augment_ops": (2, 2, "preset"),                    # paper: silent; see released_operation
    "init_std":    (0.02, 0.02, 0.0),                   # paper: silent; 0: by width, see model.py
    "schedule":    ("smooth", "released", "smooth"),    # Table II: cosine, 5 epochs of warm-up
    "clip":        (math.inf, math.inf, 1.0),           # paper: silent; 1.0 for safety
    "amp":         ("off", "off", "auto"),              # paper: silent; released: fp32
    "alpha":       (1.0, 1.0, "preset"),                # Table II; preset: by the data, see below
    "beta":        (1.0, 1.0, "preset"),                # likewise
}
FULL_SIZE = dict(  # Table II, Sec. III-B; where they are silent as released. In any recipe
    epochs=100, batch_size=64, lr=1e-4, min_lr=1e-5, warmup_epochs=5.0, weight_decay=0.02,
    backbone="resnet50", image_size=224, dim=256, layers=4, heads=4, dropout=0.1, position="none",
    alpha=1.0, beta=1.0, crop=0.2, augment_ops=2, queries="published", pathologies=75, anatomies=51,
    text_encoder=CLINICAL_BERT, streams="dual", contrast="prototype", separate=0.0, accumulate=1,
    hold_out="", start_from="", seed=0, out_dir="out", log_every=20, save_every=1000)
SYNTHETIC = FULL_SIZE | dict(  # phantoms of 64 pixels on two CPU cores; ICL is a mean over 570
    # pairs, few of them positive: with beta 1 it is learned too slowly
    epochs=4, batch_size=32, lr=2e-3, warmup_epochs=0.6, backbone="small", image_size=64, dim=96,
    layers=2, dropout=0.0, position="sincos", beta=10.0, crop=0.8, augment_ops=0, queries="corpus",
    text_encoder="hashing")
ROCO = FULL_SIZE | dict(  # captions, on one CPU core; with alpha 1 ProtoCL drowns the rest
    epochs=12, batch_size=32, lr=1e-3, warmup_epochs=1.0, weight_decay=0.05, backbone="resnet18",
    image_size=96, layers=1, dropout=0.0, alpha=0.1, crop=0.5, augment_ops=0, queries="corpus",
    text_encoder="hashing", pathologies=16, anatomies=24)
FREE = ("resume max_steps out_dir root cache_dir workers device log_every save_every accumulate "
        "compile").split()  # --resume may change these; the last two and device: not exact


def parse_args(argv=None):
    """The flags as given; `resolve` fills in the rest."""
    p = Parser(description=__doc__.split("\n")[0])
    add_data_flags(p)
    g = p.add_argument_group("what to learn from")
    g.add_argument("--data", choices=DATASETS, help="a data set that has reports (synthetic)")
    g.add_argument("--queries", choices=["published", "corpus"], help="corpus: most frequent here")
    g.add_argument("--pathologies", type=number(int, 1), metavar="M", help="corpus: at most M")
    g.add_argument("--anatomies", type=number(int, 1), metavar="N", help="corpus: at most N")
    g.add_argument("--pathology-book", metavar="FILE", help="the published definitions")
    g.add_argument("--place-words", choices=["ours", "published"], help="of anatomy prompts")
    g.add_argument("--hold-out", metavar="A,B", help="pathologies left out of labels and queries")
    g.add_argument("--text-encoder", metavar="NAME", help="Hugging Face BERT, its folder, hashing")
    g = p.add_argument_group("model")
    g.add_argument("--backbone", choices=["resnet18", "resnet50", "small"])
    g.add_argument("--image-size", type=number(int, 16), help="pixels a side")
    g.add_argument("--dim", type=number(int, 4), help="embedding width D")
    g.add_argument("--layers", type=number(int, 1), help="of each query network")
    g.add_argument("--heads", type=number(int, 1), help="of its attention")
    g.add_argument("--dropout", type=number(float, 0, 0.99))
    g.add_argument("--position", choices=["none", "sincos"], help="embedding added to I^raw")
    g.add_argument("--start-from", metavar="FILE", help="copy all weights of FILE at step 0")
    g.add_argument("--init-std", type=number(float, 0), help="of linear weights; 0: from the data")
    g = p.add_argument_group("ablation (Table VI, and where paper and released code differ)")
    g.add_argument("--recipe", choices=["ours", "paper", "released"], help="see RECIPES")
    g.add_argument("--streams", choices=["dual", "single"], help="single: no anatomy, no mask")
    g.add_argument("--contrast", choices=["prototype", "random", "none"], help="paper: prototype")
    g.add_argument("--alpha", type=number(float, 0), help="weight of ProtoCL (1; roco 0.1)")
    g.add_argument("--beta", type=number(float, 0), help="weight of ICL (1; synthetic 10)")
    g.add_argument("--separate", type=number(float, 0), help="weight of the swap loss (0)")
    g.add_argument("--mask", choices=["sigmoid", "linear", "none", "hard"], help="see model.py")
    g.add_argument("--icl", choices=["cosine", "bare", "dot"], help="bare: Eq. 5 as printed")
    g.add_argument("--existence", choices=["evidence", "embedding"], help="embedding: the paper's")
    g.add_argument("--proto-from", choices=["queried", "dropped"], help="dropped: after dropout")
    g.add_argument("--unmentioned", choices=["negative", "ignore"], help="what reports do not say")
    g.add_argument("--flip", choices=["swap", "none", "naive"], help="naive: sides not exchanged")
    g = p.add_argument_group("augmentation, optimisation, run")
    g.add_argument("--crop", type=number(float, 0.01, 1), help="smallest area of the random crop")
    g.add_argument("--augment-ops", type=number(int, 0), help="operations per image (released: 2)")
    g.add_argument("--epochs", type=number(int, 1))
    g.add_argument("--max-steps", type=number(int, 1), help="stop here; the schedule is unchanged")
    g.add_argument("--batch-size", type=number(int, 1), help="over all processes and parts")
    g.add_argument("--accumulate", type=number(int, 1), help="parts of a step, to save memory")
    g.add_argument("--lr", type=number(float, 0), help="peak learning rate")
    g.add_argument("--min-lr", type=number(float, 0), help="at the start and at the end")
    g.add_argument("--warmup-epochs", type=number(float, 0))
    g.add_argument("--schedule", choices=["smooth", "released"], help="of the learning rate")
    g.add_argument("--weight-decay", type=number(float, 0))
    g.add_argument("--clip", type=number(float, 1e-6), help="largest gradient norm; inf: no limit")
    g.add_argument("--out-dir", metavar="DIR")
    g.add_argument("--resume", action="store_true", help="go on from <out-dir>/ckpt.pt")
    g.add_argument("--seed", type=number(int, 0))
    g.add_argument("--device", help="cuda where there is one, else cpu")
    g.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"], help="auto: see cli.pick_amp")
    g.add_argument("--compile", action="store_true", help="torch.compile the model")
    g.add_argument("--sync-batchnorm", action="store_true", help="one batch norm over all GPUs")
    g.add_argument("--log-every", type=number(int, 1), help="steps")
    g.add_argument("--save-every", type=number(int, 1), help="steps, beside the end of each epoch")
    return p.parse_args(argv)


def resolve(args, saved):
    """Fills in `args`: flags given, else the resumed run's, else recipe and preset."""
    # what was left out is None, or False for a flag without a value
    flags = {k: v for k, v in vars(args).items() if v is not None and v is not False}
    if saved and flags.get("amp") == "auto":
        del flags["amp"]  # it was measured at the start of the run
    for k, v in flags.items():
        if k in saved and k not in FREE and saved[k] != v:
            raise InputError(f"--resume cannot change --{k.replace('_', '-')} from {saved[k]} to "
                             f"{v}; leave it out, or start anew in another --out-dir")
    data, recipe = flags.get("data", "synthetic"), flags.get("recipe", "ours")
    column = ["paper", "released", "ours"].index(recipe)
    defaults = {"synthetic": SYNTHETIC, "roco": ROCO}.get(data, FULL_SIZE) | {
        "data": data, "recipe": recipe}
    defaults |= {k: row[column] for k, row in RECIPES.items() if row[column] != "preset"}
    kept = {k: v for k, v in saved.items() if k not in ("resume", "max_steps", "compile")}
    vars(args).update(defaults | kept | flags)  # the last one counts
    if args.streams == "single":
        args.beta, args.separate = 0.0, 0.0  # they need an anatomy stream
    if args.dim % args.heads:
        raise InputError(f"--dim {args.dim} must be a multiple of --heads {args.heads}")
    if args.recipe != "ours" and args.data == "mimic" and args.triplets is None:
        raise InputError(f"--recipe {args.recipe} takes RadGraph's triplets: name its .json or the "
                         "folder of the published matrix by --triplets, or say --triplets rules")
    return args


# --------------------------------------------------------------------------------- parts of the run

def learning_rate(step, warmup_steps, total_steps, lr, min_lr):
    """Linear warm-up from min_lr to lr, then a cosine back to min_lr (Table II)."""
    if step < warmup_steps:
        return min_lr + (lr - min_lr) * step / warmup_steps  # Table II: both ends at 1e-5
    progress = min(1.0, (step - warmup_steps) / max(1.0, total_steps - warmup_steps))
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def released_rate(step, per_epoch, epochs, lr, min_lr):
    """As released: five steps up in 500 iterations, which a short epoch cuts off; from epoch 1 on a
    cosine, read at the start of each epoch."""
    epoch = step // per_epoch
    if epoch == 0:
        return min_lr + (lr - min_lr) * min(step // 100, 5) / 5
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * epoch / epochs))


def prepare(args, saved, rank, world):
    """The table and the queries. The first process prepares, the others wait and find it done."""
    if rank > 0:
        try:
            torch.distributed.barrier()  # until the first process is through
        except RuntimeError:
            sys.exit(2)  # it has ended, and has said why
    table = load_from_args(args, args.image_size)
    if not table.has_report[table.rows("train")].any():
        raise InputError(f"no training image of {table.root} has a report with a usable triplet; "
                         "see --data and --triplets")
    table.hidden = set(filter(None, args.hold_out.split(",")))
    if not table.hidden <= table.known:
        raise InputError(f"--hold-out {args.hold_out}: the reports know "
                         f"{', '.join(sorted(table.known))}")
    queries = saved.get("queries") or build_queries(table, args)
    if world > 1 and rank == 0:
        torch.distributed.barrier()
    return table, queries


def build_model(queries, names, table, rows, args):
    """A MeDSLIP at its start; with --init-std 0 see `MeDSLIP.fit_to_data`."""
    torch.manual_seed(args.seed)  # so all processes start from the same weights
    text = torch.cat([queries["pathology"]["text"], queries["anatomy"]["text"]])  # [m+n,T]
    model = MeDSLIP(MeDSLIPConfig(
        backbone=args.backbone, image_size=args.image_size, dim=args.dim, layers=args.layers,
        heads=args.heads, text_dim=text.shape[1], dropout=args.dropout,
        position=args.position == "sincos", streams=args.streams, mask=args.mask, icl=args.icl,
        existence=args.existence, proto_from=args.proto_from))
    if args.init_std:  # as released
        return model.initialise(args.init_std)
    existence = torch.from_numpy(table.existence(rows[:2000], *names))          # [<=2000,n,m]
    rates = []
    for labels in image_labels(existence):                                      # [.,m], [.,n]
        known = labels.numel() if args.unmentioned == "negative" else int((labels >= 0).sum())
        rate = int((labels == 1).sum()) / max(known, 1)
        rates.append(min(max(rate, 0.001), 0.999))  # the start of a bias is the log odds: finite
    model.fit_to_data(text, *rates)
    return model


def validate(model, table, queries, args, autocast):
    """Macro AUROC of pathology existence by the validation reports; 0 where there are none."""
    rows = np.flatnonzero((table.splits == "validate") & table.has_report)
    if not len(rows):
        return 0.0
    kinds, device = [queries["pathology"], queries["anatomy"]], model.text_projection.weight.device
    existence = torch.from_numpy(table.existence(rows, *[kind["names"] for kind in kinds]))
    labels = image_labels(existence)[0]                                         # [N,m]
    if args.unmentioned == "negative":  # scored by the labels that it learns
        labels = labels.clamp(min=0)
    model.eval()  # no dropout; batch norm by its running statistics
    with autocast:
        answers = ask(SimpleNamespace(batch_size=64, image_size=args.image_size), model,
                      table.images, rows, [kind["text"].to(device) for kind in kinds],
                      lambda out: {"logits": out.pathology_logits.float()})
    return classification_scores(labels.numpy(), answers["logits"])["auroc"] or 0.0


# ------------------------------------------------------------------------------------------ the run

def main(args):
    saved = training_state(Path(args.out_dir or "out", "ckpt.pt")) if args.resume else {}
    args = resolve(args, saved.get("args", {}))
    out_dir = Path(args.out_dir)
    device, rank, world = join_processes(args.device)
    if args.batch_size % (world * args.accumulate):
        raise InputError(f"--batch-size {args.batch_size} does not divide into {world} processes x "
                         f"--accumulate {args.accumulate}")
    amp, why = pick_amp(args.amp, device)
    args.amp = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(amp, "off")  # --resume keeps it
    autocast = torch.autocast(device.type, amp) if amp else nullcontext()
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)  # bf16 needs none

    table, queries = prepare(args, saved, rank, world)
    names = [queries[kind]["names"] for kind in ("pathology", "anatomy")]
    pathology_text = queries["pathology"]["text"].to(device)                    # [m,T]
    anatomy_text = queries["anatomy"]["text"].to(device)                        # [n,T]
    batches = Batches(table, table.rows("train"), args.batch_size, args.seed, *names,
                      args.image_size, args.crop, args.augment_ops, args.flip, rank, world)
    per_epoch = len(batches)  # steps
    total = min(args.epochs * per_epoch, args.max_steps or math.inf)

    # ---- model and optimizer; raw_model stays bare for saving and evaluation
    raw_model = build_model(queries, names, table, batches.rows, args).to(
        device, memory_format=torch.channels_last)
    if args.sync_batchnorm and device.type == "cuda":  # torch has it for GPUs only
        raw_model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(raw_model)
    model = torch.compile(raw_model) if args.compile else raw_model  # shares the weights
    if world > 1:
        model = torch.nn.parallel.DistributedDataParallel(
            model, [device.index] if device.type == "cuda" else None)  # None: on CPUs
    parameters = list(raw_model.parameters())
    optimizer = torch.optim.AdamW([
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": args.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0}],  # biases, norms
        lr=args.lr, fused=True)
    step, best = saved.get("step", 0), saved.get("best", {"auroc": 0.0, "epoch": 0.0})
    if saved:
        raw_model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
    elif args.start_from:
        load_model(args.start_from, model=raw_model)
    if rank == 0:
        log = open_log(out_dir / "log.jsonl", step)
        print("  ".join(f"{k} {v}" for k, v in sorted(vars(args).items()) if v is not None))
        print(f"{sum(p.numel() for p in parameters) / 1e6:.2f} M parameters; {len(names[0])} "
              f"pathologies, {len(names[1])} anatomies; {len(batches.rows)} images in "
              f"{per_epoch} steps per epoch; batch {args.batch_size} = {world} processes x "
              f"{args.accumulate} parts; {device}, {amp or torch.float32} ({why})")

    def write_log(**numbers):  # JSON knows no NaN, which a norm can be in fp16
        log.write(json.dumps({k: v for k, v in numbers.items() if math.isfinite(v)}) + "\n")

    def stop_at(what):
        sys.exit(f"train.py: {what} not finite at step {step}; {out_dir} keeps what was saved "
                 "before; a lower --lr or --amp off may help")

    def save(name):
        if not all(p.isfinite().all() for p in parameters):
            stop_at("weights are")
        save_tensors(out_dir / name, {
            "model": raw_model.state_dict(), "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(), "config": vars(raw_model.config), "args": vars(args),
            "epoch": step // per_epoch, "step": step, "best": best,
            "queries": queries,  # so inference needs no text encoder
            "rng": torch.get_rng_state()})  # a record: each step seeds itself

    # ---- loop; SIGTERM and SIGINT end it after the step in flight
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    signal.signal(signal.SIGINT, lambda *_: stop.append(True))
    workers = args.workers if args.workers is not None else 4 * (device.type == "cuda")
    fork = workers > 0 and hasattr(os, "fork")  # forked workers share the memory-mapped images
    loader = iter(torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=range(step, total), num_workers=workers,
        pin_memory=device.type == "cuda", worker_init_fn=ignore_sigterm,
        multiprocessing_context="fork" if fork else None))
    bar = tqdm(total=total, initial=step, unit="step", disable=None if rank == 0 else True)
    last = step >= total  # a finished run that is resumed has nothing to do
    while not last:
        batch = next(loader)
        images = to_input(batch["images"].to(device, non_blocking=True), args.image_size)
        images = images.contiguous(memory_format=torch.channels_last)  # as the model's weights
        existence = batch["existence"].to(device, non_blocking=True)            # [b,n,m]
        if args.schedule == "smooth":
            rate = learning_rate(step, args.warmup_epochs * per_epoch, args.epochs * per_epoch,
                                 args.lr, args.min_lr)
        else:
            rate = released_rate(step, per_epoch, args.epochs, args.lr, args.min_lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        model.train()
        losses, parts = 0, zip(images.chunk(args.accumulate), existence.chunk(args.accumulate))
        for k, (x, y) in enumerate(parts):
            part = rank * args.accumulate + k  # seeds dropout and the negatives of ProtoCL
            torch.manual_seed(((args.seed * 1_000_003 + step) * 4096 + part) % 2**63)
            exchange = world == 1 or k == args.accumulate - 1  # of gradients, once per step
            with nullcontext() if exchange else model.no_sync():
                with autocast:
                    out = model(x, pathology_text, anatomy_text)
                    swapped = raw_model.swap(out) if args.separate else None    # [b,n,m]
                terms = medslip_loss(out, y, pathology_text, anatomy_text, args.alpha, args.beta,
                                     args.contrast, args.unmentioned, swapped, args.separate)
                scaler.scale(terms["loss"] / args.accumulate).backward()
            losses = losses + torch.stack([v.detach() for v in terms.values()]) / args.accumulate
        scaler.unscale_(optimizer)  # first, so that --clip means the true norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, args.clip)
        scaler.step(optimizer)  # leaves a step out whose fp16 gradients overflowed
        scaler.update()
        optimizer.zero_grad()
        step += 1
        bar.update()

        if step % args.log_every == 0 or step == total:  # reading a number off the GPU waits for it
            if world > 1:
                torch.distributed.all_reduce(losses)
            numbers = dict(zip(terms, (losses / world).tolist()))  # loss, existence, protocl, icl
            if not math.isfinite(numbers["loss"]):
                stop_at("the loss is")
            if rank == 0:
                write_log(step=step, epoch=step / per_epoch, lr=rate, **numbers,
                          grad_norm=norm.item())
                bar.set_postfix(numbers)
        last = step == total or bool(stop)
        if world > 1:  # a signal may reach one process alone; all stop at the same step
            flag = torch.tensor(float(last))
            torch.distributed.all_reduce(flag)
            last = flag.item() > 0
        epoch_done = step % per_epoch == 0
        if rank == 0 and (epoch_done or step == total):
            auroc = validate(raw_model, table, queries, args, autocast)
            write_log(step=step, epoch=step / per_epoch, validation_auroc=auroc)
            tqdm.write(f"epoch {step / per_epoch:.2f}: validation existence AUROC {auroc:.4f}")
            if auroc > best["auroc"]:
                best = {"auroc": auroc, "epoch": step / per_epoch}
                save("best.pt")
        if rank == 0 and (last or epoch_done or step % args.save_every == 0):
            save("ckpt.pt")
    bar.close()
    if rank == 0:
        print(f"{'done' if step >= total else 'stopped'} at step {step}: {out_dir}/ckpt.pt; best "
              f"validation AUROC {best['auroc']:.4f}")  # 0: none yet, and no best.pt
    if world > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run(main, parse_args)
