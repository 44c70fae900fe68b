"""Pre-train MeDSLIP: images and reports in, out/ckpt.pt out (arXiv 2403.10635, Sec. II-III).

    torchrun --nproc_per_node=4 train.py --data mimic          # the paper's run on four GPUs
    python train.py --data mimic --accumulate 4                # the same on one
    python train.py                                            # --data synthetic: CPU, minutes
    python train.py --max-steps 60                             # a minute

All randomness of a step (augmentation, dropout, drawn negatives) is a function of (seed, step, part
of the batch), and the order of the images one of (seed, epoch). So a resumed run repeats an
uninterrupted one to the last bit (on a GPU: with --deterministic), and two processes repeat one
with `--accumulate 2`.

Differs from the paper and the released code:
- Left and right labels swap when an image is mirrored (`--flip naive` is the released behaviour).
- Existence heads start at the base rate of their labels; weight decay spares biases and norms.
- A step with a non-finite loss or gradient is skipped; gradients are clipped (released: neither).
- Half precision where the hardware has it (`--amp off` is the released fp32).
"""
import argparse
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from multiprocessing import get_all_start_methods
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import (DATASETS, Batches, add_data_flags, augment, load_from_args, side_swap_index,
                  to_input)
from evaluate import classification_scores, pick_device
from losses import image_labels, loss_counts, medslip_loss
from model import CheckpointError, MeDSLIP, MeDSLIPConfig, read_checkpoint
from text import (ANATOMIES, PATHOLOGIES, InputError, Parser, Triplet, anatomy_prompts,
                  encode_text, pathology_prompts, read_pathology_book, top_queries)

# ------------------------------------------------------------------------------------------- flags

COMMON = dict(
    streams="dual", contrast="prototype", alpha=1.0, mask="sigmoid", icl="cosine",
    unmentioned="negative", flip="swap", clip=1.0, accumulate=1, max_steps=None, hold_out="",
    pathology_book=None, out_dir="out", resume=False, seed=0, amp="auto", compile=False,
    deterministic=False, log_every=20, save_every=1000,
    root=None, cache_dir=None, prepared_size=None, views=None, split_file=None, uncertain="ignore",
    labels=None, triplets="rules", workers=None)  # these nine are data.py's
PAPER = dict(  # Table II and Sec. III-B; the released augmentation
    epochs=100, batch_size=64, lr=1e-4, min_lr=1e-5, warmup_epochs=5.0, weight_decay=0.02,
    backbone="resnet50", image_size=224, dim=256, layers=4, heads=4, dropout=0.1, position="none",
    beta=1.0, crop=0.2, augment_ops=2, queries="published",
    text_encoder="emilyalsentzer/Bio_ClinicalBERT")
SYNTHETIC = dict(  # phantoms of 64 pixels on two CPU cores
    epochs=4, batch_size=32, lr=2e-3, min_lr=1e-5, warmup_epochs=1.0, weight_decay=0.02,
    backbone="small", image_size=64, dim=96, layers=2, heads=4, dropout=0.0, position="sincos",
    crop=0.8, augment_ops=0, queries="corpus", text_encoder="hashing",
    beta=10.0)  # ICL is a mean over 532 cells, two of them positive: 1 learns it too slowly
# flags that --resume may change freely; a change of any other is refused by name
FREE = {"resume", "max_steps", "out_dir", "root", "cache_dir", "workers", "device", "log_every",
        "save_every", "accumulate", "compile"}


