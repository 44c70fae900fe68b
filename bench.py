"""How fast and how large everything is, on whatever device there is.

    python bench.py                                              # the table: minutes on two cores
    python bench.py --batch-size 64 --cases floor,fp32,bf16,compile   # what a GPU owner asks first
    python bench.py --figure assets/cost.png                     # growth: batch, queries, pixels
    python bench.py --cases floor,fp32 --batch-size 4 --steps 1  # under a minute

Every case runs in a process of its own, so that its peak memory is its own. Sizes are the paper's
(ResNet-50 up to layer3, 224 pixels, 75 pathologies, 51 anatomies) unless flags say otherwise.
On a GPU fp32 means TF32. Seconds are medians of wall-clock time after a warm-up step; peak MB is
the whole process with the 0.7 GB of its imports on a CPU, tensors alone on a GPU. `busy` is the
share of the threads' time that the case was given: where a full step on a few threads has less than
0.8, something else was running and the seconds mean little.

A step is forward, losses, backward, clipping and AdamW on images that are already augmented; the
data pipeline has rows of its own: add them on a CPU; with a GPU the reading runs beside the step.
"""
import argparse
import io
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from evaluate import pick_device
from losses import icl_loss, medslip_loss, proto_loss
from model import MeDSLIP, MeDSLIPConfig
from text import InputError, Parser

CASES = {
    "floor": "backbone alone, fp32",
    "fp32": "full step, fp32",
    "lean": "full step, fp32, memory returned (CPU)",
    "nchw": "full step, fp32, channels first",
    "bf16": "full step, bf16",
    "fp16": "full step, fp16 (GPU)",
    "compile": "full step, fp32, torch.compile",
    "inference": "zero-shot inference, fp32",
    "losses": "interaction losses, ours",
    "loop": "interaction losses, loops as published",
    "data": "data: prepared 256-pixel images",
    "jpeg": "data: full-size JPEG an item, as published"}
GPU_ONLY, CPU_ONLY = {"fp16"}, {"lean"}
FILM = (2544, 3056)  # width and height of a radiograph as MIMIC-CXR-JPG ships it
# dense peaks in TFLOP/s from the makers' data sheets, SXM where there are several: (TF32 or else
# fp32, bf16 or else fp16)
PEAK = {"H200": (495, 989), "H100": (495, 989), "A100": (156, 312), "A10": (62, 125),
        "L4": (60, 121), "4090": (83, 165), "3090": (36, 71), "V100": (15.7, 125), "T4": (8.1, 65)}


# ------------------------------------------------------------------------------------ costs by hand

def costs(config, m, n):
    """[(part, parameters, multiply-adds)] of one image's forward pass, dual stream.

    Convolutions are counted on their shapes (weights x output pixels), the rest by hand below. A
    training step costs three times that: each product forward has two backward. Norms, activations
    and the losses (two products of 1 % of a query network) are left out.
    """
    D, T, layers = config.dim, config.text_dim, config.layers
    with torch.device("meta"):
        model = MeDSLIP(config)
        work = []
        for layer in model.backbone.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.register_forward_hook(lambda layer, _, out: work.append(
                    layer.weight.numel() * out.shape[2] * out.shape[3]))
        C, h, w = model.backbone(torch.empty(2, 3, config.image_size, config.image_size)).shape[1:]
    t = h * w
    rows = [("backbone", sum(p.numel() for p in model.backbone.parameters()), sum(work)),
            ("text projection", T * D + D, 0),  # once a step, whatever the batch
            ("mask", C * C + C, t * C * C)]
    for name, q in (("pathology", m), ("anatomy", n)):
        layer = (4 * D * D + 4 * D) * 2 + 8 * D * D + 5 * D + 6 * D  # attention twice, FFN, 3 norms
        ask = q * 4 * D * D + 2 * q * q * D                          # queries look at each other
        look = q * 2 * D * D + t * 2 * D * D + 2 * q * t * D         # and at the tokens
        z1 = D * D + D if config.icl in ("cosine", "bare") else 0
        rows += [(f"{name} tokens", C * C + C + C * D + D, t * (C * C + C * D)),
                 (f"{name} query network", layers * layer + 2 * D,
                  layers * (ask + look + q * 8 * D * D)),
                 (f"{name} heads", D + 1 + D * T + T + z1, q * (D + D * T + D * D * bool(z1)))]
    return rows + [("relations", 2 * (config.icl == "cosine"), n * m * D)]


