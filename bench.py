"""How fast each part is on the device at hand, and how much memory it takes.

    python bench.py --batch-size 64 --cases floor,fp32,bf16        # what a GPU owner asks first
    python bench.py --batch-size 4 --steps 1 --cases floor,fp32    # under a minute
    /usr/bin/time -v python bench.py --cases fp32                  # without a GPU: peak memory

floor, fp32, bf16: a training step of the backbone alone, and of the model; fp32 is TF32 on a GPU.
losses, loop: ProtoCL and ICL by our matrices, and by the published loops.
data, jpeg: what one core needs for the images of a step, stored at 256 pixels as here, or as
full-size JPEG files as published.
Sizes are the paper's: ResNet-50 up to layer3, 224 pixels, 75 + 51 queries. A step is forward,
losses, backward, clipping and AdamW. Peak MB is that of tensors on a GPU. OMP_NUM_THREADS sets the
cores of a step.
"""
import io
import math
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.benchmark import Timer
from torchvision.transforms import v2

from cli import InputError, Parser, join_processes, number, run
from data import Batches, released_operation
from losses import icl_loss, medslip_loss, proto_loss
from model import MeDSLIP, MeDSLIPConfig
from text import ANATOMIES, PATHOLOGIES, Triplet


def parse_args(argv=None):
    p = Parser(description=__doc__.split("\n")[0])
    p.add_argument("--cases", default=",".join(CASES), help="comma-separated (all)")
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
    p_text, a_text = (0.04 * torch.randn(q, 768, device=device) for q in (m, n))
    existence = (torch.rand(B, n, m, device=device) < 0.015).long()
    return images.contiguous(memory_format=torch.channels_last), p_text, a_text, existence


def model_step(case, args, device):
    """-> a training step of the whole model, or of its backbone with the mean square as a loss."""
    images, p_text, a_text, existence = random_batch(args, device)
    model = MeDSLIP(MeDSLIPConfig(image_size=args.image_size))
    model.to(device, memory_format=torch.channels_last)
    trained = model.backbone if case == "floor" else model
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=case == "bf16"):
            if case == "floor":
                loss = trained(images).square().mean()
            else:
                out = trained(images, p_text, a_text)
                loss = medslip_loss(out, existence, p_text, a_text)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return step


def loop_proto_loss(z, text, existence, negative_index):
    """losses.proto_loss by the released algorithm, in our words: labels and vectors are repeated
    for every image, query and concept."""
    present = existence == 1                                                    # [B,q,k]
    labels = present.float().unsqueeze(-1).repeat(1, 1, 1, z.shape[-1])         # [B,q,k,T]
    products = labels * text.repeat(*z.shape[:2], 1, 1)                         # [B,q,k,T]
    prototypes = torch.zeros_like(z)                                            # [B,q,T]
    for b in range(z.shape[0]):
        for i in range(z.shape[1]):
            product = products[b, i]                                            # [k,T]
            if (product != 0).sum() > 0:  # here a GPU is waited for, B q times a step
                positives = product.nonzero()[:, 0].unique()
                prototypes[b, i] = product.sum(0) / len(positives)              # Eq. 3
    candidates = torch.cat([prototypes.unsqueeze(2), text[negative_index]], 2)  # [B,q,8,T]
    logits = (candidates @ z.unsqueeze(-1)).squeeze(-1)[present.any(-1)]        # [queries,8]
    first = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
    return F.cross_entropy(logits, first)                                       # Eq. 4


def losses_step(case, args, device):
    """-> forward and backward of ProtoCL and ICL from given embeddings."""
    _, p_text, a_text, existence = random_batch(args, device)
    loss_of = loop_proto_loss if case == "loop" else proto_loss
    relation = torch.randn(existence.shape, device=device, requires_grad=True)
    streams = []
    for text, y in ((a_text, existence.transpose(1, 2)), (p_text, existence)):  # y [B,q,k]
        z = torch.randn(*y.shape[:2], text.shape[1], device=device, requires_grad=True)
        negatives = torch.rand(y.shape, device=device).masked_fill(y == 1, -1).topk(7).indices
        streams.append((z, text, y, negatives))                                 # [B,q,T]

    def step():
        loss = icl_loss(relation, existence)
        for z, text, y, negatives in streams:
            loss = loss + loss_of(z, text, y, negative_index=negatives)
        loss.backward()
    return step


def data_step(case, args, device):
    """-> a training batch of stored images with six triplets each, augmented as released."""
    images = np.random.default_rng(0).integers(0, 256, (args.batch_size, 256, 256), np.uint8)
    triplets = [Triplet(PATHOLOGIES[k], ANATOMIES[k], 1) for k in range(6)]
    table = SimpleNamespace(images=images, has_report=images.any((1, 2)),
                            triplets=lambda row: triplets)
    batches = Batches(table, np.arange(len(images)), args.batch_size, 0, PATHOLOGIES, ANATOMIES,
                      args.image_size)
    return lambda: batches[0]


def jpeg_step(case, args, device):
    """-> the same as released: every image is a file of 2 MB that is decoded whole, as RGB."""
    rng, file = np.random.default_rng(0), io.BytesIO()
    film = rng.normal(128, 3, (3056, 2544)).astype(np.uint8)  # the grain makes the file large
    Image.fromarray(film).save(file, "JPEG", quality=95)
    recipe = v2.Compose([
        v2.RandomResizedCrop(args.image_size, (0.2, 1), interpolation=v2.InterpolationMode.BICUBIC),
        v2.RandomHorizontalFlip(), v2.Lambda(released_operation), v2.Lambda(released_operation),
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])
    return lambda: [recipe(Image.open(file).convert("RGB")) for _ in range(args.batch_size)]


CASES = {"floor": model_step, "fp32": model_step, "bf16": model_step, "losses": losses_step,
         "loop": losses_step, "data": data_step, "jpeg": jpeg_step}


def measure(case, args):
    """One case -> (mean seconds of a step, peak MB of tensors on a GPU)."""
    device, _, _ = join_processes(args.device)
    step = {"step": CASES[case](case, args, device)}
    threads = 1 if case in ("data", "jpeg") else torch.get_num_threads()
    # the timer warms up, and waits for a GPU
    seconds = Timer("step()", globals=step, num_threads=threads).timeit(args.steps).mean
    peak = torch.cuda.max_memory_allocated() / 1e6 if device.type == "cuda" else math.nan
    return seconds, peak


def main(args):
    cases, floor = args.cases.split(","), math.nan
    if not set(cases) <= set(CASES):
        raise InputError(f"--cases {args.cases}: choose among {','.join(CASES)}")
    print(f"{'case':<9}{'s/step':>9}{'images/s':>10}{'v. floor':>10}{'peak MB':>10}")
    for case in cases:
        # in a process of its own: memory that another case left made the loops twice as fast
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            seconds, peak = pool.submit(measure, case, args).result()
        floor = seconds if case == "floor" else floor
        print(f"{case:<9}{seconds:9.4f}{args.batch_size / seconds:10.1f}{seconds / floor:10.2f}"
              f"{peak:10.0f}")


if __name__ == "__main__":
    run(main, parse_args)