def parse_args(argv=None):
    """Only the flags given; `resolve` fills in the rest."""
    p = Parser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS)
    add_data_flags(p)
    for action in p._actions:  # these flags have defaults of their own, and --resume asks: given?
        action.default = argparse.SUPPRESS
    g = p.add_argument_group("what to learn from")
    g.add_argument("--data", choices=DATASETS, help="data set with reports (synthetic)")
    g.add_argument("--queries", choices=["published", "corpus"],
                   help="75 pathologies and 51 anatomies as published, or the commonest here")
    g.add_argument("--pathology-book", metavar="FILE", help="published prompts in place of ours")
    g.add_argument("--hold-out", metavar="A,B", help="pathologies left out of labels and queries")
    g.add_argument("--text-encoder", metavar="NAME", help="Hugging Face BERT, its folder, hashing")
    g = p.add_argument_group("model")
    g.add_argument("--backbone", choices=["resnet18", "resnet50", "small"])
    g.add_argument("--image-size", type=int, help="pixels a side")
    g.add_argument("--dim", type=int, help="embedding width D")
    g.add_argument("--layers", type=int, help="of each query network")
    g.add_argument("--heads", type=int, help="of its attention")
    g.add_argument("--dropout", type=float)
    g.add_argument("--position", choices=["none", "sincos"], help="embedding on the image tokens")
    g = p.add_argument_group("ablation (Table VI, and where paper and released code differ)")
    g.add_argument("--streams", choices=["dual", "single"], help="DIS; single is MedKLIP")
    g.add_argument("--contrast", choices=["prototype", "random", "none"], help="PCL")
    g.add_argument("--alpha", type=float, help="weight of ProtoCL (1)")
    g.add_argument("--beta", type=float,
                   help="weight of ICL (1; synthetic 10; 0 with a single stream)")
    g.add_argument("--mask", choices=["sigmoid", "linear"], help="released: linear")
    g.add_argument("--icl", choices=["cosine", "bare", "dot"],
                   help="scaled cosine, Eq. 5 as printed, or dot product as released")
    g.add_argument("--unmentioned", choices=["negative", "ignore"],
                   help="what a report is silent about; released: ignore")
    g = p.add_argument_group("augmentation")
    g.add_argument("--flip", choices=["swap", "none", "naive"],
                   help="mirror and swap left/right labels, never, or mirror only as released")
    g.add_argument("--crop", type=float, help="smallest area of the random crop, 0..1")
    g.add_argument("--augment-ops", type=int, help="RandAugment operations an image, magnitude 7")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=int)
    g.add_argument("--max-steps", type=int, help="stop here; the schedule still follows --epochs")
    g.add_argument("--batch-size", type=int, help="images a step, over all processes and parts")
    g.add_argument("--accumulate", type=int, help="parts a step is computed in: saves memory")
    g.add_argument("--lr", type=float, help="peak learning rate")
    g.add_argument("--min-lr", type=float, help="where warm-up starts and the cosine ends")
    g.add_argument("--warmup-epochs", type=float)
    g.add_argument("--weight-decay", type=float)
    g.add_argument("--clip", type=float, help="largest gradient norm")
    g = p.add_argument_group("run")
    g.add_argument("--out-dir", metavar="DIR")
    g.add_argument("--resume", action="store_true", help="go on from <out-dir>/ckpt.pt")
    g.add_argument("--seed", type=int)
    g.add_argument("--device", help="cuda where there is one, else cpu")
    g.add_argument("--amp", choices=["auto", "bf16", "fp16", "off"],
                   help="auto: bf16 where the hardware has it, else fp16 on a GPU, off on a CPU")
    g.add_argument("--compile", action="store_true", help="torch.compile the model")
    g.add_argument("--deterministic", action="store_true", help="CUDA: the same numbers, slower")
    g.add_argument("--log-every", type=int, metavar="STEPS")
    g.add_argument("--save-every", type=int, metavar="STEPS", help="besides the end of each epoch")
    return p.parse_args(argv)


def resolve(given, saved=None):
    """Flags given, else the resumed run's, else the data set's defaults -> Namespace."""
    given = {k: v for k, v in vars(given).items() if v is not None}
    changed = [f"--{k.replace('_', '-')} {v} (was {saved[k]})" for k, v in given.items()
               if saved and k not in FREE and k in saved and saved[k] != v]
    if changed:
        raise InputError(f"--resume cannot change {', '.join(changed)}; leave it out, or "
                         f"start anew in another --out-dir")
    preset = SYNTHETIC if given.get("data", "synthetic") == "synthetic" else PAPER
    kept = {k: v for k, v in (saved or {}).items() if k not in ("resume", "max_steps")}
    args = argparse.Namespace(**{"data": "synthetic", **COMMON, **preset, **kept, **given})
    if "device" not in given:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.streams == "single":
        if given.get("beta", 0) > 0:
            raise InputError("--streams single has no anatomy stream for ICL; leave --beta out")
        args.beta = 0.0
    for name, least in dict(accumulate=1, batch_size=1, epochs=1, layers=1, heads=1, dim=1,
                            image_size=16, log_every=1, save_every=1, augment_ops=0, seed=0,
                            warmup_epochs=0, lr=0, min_lr=0, weight_decay=0).items():
        if not getattr(args, name) >= least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} is below {least}")
    for name, fits in (("crop", 0 < args.crop <= 1), ("dropout", 0 <= args.dropout < 1),
                       ("clip", args.clip > 0)):
        if not fits:
            raise InputError(f"--{name} {getattr(args, name)} is out of range, which is " + dict(
                crop="above 0 to 1", dropout="0 to below 1", clip="above 0")[name])
    for name, least in (("max_steps", 1), ("workers", 0)):  # None where not given
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)} is below {least}")
    if args.dim % args.heads:
        raise InputError(f"--dim {args.dim} must be a multiple of --heads {args.heads}")
    return args