def kept_bytes(config, m, n, device="cpu", batch=2):
    """Bytes of activations that an image's forward pass keeps for the backward pass, fp32. Not by
    hand: two images are run, for kernels differ between devices in what they keep."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage  # held, so that no address is given out twice
        return tensor
    with torch.device(device):
        model, images = MeDSLIP(config), torch.zeros(batch, 3, config.image_size, config.image_size)
        texts = torch.zeros(m, config.text_dim), torch.zeros(n, config.text_dim)
        for p in model.parameters():
            kept[p.untyped_storage()._cdata] = p.untyped_storage()
        weights = len(kept)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = model(images, *texts)
    del out
    return sum(s.nbytes() for s in list(kept.values())[weights:]) / batch


# ----------------------------------------------------------------------------------- the contenders

def batch_of(args, device):
    """Images, texts and labels of the asked sizes; 1.5 % of the cells are present, far more than in
    reports, so that the loops have something to do."""
    generator = torch.Generator().manual_seed(0)
    B, m, n, S = args.batch_size, args.pathologies, args.anatomies, args.image_size
    images = torch.randn(B, 3, S, S, generator=generator)
    texts = [0.04 * torch.randn(q, 768, generator=generator) for q in (m, n)]
    existence = (torch.rand(B, n, m, generator=generator) < 0.015).long()               # [B,n,m]
    return [v.to(device) for v in (images, *texts, existence)]


def step_case(args, device):
    """A training step of the whole model, or of its backbone with the mean square for a loss."""
    images, pathology_text, anatomy_text, existence = batch_of(args, device)
    torch.manual_seed(0)
    config = config_of(args)
    layout = torch.contiguous_format if args.case == "nchw" else torch.channels_last
    model = MeDSLIP(config).to(device, memory_format=layout)
    images = images.contiguous(memory_format=layout)
    trained = model.backbone if args.case == "floor" else model
    run_model = torch.compile(model) if args.case == "compile" else model
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4, fused=True)
    amp = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.case)
    scaler = torch.amp.GradScaler(device.type, enabled=args.case == "fp16")

    def step():
        with torch.autocast(device.type, amp) if amp else nullcontext():
            if args.case == "floor":
                loss = model.backbone(images).square().mean()
            else:
                out = run_model(images, pathology_text, anatomy_text)
        if args.case != "floor":
            loss = medslip_loss(out, existence, pathology_text, anatomy_text)["loss"]
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return step


def inference_case(args, device):
    images, *texts, _ = batch_of(args, device)
    model = MeDSLIP(config_of(args)).eval().to(device, memory_format=torch.channels_last)
    images = images.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def step():
        model(images, *texts)
    return step


def published_losses(pathology_z, anatomy_z, relation, pathology_text, anatomy_text, existence,
                     pathology_negatives, anatomy_negatives):
    """ProtoCL and ICL by the released algorithm. z [B,q,T], text [k,T], existence [B,n,m].

    Labels and text vectors are both spread out over every image, query and candidate and multiplied
    (six tensors [B,q,k,T], alive at once); a loop over images and queries takes each prototype from
    its slab of the product, whose non-zero entries tell the number of positives.
    """
    streams = ((pathology_z, anatomy_text, existence.transpose(1, 2), pathology_negatives),
               (anatomy_z, pathology_text, existence, anatomy_negatives))
    labels = [(y == 1).float().unsqueeze(-1).repeat(1, 1, 1, z.shape[-1]) for z, _, y, _ in streams]
    vectors = [text.repeat(*z.shape[:2], 1, 1) for z, text, _, _ in streams]    # [B,q,k,T]
    slabs = [label * vector for label, vector in zip(labels, vectors)]          # [B,q,k,T]
    known = existence >= 0
    loss = F.binary_cross_entropy_with_logits(relation[known], existence[known].float())
    for (z, text, y, negatives), slab in zip(streams, slabs):
        candidates = torch.cat([torch.zeros_like(z).unsqueeze(2), text[negatives]], 2)  # [B,q,8,T]
        for b in range(z.shape[0]):
            for i in range(z.shape[1]):
                if (slab[b, i] != 0).sum() > 0:  # waits for the device, B q times a step
                    positives = slab[b, i].nonzero(as_tuple=True)[0].unique()
                    candidates[b, i, 0] = slab[b, i].sum(0) / len(positives)
        found = (y == 1).any(-1)                                                # [B,q]
        logits = (candidates @ z.unsqueeze(-1)).squeeze(-1)[found]              # [.,8]
        loss = loss + F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.long))
    return loss


def our_losses(pathology_z, anatomy_z, relation, pathology_text, anatomy_text, existence,
               pathology_negatives, anatomy_negatives):
    return (proto_loss(pathology_z, anatomy_text, existence.transpose(1, 2),
                       negative_index=pathology_negatives)
            + proto_loss(anatomy_z, pathology_text, existence, negative_index=anatomy_negatives)
            + icl_loss(relation, existence))


def draw_negatives(existence, count=7):
    """[B,q,k] -> int64 [B,q,count]: columns that are not present."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(existence.shape, generator=generator).to(existence.device)
    return noise.masked_fill(existence == 1, -1).topk(count, dim=-1).indices


