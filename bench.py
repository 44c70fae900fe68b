"""How fast each part is and how much memory it takes, on the device at hand.

    python bench.py --batch-size 64 --cases floor,fp32,bf16        # what a GPU owner asks first
    python bench.py --batch-size 4 --steps 1 --cases floor,fp32    # under a minute

Sizes are the paper's: ResNet-50 up to layer3, 224 pixels, 75 + 51 queries. A step is forward,
losses, backward, clipping and AdamW on images in memory; `data` and `jpeg` are what one core needs
for the images of a step. Peak MB is that of the process, 0.6 GB of imports included, on a GPU that
of the tensors. On a GPU fp32 means TF32. OMP_NUM_THREADS sets the cores of a step.
"""
import io
import math
import statistics
import sys
import timeit
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import v2

from cli import InputError, Parser, join_processes, number, run
from data import Batches, released_operation
from losses import icl_loss, medslip_loss, proto_loss
from model import MeDSLIP, MeDSLIPConfig
from text import ANATOMIES, PATHOLOGIES, Triplet


def parse_args(argv=None):
    p = Parser(description=__doc__.split("\n")[0])
    p.add_argument("--cases", default=",".join(CASES), help="comma-separated: " + " ".join(CASES))
    p.add_argument("--batch-size", type=number(int, 1), default=32)
    p.add_argument("--image-size", type=number(int, 16), default=224, help="pixels a side")
    p.add_argument("--steps", type=number(int, 1), default=3, help="timed steps per case")
    p.add_argument("--device", help="cuda where there is one, else cpu")
    return p.parse_args(argv)


def random_batch(args, device):
    """images [B,3,S,S], pathology text [m,T], anatomy text [n,T], existence [B,n,m] in {1,0}: 1.5 %
    of the cells are present, far more than in reports, so that the loops have work to do."""
    torch.manual_seed(0)
    B, m, n = args.batch_size, len(PATHOLOGIES), len(ANATOMIES)
    images = torch.randn(B, 3, args.image_size, args.image_size, device=device)
    texts = [0.04 * torch.randn(q, 768, device=device) for q in (m, n)]
    existence = (torch.rand(B, n, m, device=device) < 0.015).long()
    return images.contiguous(memory_format=torch.channels_last), *texts, existence


def step_case(case, args, device):
    """-> a training step of the whole model, or of its backbone with the mean square as a loss."""
    images, pathology_text, anatomy_text, existence = random_batch(args, device)
    model = MeDSLIP(MeDSLIPConfig(image_size=args.image_size))
    model = model.to(device, memory_format=torch.channels_last)
    trained = model.backbone if case == "floor" else model
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=case == "bf16"):
            if case == "floor":
                loss = trained(images).square().mean()
            else:
                out = trained(images, pathology_text, anatomy_text)
                loss = medslip_loss(out, existence, pathology_text, anatomy_text)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def our_losses(streams, relation, existence):
    """ProtoCL of both streams and ICL by losses.py; arguments as in `published_losses`."""
    loss = icl_loss(relation, existence)
    for z, text, y, negatives in streams:
        loss = loss + proto_loss(z, text, y, negative_index=negatives)
    return loss


def published_losses(streams, relation, existence):
    """The same by the released algorithm, in our words; relation and existence [B,n,m].

    streams: (z [B,q,T], text vectors [k,T] of the other stream's concepts, y [B,q,k], negatives
    [B,q,7]) of pathologies and anatomies. Labels and vectors are repeated for every image, query
    and concept.
    """
    known = existence >= 0
    loss = F.binary_cross_entropy_with_logits(relation[known], existence[known].float())  # Eq. 6
    for z, text, y, negatives in streams:
        labels = (y == 1).float().unsqueeze(-1).repeat(1, 1, 1, z.shape[-1])    # [B,q,k,T]
        products = labels * text.repeat(y.shape[0], y.shape[1], 1, 1)           # [B,q,k,T]
        prototypes = torch.zeros_like(z)                                        # [B,q,T]
        for b in range(z.shape[0]):
            for i in range(z.shape[1]):
                product = products[b, i]                                        # [k,T]
                if (product != 0).sum() > 0:  # here a GPU is waited for, B q times a step
                    positives = product.nonzero()[:, 0].unique()
                    prototypes[b, i] = product.sum(0) / len(positives)          # Eq. 3
        candidates = torch.cat([prototypes.unsqueeze(2), text[negatives]], 2)   # [B,q,8,T]
        logits = (candidates @ z.unsqueeze(-1)).squeeze(-1)[(y == 1).any(-1)]   # [queries,8]
        first = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        loss = loss + F.cross_entropy(logits, first)                            # Eq. 4
    return loss