# --------------------------------------------------------------------------------- parts of the run

def learning_rate(step, steps_per_epoch, args):
    """Linear warm-up from min_lr to lr, then a cosine back to min_lr; per step, not per epoch."""
    warmup, total = args.warmup_epochs * steps_per_epoch, args.epochs * steps_per_epoch
    if step < warmup:
        return args.min_lr + (args.lr - args.min_lr) * step / warmup
    progress = min(1.0, (step - warmup) / max(1.0, total - warmup))
    return args.min_lr + (args.lr - args.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def split_names(listed):
    return [name.strip() for name in listed.split(",") if name.strip()]


def build_queries(table, args):
    """Both query sets, prompts and frozen text vectors: all that inference needs of text."""
    pathologies, anatomies = list(PATHOLOGIES), list(ANATOMIES)
    if args.queries == "corpus":
        triplets = (Triplet(p, a, v) for i in table.rows("train") for p, a, v in table.cells(i))
        pathologies, anatomies = top_queries(triplets, len(PATHOLOGIES), len(ANATOMIES))
    held_out = split_names(args.hold_out)
    for name in held_out:
        if name not in pathologies:
            raise InputError(f"--hold-out {name} is no query; they are {', '.join(pathologies)}")
    pathologies = [p for p in pathologies if p not in held_out]
    book = read_pathology_book(args.pathology_book) if args.pathology_book else None
    queries = {"encoder": args.text_encoder}
    for kind, names, prompts in (("pathology", pathologies, pathology_prompts(pathologies, book)),
                                 ("anatomy", anatomies, anatomy_prompts(anatomies))):
        queries[kind] = {"names": names, "prompts": prompts,
                         "text": encode_text(prompts, args.text_encoder, table.folder)}
    return queries


def pick_amp(choice, device):
    """-> autocast dtype or None. On a CPU bf16 pays with AMX only (AVX512_BF16: 0.8 x speed)."""
    if choice == "auto":
        if device.type == "cuda":
            real = torch.cuda.is_bf16_supported(including_emulation=False)
            choice = "bf16" if real else "fp16"
        else:
            choice = "bf16" if getattr(torch.cpu, "_is_amx_tile_supported", bool)() else "off"
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[choice]


def seed_of(seed, step, part):
    """One integer for everything random about one part of one step."""
    return ((seed * 1_000_003 + step) * 4096 + part) % 2**63


@torch.inference_mode()
def validate(model, table, queries, held_out, unmentioned, image_size, device, amp, rank=0,
             world=1):
    """Macro AUROC of pathology existence by the validation reports, shared out to the processes."""
    model.eval()
    if world > 1:  # only the first process's batch-norm statistics go into the checkpoint
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    rows = table.rows("validate")
    rows = rows[table.has_report[rows]][rank::world]
    text = [queries[kind]["text"].to(device) for kind in ("pathology", "anatomy")]
    pathologies, anatomies = (queries[kind]["names"] for kind in ("pathology", "anatomy"))
    logits, labels = [], []
    for chunk in (rows[i:i + 64] for i in range(0, len(rows), 64)):
        x = to_input(torch.from_numpy(table.images[chunk]).to(device), image_size)      # [b,3,H,W]
        with torch.autocast(device.type, amp) if amp else nullcontext():
            logits.append(model(x, *text).pathology_logits.float().cpu())               # [b,m]
        existence = torch.as_tensor(table.existence(chunk, pathologies + held_out, anatomies))
        labels.append(image_labels(existence[..., :len(pathologies)])[0])               # [b,m]
    share = [torch.cat(logits).numpy(), torch.cat(labels).numpy()] if logits else None
    shares = [share]
    if world > 1:
        shares = [None] * world
        dist.all_gather_object(shares, share)
    shares = [s for s in shares if s is not None]
    if not shares:
        return float("nan")
    scores, labels = (np.concatenate(a) for a in zip(*shares))
    if unmentioned == "negative":
        labels = np.maximum(labels, 0)
    auroc = classification_scores(labels, scores)["auroc"]
    return float("nan") if auroc is None else auroc


def ignore_signals(_):
    """A loader's worker serves on when SIGTERM or Ctrl-C reach the whole process group."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def last_good(path, saved):
    return (f"{path} is the last good checkpoint, --resume goes on from it" if saved else
            "nothing was saved")


def save_checkpoint(path, checkpoint, saved):
    """Written beside, flushed, then renamed: whenever the process dies, `path` is whole."""
    draft = path.with_suffix(".tmp")
    try:
        with open(draft, "wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(draft, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        draft.unlink(missing_ok=True)
        why = str(error).splitlines()[0]
        sys.exit(f"train.py: cannot write {draft} ({why}); {last_good(path, saved)}")


def log_line(**numbers):
    """One JSON object; JSON knows no NaN, so what is not finite becomes null."""
    return json.dumps({k: v if math.isfinite(v) else None for k, v in numbers.items()}) + "\n"


def reopen_log(path, step, resume):
    """out/log.jsonl, without what a killed run wrote after its last checkpoint."""
    kept = []
    if resume and path.exists():
        for line in path.read_text().splitlines():
            try:
                kept += [line] if json.loads(line)["step"] <= step else []
            except (json.JSONDecodeError, KeyError):
                pass  # the line that the kill cut in two
    draft = path.with_suffix(".tmp")
    draft.write_text("".join(line + "\n" for line in kept))
    os.replace(draft, path)
    return open(path, "a", buffering=1)


# ------------------------------------------------------------------------------------------ the run

def main(args):
    out_dir = Path(getattr(args, "out_dir", COMMON["out_dir"]))
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make --out-dir {out_dir} ({error.strerror})")
    if not os.access(out_dir, os.W_OK):
        raise InputError(f"--out-dir {out_dir} is not writable; give another")
    path, checkpoint = out_dir / "ckpt.pt", None
    if getattr(args, "resume", False):
        if not path.exists():
            raise InputError(f"--resume finds no {path}; leave it out to start a run")
        checkpoint = read_checkpoint(path)
        if not {"optimizer", "scaler", "step", "args", "queries", "rng", "best",
                "fingerprint"} <= checkpoint.keys():
            raise InputError(f"{path} holds weights but no training state; --resume needs our own")
    args = resolve(args, checkpoint and checkpoint["args"])

    # ---- processes and device
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(args.device)
    if device.type == "cuda" and world > 1:
        if int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
            raise InputError(f"there are {torch.cuda.device_count()} GPUs here; "
                             f"--nproc_per_node must not be more")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if world > 1:  # gloo carries the stop flag from CPU to CPU, so that it costs the GPU no wait
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    if args.batch_size % (world * args.accumulate):
        raise InputError(f"--batch-size {args.batch_size} does not divide into {world} processes x "
                         f"--accumulate {args.accumulate}")
    main_process = rank == 0
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    amp = pick_amp(args.amp, device)
    autocast = torch.autocast(device.type, amp) if amp else nullcontext()
    scaler = torch.amp.GradScaler(device.type, enabled=amp == torch.float16)

    # ---- data and queries: the first process prepares, the others find it done
    if world > 1:
        patient = dist.new_group(backend="gloo", timeout=timedelta(days=1))  # MIMIC takes hours
    if world > 1 and not main_process:
        dist.barrier(patient)
    table = load_from_args(args)
    if not table.has_reports:
        raise InputError(f"{args.data} has no reports to learn from; it serves evaluate.py and "
                         f"finetune.py")
    queries = checkpoint["queries"] if checkpoint else build_queries(table, args)
    if world > 1 and main_process:
        dist.barrier(patient)
    if checkpoint and checkpoint["fingerprint"] != table.receipt["fingerprint"]:
        raise InputError(f"{table.root} has changed since the run began; --resume needs the same "
                         f"data")
    pathologies, anatomies = queries["pathology"]["names"], queries["anatomy"]["names"]
    pathology_text = queries["pathology"]["text"].to(device)                            # [m,T]
    anatomy_text = queries["anatomy"]["text"].to(device)                                # [n,T]
    swap = side_swap_index(anatomies).to(device)                                        # [n]
    rows = table.rows("train")
    # labels are made for the held out, too, and cut off: else they would count as rare findings
    held_out = split_names(args.hold_out)
    batches = Batches(table, rows, args.batch_size, args.seed, pathologies + held_out, anatomies,
                      rank, world)
    steps_per_epoch = len(batches)
    total = min(args.epochs * steps_per_epoch, args.max_steps or math.inf)

    # ---- model and optimizer; raw_model stays bare for saving and evaluation
    torch.manual_seed(args.seed)
    config = MeDSLIPConfig(
        backbone=args.backbone, image_size=args.image_size, dim=args.dim, layers=args.layers,
        heads=args.heads, text_dim=pathology_text.shape[1], dropout=args.dropout,
        position=args.position == "sincos", streams=args.streams, mask=args.mask, icl=args.icl)
    raw_model = MeDSLIP(config)
    sample = torch.as_tensor(table.existence(batches.row_numbers[:2000], pathologies + held_out,
                                             anatomies))
    sample = sample[..., :len(pathologies)]                                             # [.,n,m]
    raw_model.start_from(torch.cat([queries["pathology"]["text"], queries["anatomy"]["text"]]),
                         *image_labels(sample), ignore=args.unmentioned == "ignore")
    raw_model = raw_model.to(device, memory_format=torch.channels_last)
    model = torch.compile(raw_model) if args.compile else raw_model
    if world > 1:
        model = DistributedDataParallel(model, [device.index] if device.type == "cuda" else None)
    matrices = [p for p in raw_model.parameters() if p.dim() > 1]
    vectors = [p for p in raw_model.parameters() if p.dim() <= 1]  # biases, norms, ICL's scale
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay},
                                   {"params": vectors, "weight_decay": 0.0}],
                                  lr=args.lr, fused=True)
    statistics = [b for b in raw_model.buffers() if b.is_floating_point()]  # batch norm's, [C] each
    step, best = 0, {"auroc": 0.0, "epoch": -1}
    if checkpoint:
        raw_model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if scaler.is_enabled() and checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
        step, best = checkpoint["step"], checkpoint["best"]
        torch.set_rng_state(checkpoint["rng"])

    if main_process:
        print("  ".join(f"{k} {v}" for k, v in sorted(vars(args).items())))
        print(f"{sum(p.numel() for p in raw_model.parameters()) / 1e6:.2f} M parameters; "
              f"{len(pathologies)} pathologies, {len(anatomies)} anatomies; {len(rows)} images in "
              f"{steps_per_epoch} steps an epoch; batch {args.batch_size} = {world} processes x "
              f"{args.accumulate} parts x {args.batch_size // world // args.accumulate}; {device}, "
              f"{str(amp or torch.float32).removeprefix('torch.')}")

    def snapshot():
        return {"model": raw_model.state_dict(), "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(), "config": asdict(config), "args": vars(args),
                "epoch": step // steps_per_epoch, "step": step, "rng": torch.get_rng_state(),
                "best": best, "queries": queries, "fingerprint": table.receipt["fingerprint"]}

    # ---- loop; SIGTERM and SIGINT end it after the step in flight
    stop = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.append(1))
    log = reopen_log(out_dir / "log.jsonl", step, bool(checkpoint)) if main_process else None
    workers = (4 if device.type == "cuda" else 0) if args.workers is None else args.workers
    loader = iter(torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=range(step, total), num_workers=workers,
        pin_memory=device.type == "cuda", persistent_workers=workers > 0,
        worker_init_fn=ignore_signals,  # forked workers share the memory-mapped cache
        multiprocessing_context="fork" if workers and "fork" in get_all_start_methods() else None))
    bar = tqdm(total=total, initial=step, unit="step", disable=None if main_process else True,
               dynamic_ncols=True)
    bad = torch.zeros(3, device=device)  # non-finite steps: in a row, longest row, all
    seen, clock, start, saved = 0, time.perf_counter(), step, bool(checkpoint)
    while True:  # total + 1 rounds: the last one only validates and saves
        done = step >= total
        last = done or bool(stop)
        if world > 1:
            flag = torch.tensor(float(last))
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            last = flag.item() > 0
        epoch_done = step > 0 and step % steps_per_epoch == 0
        if (epoch_done or done) and step > start:
            auroc = validate(raw_model, table, queries, held_out, args.unmentioned, args.image_size,
                             device, amp, rank, world)
            if auroc > best["auroc"]:
                best = {"auroc": auroc, "epoch": step // steps_per_epoch}
            if main_process:
                log.write(log_line(step=step, epoch=step / steps_per_epoch, validation_auroc=auroc))
                tqdm.write(f"step {step} epoch {step / steps_per_epoch:.2f}: validation existence "
                           f"AUROC {auroc:.4f} (best {best['auroc']:.4f})")
            clock, seen = time.perf_counter(), 0
        if main_process and (last or epoch_done or (step and step % args.save_every == 0)):
            save_checkpoint(path, snapshot(), saved)
            saved = True
        if last:
            break

        batch = next(loader)
        images = batch["images"].to(device, non_blocking=True)                          # [b,S,S]
        existence = batch["existence"].to(device, non_blocking=True)
        existence = existence[..., :len(pathologies)]                                   # [b,n,m]
        parts = []
        pieces = zip(images.chunk(args.accumulate), existence.chunk(args.accumulate))
        for k, (x, y) in enumerate(pieces):
            generator = torch.Generator().manual_seed(
                seed_of(args.seed, step, rank * args.accumulate + k))
            parts.append(augment(x, y, swap, generator, args.image_size, (args.crop, 1.0),
                                 args.flip, args.augment_ops))  # [b/parts,3,H,W], [b/parts,n,m]
        # masked means divide by the count over the whole global batch: see losses.loss_counts
        counts = torch.stack([loss_counts(y, args.unmentioned) for _, y in parts]).sum(0)
        if world > 1:
            dist.all_reduce(counts)
        counts = counts / (world * args.accumulate)

        lr = learning_rate(step, steps_per_epoch, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        model.train()
        losses, before = 0, torch.cat(statistics)
        for k, (x, y) in enumerate(parts):
            # for dropout and the negatives that ProtoCL draws
            torch.manual_seed(seed_of(args.seed, step, rank * args.accumulate + k))
            # gradients travel between processes once a step, with its last part
            sync = nullcontext() if world == 1 or k == args.accumulate - 1 else model.no_sync()
            with sync:
                with autocast:
                    out = model(x.contiguous(memory_format=torch.channels_last), pathology_text,
                                anatomy_text)
                part = medslip_loss(out, y, pathology_text, anatomy_text, args.alpha, args.beta,
                                    args.contrast, args.unmentioned, counts=counts)
                scaler.scale(part["loss"] / args.accumulate).backward()
            values = torch.stack([v.detach() for v in part.values()])                   # [4]
            losses = losses + values / args.accumulate
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), args.clip)
        if world > 1:
            dist.all_reduce(losses)
            losses = losses / world
        skip = ~(torch.isfinite(losses[0]) & torch.isfinite(norm))
        if not scaler.is_enabled():  # fused AdamW then skips its update, and nothing waits for it
            optimizer.found_inf = skip.float()
        scaler.step(optimizer)
        scaler.update()
        # nor may a forward pass that overflowed stay in the running means of batch norm
        kept = torch.where(skip, before, torch.cat(statistics)).split([len(b) for b in statistics])
        for b, value in zip(statistics, kept):
            b.copy_(value)
        optimizer.zero_grad(set_to_none=True)
        # an fp16 scaler overflows now and then by design: there only the loss tells a bad step
        row = (bad[0] + 1) * (~torch.isfinite(losses[0]) if scaler.is_enabled() else skip)
        bad = torch.stack([row, torch.maximum(bad[1], row), bad[2] + (row > 0)])
        step, seen = step + 1, seen + args.batch_size
        bar.update()

        if step % args.log_every == 0 or step == total:  # reading a number off the GPU waits for it
            loss, exist, proto, icl = losses.tolist()
            rate = seen / (time.perf_counter() - clock)
            if main_process:
                log.write(log_line(
                    step=step, epoch=step / steps_per_epoch, lr=lr, loss=loss, existence=exist,
                    protocl=proto, icl=icl, grad_norm=norm.item(), skipped=int(bad[2]),
                    images_per_s=round(rate, 1)))
                bar.set_postfix_str(f"loss {loss:.3f}: existence {exist:.3f}, ProtoCL {proto:.3f}, "
                                    f"ICL {icl:.4f}; {rate:.0f} images/s")
            if bad[1] >= 3:
                why = (f"train.py: three steps in a row without a finite loss or gradient, seen at "
                       f"step {step}; {last_good(path, saved)}; a lower --lr or --amp off may help")
                sys.exit(why if main_process else 1)
    bar.close()
    if main_process:
        print(f"{'done' if done else 'stopped'} at step {step}; the last weights are in "
              f"{path}; best validation AUROC {best['auroc']:.4f}; {int(bad[2])} steps skipped")
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main(parse_args())
    except (InputError, CheckpointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