def losses_case(args, device):
    """Forward and backward of ProtoCL in both streams and of ICL, from given embeddings."""
    _, *texts, existence = batch_of(args, device)
    generator = torch.Generator().manual_seed(2)
    B, n, m = existence.shape
    inputs = [torch.randn(*shape, generator=generator).to(device).requires_grad_()
              for shape in ((B, m, 768), (B, n, 768), (B, n, m))]
    negatives = [draw_negatives(y) for y in (existence.transpose(1, 2), existence)]
    loss = published_losses if args.case == "loop" else our_losses

    def step():
        value = loss(*inputs, *texts, existence, *negatives)
        value.backward()
        return value
    return step


def data_case(args, device):
    """One core: batches from the prepared cache, augmented."""
    import data
    import phantom
    import text
    torch.set_num_threads(1)
    size = max(256, args.image_size)
    folder = tempfile.TemporaryDirectory()
    phantom.write("mimic", folder.name, 2 * args.batch_size, 0, size, 1)
    table = data.load("mimic", folder.name, size=size, workers=1)
    batches = data.Batches(table, table.rows("all"), args.batch_size, 0, text.PATHOLOGIES,
                           text.ANATOMIES)
    swap, generator = data.side_swap_index(text.ANATOMIES), torch.Generator().manual_seed(0)
    number = iter(range(1_000_000))

    def step():
        batch = batches[next(number)]
        data.augment(batch["images"], batch["existence"], swap, generator, args.image_size)
    step.folder = folder  # lives as long as the step does
    return step


def jpeg_case(args, device):
    """One core: the released recipe, which decodes the whole file as RGB for every item."""
    from PIL import Image
    from torchvision import transforms
    import phantom
    torch.set_num_threads(1)
    rng, files = np.random.default_rng(0), []
    for _ in range(4):  # with the grain of a real one, 2-3 MB
        image = Image.fromarray(phantom.draw(rng, 512)["image"]).resize(FILM, Image.BICUBIC)
        grain = rng.normal(0, 3, FILM[::-1]).astype(np.float32)
        file = io.BytesIO()
        Image.fromarray((np.asarray(image) + grain).clip(0, 255).astype(np.uint8)).save(
            file, "JPEG", quality=95)
        files.append(file.getvalue())
    recipe = transforms.Compose([
        transforms.RandomResizedCrop(args.image_size, (0.2, 1.0),
                                     interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(), transforms.RandAugment(2, 7), transforms.ToTensor(),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])

    def step():
        torch.stack([recipe(Image.open(io.BytesIO(files[k % 4])).convert("RGB"))
                     for k in range(args.batch_size)])
    return step


def config_of(args):
    preset = {"resnet50": dict(dim=256, layers=4), "resnet18": dict(dim=256, layers=4),
              "small": dict(dim=96, layers=2, dropout=0.0, position=True)}[args.backbone]
    return MeDSLIPConfig(backbone=args.backbone, image_size=args.image_size, **preset)


# -------------------------------------------------------------------------------------- measurement

def set_up(args):
    """The device, set up as train.py sets it up."""
    device = pick_device(args.device)
    torch.set_num_threads(args.threads)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    return device


def measure(args):
    """One case in this process -> {seconds, images_per_s, busy, peak_mb, ...}."""
    device = set_up(args)
    build = {"inference": inference_case, "losses": losses_case, "loop": losses_case,
             "data": data_case, "jpeg": jpeg_case}.get(args.case, step_case)
    step = build(args, device)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    began, value = time.perf_counter(), step()
    wait()
    first, seconds, cpu = time.perf_counter() - began, [], time.process_time()
    for _ in range(args.steps):
        wait()
        began = time.perf_counter()
        step()
        wait()
        seconds.append(time.perf_counter() - began)
    cpu = time.process_time() - cpu
    if device.type == "cuda" and args.case not in ("data", "jpeg"):
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024)
    result = {"case": args.case, "seconds": statistics.median(seconds), "first_seconds": first,
              "images_per_s": args.batch_size / statistics.median(seconds),
              "busy": cpu / sum(seconds) / torch.get_num_threads(), "peak_mb": peak / 1e6}
    return result | ({"value": value.item()} if torch.is_tensor(value) else {})