def random_streams(pathology_text, anatomy_text, existence, count=7):
    """The `streams` of the two functions above, with `count` negatives that are not present."""
    streams = []
    for text, y in ((anatomy_text, existence.transpose(1, 2)), (pathology_text, existence)):
        z = torch.randn(*y.shape[:2], text.shape[1], device=y.device, requires_grad=True)
        noise = torch.rand(y.shape, device=y.device).masked_fill(y == 1, -1)
        streams.append((z, text, y, noise.topk(count, dim=-1).indices))
    return streams


def losses_case(case, args, device):
    """-> forward and backward of ProtoCL and ICL from given embeddings."""
    _, *texts, existence = random_batch(args, device)
    streams = random_streams(*texts, existence)
    relation = torch.randn(existence.shape, device=device, requires_grad=True)
    loss = published_losses if case == "loop" else our_losses
    return lambda: loss(streams, relation, existence).backward()


def data_case(case, args, device):
    """-> a training batch of stored images with six triplets each, augmented as in the paper."""
    images = np.random.default_rng(0).integers(0, 256, (args.batch_size, 256, 256), np.uint8)
    triplets = [Triplet(PATHOLOGIES[k], ANATOMIES[k], 1) for k in range(6)]
    table = SimpleNamespace(images=images, has_report=images.any((1, 2)),
                            triplets=lambda row: triplets)
    batches = Batches(table, np.arange(len(images)), args.batch_size, 0, PATHOLOGIES, ANATOMIES,
                      args.image_size)
    return lambda: batches[0]


def jpeg_case(case, args, device):
    """-> the same as released: every image is a file of 3 MB that is decoded whole, as RGB."""
    rng, file = np.random.default_rng(0), io.BytesIO()
    film = Image.fromarray(rng.integers(0, 256, (16, 16), np.uint8)).resize((2544, 3056))
    film = np.array(film) + 3 * rng.standard_normal((3056, 2544))  # the grain makes it large
    Image.fromarray(film.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=95)
    recipe = v2.Compose([
        v2.RandomResizedCrop(args.image_size, (0.2, 1), interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(), v2.Lambda(released_operation), v2.Lambda(released_operation),
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    return lambda: [recipe(Image.open(file).convert("RGB")) for _ in range(args.batch_size)]


CASES = {
    "floor": ("backbone alone, fp32", step_case), "fp32": ("full step, fp32", step_case),
    "bf16": ("full step, bf16", step_case), "losses": ("ProtoCL and ICL, ours", losses_case),
    "loop": ("ProtoCL and ICL, published loops", losses_case),
    "data": ("one core: stored 256-pixel images", data_case),
    "jpeg": ("one core: full-size JPEG, as published", jpeg_case)}


def measure(case, args):
    """One case in this process -> (median seconds of a step, peak in MB)."""
    one_core = case in ("data", "jpeg")
    device, _, _ = join_processes("cpu" if one_core else args.device)
    if one_core:
        torch.set_num_threads(1)
    step = CASES[case][1](case, args, device)

    def timed():
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    timed()  # the first one also chooses algorithms and fills caches
    seconds = statistics.median(timeit.repeat(timed, number=1, repeat=args.steps))
    if device.type == "cuda":
        return seconds, torch.cuda.max_memory_allocated() / 1e6
    if sys.platform == "win32":
        return seconds, math.nan  # Windows does not tell
    import resource
    unit = 1e6 if sys.platform == "darwin" else 1e3  # bytes on a Mac, else kilobytes
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def main(args):
    cases, floor, failed = args.cases.split(","), math.nan, 0
    if not set(cases) <= set(CASES):
        raise InputError(f"--cases {args.cases}: choose among {','.join(CASES)}")
    print(f"{'case':<40}{'s/step':>9}{'images/s':>9}{'v. floor':>9}{'peak MB':>9}")
    for case in cases:
        # each in a process of its own, so that its peak memory is its own
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            try:
                seconds, peak = pool.submit(measure, case, args).result()
            except (RuntimeError, MemoryError) as error:  # mostly too little memory
                print(f"{CASES[case][0]:<40} {' '.join(str(error).split())[:80]}")
                failed = 1
                continue
        floor = seconds if case == "floor" else floor
        print(f"{CASES[case][0]:<40}{seconds:9.4f}{args.batch_size / seconds:9.1f}"
              f"{seconds / floor:9.2f}{peak:9.0f}")
    sys.exit(failed)


if __name__ == "__main__":
    run(main, parse_args)
