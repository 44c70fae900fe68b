"""How fast each part is and how much memory it takes, on the device at hand.

    python bench.py                                    # the table, minutes on two cores
    python bench.py --batch-size 64 --cases floor,fp32,bf16,compile    # what a GPU owner asks first
    python bench.py --cases floor,fp32 --batch-size 4 --steps 1        # under a minute

Sizes are the paper's unless flags say otherwise: ResNet-50 up to layer3, 224 pixels, 75 + 51
queries. A step is forward, losses, backward, clipping and AdamW on images that are in memory; the
rows `data` and `jpeg` are what one core needs to read and augment them. Seconds are the median
after a warm-up step. Peak MB is that of the process, 0.7 GB of imports included; on a GPU that of
its tensors. On a GPU fp32 means TF32.
"""
import argparse
import io
import json
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import data
from cli import InputError, Parser, number, pick_device, run
from losses import icl_loss, medslip_loss, proto_loss
from model import MeDSLIP, MeDSLIPConfig

CASES = {
    "floor": "backbone alone, fp32",
    "fp32": "full step, fp32",
    "bf16": "full step, bf16",
    "compile": "full step, fp32, torch.compile",
    "inference": "zero-shot inference, fp32",
    "losses": "ProtoCL and ICL, ours",
    "loop": "ProtoCL and ICL, loops as published",
    "data": "one core: prepared 256-pixel images",
    "jpeg": "one core: full-size JPEG, as published",
    "preset": "full step of the CPU preset, fp32"}
PATHOLOGIES, ANATOMIES = 75, 51   # queries
FILM = (2544, 3056)               # width and height of a radiograph in MIMIC-CXR-JPG


def random_batch(args, device):
    """images [B,3,S,S], pathology text [m,T], anatomy text [n,T], existence [B,n,m].

    1.5 % of the cells are present, far more than in reports, so that the loops have work to do.
    """
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
    cells = torch.rand(args.batch_size, ANATOMIES, PATHOLOGIES)
    tensors = (images.contiguous(memory_format=torch.channels_last),
               0.04 * torch.randn(PATHOLOGIES, 768), 0.04 * torch.randn(ANATOMIES, 768),
               (cells < 0.015).long())
    return [tensor.to(device) for tensor in tensors]


def build_model(args, device):
    config = MeDSLIPConfig(backbone=args.backbone, image_size=args.image_size)
    if args.backbone == "small":  # the CPU preset of train.py
        config = MeDSLIPConfig(backbone="small", image_size=args.image_size, dim=96, layers=2,
                               dropout=0.0, position=True)
    return MeDSLIP(config).to(device, memory_format=torch.channels_last)


def step_case(args, device):
    """-> a training step of the whole model, or of its backbone with the mean square as a loss."""
    if args.case == "preset":
        args.backbone, args.image_size = "small", 64
    images, pathology_text, anatomy_text, existence = random_batch(args, device)
    model = build_model(args, device)
    trained = model.backbone if args.case == "floor" else model
    forward = torch.compile(trained) if args.case == "compile" else trained
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-4, fused=True)

    def step():
        with torch.autocast(device.type, torch.bfloat16, enabled=args.case == "bf16"):
            if args.case == "floor":
                loss = forward(images).square().mean()
            else:
                out = forward(images, pathology_text, anatomy_text)
                loss = medslip_loss(out, existence, pathology_text, anatomy_text)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def inference_case(args, device):
    images, pathology_text, anatomy_text, _ = random_batch(args, device)
    model = build_model(args, device).eval()
    return torch.inference_mode()(lambda: model(images, pathology_text, anatomy_text))


def our_losses(z, texts, relation, existence, negatives):
    """ProtoCL of both streams and ICL by losses.py; arguments as in `published_losses`."""
    by_pathology = existence.transpose(1, 2)                                    # [B,m,n]
    return (proto_loss(z[0], texts[0], by_pathology, negative_index=negatives[0])
            + proto_loss(z[1], texts[1], existence, negative_index=negatives[1])
            + icl_loss(relation, existence))


def published_losses(z, texts, relation, existence, negatives):
    """The same by the released algorithm, in our words.

    Pairs of the pathology and the anatomy stream: z [B,q,T], the *other* stream's text vectors
    [k,T], negatives [B,q,7]; relation and existence [B,n,m]. Labels and text vectors are both
    repeated for every image, query and concept; all six tensors [B,q,k,T] are alive at once.
    """
    present = [(existence.transpose(1, 2) == 1), (existence == 1)]              # [B,q,k] each
    labels = [p.float().unsqueeze(-1).repeat(1, 1, 1, z[0].shape[-1]) for p in present]
    vectors = [texts[s].repeat(*z[s].shape[:2], 1, 1) for s in (0, 1)]          # [B,q,k,T] each
    products = [labels[s] * vectors[s] for s in (0, 1)]                         # [B,q,k,T] each
    loss = F.binary_cross_entropy_with_logits(relation, existence.float())      # Eq. 6
    for s in (0, 1):
        prototypes = torch.zeros_like(z[s])                                     # [B,q,T]
        for b in range(z[s].shape[0]):
            for i in range(z[s].shape[1]):
                product = products[s][b, i]                                     # [k,T]
                if (product != 0).sum() > 0:  # on a GPU the host waits here, B q times a step
                    positives = product.nonzero()[:, 0].unique()
                    prototypes[b, i] = product.sum(0) / len(positives)          # Eq. 3
        candidates = torch.cat([prototypes.unsqueeze(2), texts[s][negatives[s]]], 2)  # [B,q,8,T]
        logits = (candidates @ z[s].unsqueeze(-1)).squeeze(-1)                  # [B,q,8]
        logits = logits[present[s].any(-1)]                                     # [queries,8]
        target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        loss = loss + F.cross_entropy(logits, target)                           # Eq. 4
    return loss


def losses_case(args, device):
    """-> forward and backward of ProtoCL and ICL from given embeddings."""
    _, pathology_text, anatomy_text, existence = random_batch(args, device)
    z = [torch.randn(len(existence), q, 768, device=device, requires_grad=True)
         for q in (PATHOLOGIES, ANATOMIES)]
    relation = torch.randn(existence.shape, device=device, requires_grad=True)
    negatives = []
    for y in (existence.transpose(1, 2), existence):  # seven concepts that are not present
        noise = torch.rand(y.shape, device=device).masked_fill(y == 1, -1)
        negatives.append(noise.topk(7, dim=-1).indices)                         # [B,q,7]
    loss = published_losses if args.case == "loop" else our_losses
    return lambda: loss(z, [anatomy_text, pathology_text], relation, existence,
                        negatives).backward()