def matmul_speed(device, dtype, rounds=8):
    """Multiply-adds a second of a large matrix product: what this machine really reaches."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    best = 0
    for _ in range(rounds):
        if device.type == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = max(best, size**3 / (time.perf_counter() - began))
    return best


def in_process(args, case, **changes):
    """Runs one case in a process of its own; its result, or {"error": one line}."""
    flags = vars(args) | {"case": case} | changes
    command = [sys.executable, __file__] + [
        f"--{k.replace('_', '-')}={v}" for k, v in flags.items()
        if k not in ("figure", "cases", "out_dir") and v is not None]
    # glibc gives blocks above this size back to the system as soon as they are freed; by itself it
    # keeps those up to 32 MB in a heap that fragments. The price: new pages must be cleared
    lean = {"MALLOC_MMAP_THRESHOLD_": "1000000"} if case == "lean" else {}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=args.patience,
                              env=os.environ | lean)
    except subprocess.TimeoutExpired:
        return {"case": case, "error": f"not done after {args.patience} s"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        why = "killed, out of memory?" if done.returncode == -9 else (lines or ["no message"])[-1]
        return {"case": case, "error": why[:200]}
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------- output

def machine(device):
    """One line that says what the numbers were taken on."""
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    if device.type == "cpu" and os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        name = names[0] if names else name
    try:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True,
                                text=True, cwd=Path(__file__).parent).stdout.strip()
    except OSError:
        commit = ""
    return f"{name}, PyTorch {torch.__version__}, commit {commit or 'unknown'}"


def print_costs(config, m, n, batch, device):
    """The hand count as a table; -> multiply-adds of an image's forward pass."""
    rows = costs(config, m, n)
    parameters, work = (sum(row[k] for row in rows) for k in (1, 2))
    print(f"\n{'part':<26}{'parameters':>12}{'multiply-adds an image':>25}{'share':>8}")
    for part, count, adds in rows + [("all", parameters, work)]:
        print(f"{part:<26}{count:>12,}{adds:>25,}{adds / work:>8.1%}")
    state, kept = 16 * parameters, kept_bytes(config, m, n, device) * batch
    print(f"bytes of a step in fp32: {state / 1e6:.0f} MB of weights, gradients and two AdamW "
          f"moments (16 a parameter), {kept / 1e6:.0f} MB of activations kept for the backward "
          f"pass of {batch} images ({kept / batch / 1e6:.1f} each)")
    return work


def print_results(results, work, device):
    good = {r["case"]: r for r in results if "error" not in r}
    print(f"\n{'case':<44}{'s a step':>9}{'images/s':>10}{'v. floor':>9}{'peak MB':>9}{'busy':>6}")
    for r in results:
        if "error" in r:
            print(f"{CASES[r['case']]:<44} {r['error']}")
            continue
        ratio = f"{r['seconds'] / good['floor']['seconds']:.2f}" if "floor" in good else ""
        busy = f"{r['busy']:.2f}" if device.type == "cpu" else ""
        print(f"{CASES[r['case']]:<44}{r['seconds']:>9.4f}{r['images_per_s']:>10.1f}{ratio:>9}"
              f"{r['peak_mb']:>9.0f}{busy:>6}")
    if {"losses", "loop"} <= good.keys():
        ours, loop = good["losses"], good["loop"]
        print(f"interaction losses: {loop['seconds'] / ours['seconds']:.0f} times faster than the "
              f"loops; values {ours['value']:.6f} and {loop['value']:.6f}")
    if {"data", "jpeg"} <= good.keys():
        print(f"data: {1e3 / good['data']['images_per_s']:.2f} ms an image and core, "
              f"{1e3 / good['jpeg']['images_per_s']:.1f} as published")
    for case in [c for c in good if c in ("fp32", "lean", "nchw", "compile", "bf16", "fp16")]:
        half = case in ("bf16", "fp16")
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(case, torch.float32)
        rate = 3 * work * good[case]["images_per_s"]
        good[case]["macs_per_s"] = rate
        measured = matmul_speed(device, dtype)
        good[case]["of_matmul"] = rate / measured
        note = (f"{case}: {2 * rate / 1e12:.3f} TFLOP/s, {rate / measured:.0%} of the "
                f"{2 * measured / 1e12:.3f} that a large matrix product reaches here")
        for name, peak in PEAK.items():
            if device.type == "cuda" and name in re.split("[ -]", torch.cuda.get_device_name()):
                good[case]["of_peak"] = 2 * rate / 1e12 / peak[half]
                note += f", {good[case]['of_peak']:.0%} of the data sheet's {peak[half]} TFLOP/s"
                break
        print(note)


GROWTH = {"batch_size": (2, 4, 8, 16, 32), "pathologies": (75, 150, 300, 600, 1000),
          "image_size": (112, 224, 336, 448)}


def growth(args, path, device):
    """Step time and memory against batch, queries and pixels, the rest held fixed -> picture."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    results = {}
    for flag, values in GROWTH.items():
        results[flag] = []
        for value in values:
            result = in_process(args, "fp32", **{flag: value})
            print(f"{flag} {value}: " + (result.get("error") or f"{result['seconds']:.3f} s, "
                                         f"{result['peak_mb']:.0f} MB, busy {result['busy']:.2f}"))
            results[flag].append(result | {flag: value})
    figure, axes = plt.subplots(2, 3, figsize=(10, 5), sharex="col", layout="constrained")
    for column, (flag, label) in enumerate((("batch_size", "images a step"),
                                            ("pathologies", "pathology queries"),
                                            ("image_size", "pixels a side"))):
        good = [r for r in results[flag] if "error" not in r]
        for row, (key, scale) in enumerate((("seconds", 1), ("peak_mb", 1e3))):
            ax = axes[row, column]
            ax.plot([r[flag] for r in good], [r[key] / scale for r in good], "o-", color="tab:blue")
            ax.set_ylim(bottom=0)
            ax.grid(alpha=0.3)
        axes[1, column].set_xlabel(label)
    axes[0, 0].set_ylabel("seconds a step")
    axes[1, 0].set_ylabel("peak memory, GB")
    figure.suptitle(f"fp32 training step, else batch {args.batch_size}, {args.pathologies} + "
                    f"{args.anatomies} queries, {args.image_size} pixels\n{machine(device)}, "
                    f"{args.threads} threads", fontsize=9)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")
    return results


def parse_args(argv=None):
    p = Parser(prog="bench.py", description=__doc__.split("\n")[0])
    p.add_argument("--cases", default=",".join(CASES), help="comma-separated: " + " ".join(CASES))
    p.add_argument("--figure", metavar="FILE", help="draw the growth curves instead of the table")
    p.add_argument("--batch-size", type=int, help="images a step (32; with --figure 8)")
    p.add_argument("--image-size", type=int, default=224, help="pixels a side")
    p.add_argument("--pathologies", type=int, default=75, help="queries")
    p.add_argument("--anatomies", type=int, default=51, help="queries")
    p.add_argument("--backbone", default="resnet50", choices=["resnet18", "resnet50", "small"])
    p.add_argument("--steps", type=int, help="timed steps a case (CPU 3, GPU 20)")
    p.add_argument("--device", help="cuda where there is one, else cpu")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    p.add_argument("--patience", type=int, default=600, help="seconds until a case is given up")
    p.add_argument("--out-dir", default="out", help="where bench.json goes")
    p.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)  # one case, in this process
    args = p.parse_args(argv)
    if args.batch_size is None:
        args.batch_size = 8 if args.figure else 32
    return args


def main(args):
    device = set_up(args)
    if args.steps is None:
        args.steps = 20 if device.type == "cuda" else 3
    if min(args.batch_size, args.steps, args.threads) < 1:
        raise InputError("--batch-size, --steps and --threads must be at least 1")
    if args.case:
        print(json.dumps(measure(args)))
        return
    out = Path(args.out_dir) / "bench.json"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make --out-dir {args.out_dir} ({error.strerror})")
    chosen = [case.strip() for case in args.cases.split(",")]
    if unknown := set(chosen) - set(CASES):
        raise InputError(f"--cases {', '.join(sorted(unknown))}: choose among {', '.join(CASES)}")
    print(f"{machine(device)}, {args.threads} threads; batch {args.batch_size}, {args.image_size} "
          f"pixels, {args.pathologies} + {args.anatomies} queries")
    report = {"machine": machine(device), "args": vars(args)}
    results = []
    if args.figure:
        report["growth"] = growth(args, args.figure, device)
    else:
        for case in chosen:
            if case in (CPU_ONLY if device.type == "cuda" else GPU_ONLY):
                continue
            print(f"running {case} ...", end="\r", file=sys.stderr)
            results.append(in_process(args, case))
    # after the cases, for a process starts with the peak memory of the one that it is forked from
    work = print_costs(config_of(args), args.pathologies, args.anatomies, args.batch_size, device)
    if results:
        print_results(results, work, device)
        report["results"] = results
    out.write_text(json.dumps(report, indent=1))
    print(f"wrote {out}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except InputError as error:
        print(f"bench.py: {error}", file=sys.stderr)
        sys.exit(2)
