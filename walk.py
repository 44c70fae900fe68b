"""One radiograph and its report on their way from file to loss: where a newcomer starts.

    python walk.py              # a phantom, ten seconds, no training; writes out/walk.jpg .txt .png
    python walk.py --seed 3     # another one

Every tensor is printed with its shape and, where it has one, its equation. The network is that of
the phantoms with random weights; the queries are the published 75 pathologies and 51 anatomies.
Some tensors are made a second time, to be shown; the rest is what training calls, but for the
augmentation.
"""
from pathlib import Path

import torch

import figures
import phantom
from cli import Parser, atomic, number, run
from data import to_input
from formats.images import read_image
from losses import image_labels, medslip_loss
from model import MeDSLIP, MeDSLIPConfig
from reports import extract_triplets
from text import (ANATOMIES, PATHOLOGIES, anatomy_prompts, encode_text, existence_matrix,
                  pathology_prompts)


def parse_args(argv=None):
    p = Parser(description=__doc__.split("\n")[0])
    p.add_argument("--seed", type=number(int, 0), default=0, help="which phantom")
    p.add_argument("--out-dir", default="out", metavar="DIR")
    return p.parse_args(argv)


def show(name, value, meaning):
    shape = ",".join(str(size) for size in value.shape)
    print(f"  {name:<11} {shape:<10} {meaning}")


def read_report(report):
    """The report's text -> existence matrix y [1,n,m] (Sec. II-A)."""
    print("report\n  " + " ".join(report.split()))
    print("text (Sec. II-A): reports.py reads triplets, text.py makes the matrix")
    triplets = extract_triplets(report)
    for t in triplets:
        print(f"  triplet     ({t.pathology}, {t.anatomy}, {t.existence})")
    y = torch.from_numpy(existence_matrix(triplets, PATHOLOGIES, ANATOMIES))[None]
    show("y", y, f"B,n,m: {(y == 1).sum()} cells present (1), {(y == 0).sum()} denied (0), "
                 "the rest not mentioned (-1)")
    return y


def look(model, image, p_text, a_text):
    """What happens within model(...), from its features to its answers. Returns its output."""
    print("image (Sec. II-B.1): model.py")
    first, stride = model.cell_centres()
    out = model(image, p_text, a_text, need_attention=True)
    raw = out.raw_features                                                      # [B,h*w,C]
    show("image", image, "B,3,H,W: ImageNet's mean and deviation taken out")
    show("E_I(image)", model.backbone(image),
         f"B,C,h,w: one cell every {stride} pixels, the first at {first}")
    show("I^raw", raw, "B,h*w,C: one token per cell, its position embedding added")
    show("M", model.mask(raw).sigmoid(), "sigmoid(Linear(I^raw)), in 0..1")
    show("I^p", out.pathology_features, "M * I^raw (Eq. 1)")
    show("I^a", out.anatomy_features, "(1 - M) * I^raw (Eq. 1)")
    for s, stream, vectors in (("p", "pathology", p_text), ("a", "anatomy", a_text)):
        print(f"{stream} stream (Sec. II-B.2)")
        show(f"T^{s}", model.text_projection(vectors), f"h_T(E_T({s})): the queries")
        show("tokens", getattr(out, f"{stream}_tokens"), f"MLP(I^{s})")
        show(f"I_q^{s}", getattr(out, f"{stream}_queried"), f"Q^{s}(I^{s}, T^{s})")
        show("attention", getattr(out, f"{stream}_attention"), "of each query, over the cells")
        show(f"y_hat^{s}", getattr(out, f"{stream}_logits"), "existence, before the sigmoid")
        show(f"Z_2^{s}", getattr(out, f"{stream}_z"), f"Linear(I_q^{s}), compared with E_T")
    show("evidence", out.pathology_evidence, "softmax of the log odds that make y_hat^p")
    return out


def sum_losses(out, y, p_text, a_text):
    """Eqs. 2-7. What the report does not mention counts as denied, as in the paper."""
    print("losses (Eq. 2 and Sec. II-B.3): losses.py")
    y = y.clamp(min=0)  # shown here; medslip_loss does it itself
    present = (y == 1).float()                                                  # [B,n,m]
    y_p, y_a = image_labels(y)
    places = present.transpose(1, 2) @ a_text / present.sum(1).clamp(min=1)[..., None]
    findings = present @ p_text / present.sum(2).clamp(min=1)[..., None]
    show("y^p", y_p, f"1 if y has it at any anatomy: {(y_p == 1).sum()} present")
    show("y^a", y_a, f"1 if y has any pathology there: {(y_a == 1).sum()} present")
    show("P^a", places, "mean of the E_T(a) where y holds the pathology (Eq. 3)")
    show("P^p", findings, "mean of the E_T(p) that y holds at the anatomy (Eq. 3)")
    show("S^a,p", out.relation_logits, "<Z_1^a, Z_1^p>, scaled and shifted (Eq. 5)")
    loss = medslip_loss(out, y, p_text, a_text)
    for name, key, meaning in (
            ("L_Exist", "existence", "BCE(y_hat^p, y^p) + BCE(y_hat^a, y^a) (Eq. 2)"),
            ("L_ProtoCL", "protocl", "-log softmax: Z_2 . P against 7 negatives (Eq. 4)"),
            ("L_ICL", "icl", "BCE(S^a,p, y) (Eq. 6)"),
            ("L", "loss", "their sum (Eq. 7 at alpha = beta = 1)")):
        print(f"  {name:<11} {loss[key]:<10.4f} {meaning}")


@torch.no_grad()
def main(args):
    out_dir = Path(args.out_dir).absolute()
    film = phantom.plan(1, args.seed, size=64, places=0.27, world="easy")[0]
    with atomic(out_dir / "walk.png") as picture:  # makes the folder, too
        film.draw(str(out_dir / "walk.jpg"), out_dir / "walk.txt")
        pixels = read_image(film.path, 64)                                      # [64,64]
        y = read_report((out_dir / "walk.txt").read_text())                     # [1,n,m]
        figures.draw_walk(picture, pixels, film.findings, y[0].numpy(), PATHOLOGIES, ANATOMIES)
    p_text = encode_text(pathology_prompts(PATHOLOGIES), "hashing")             # [m,T]
    a_text = encode_text(anatomy_prompts(ANATOMIES), "hashing")                 # [n,T]
    show("E_T(p)", p_text, "m,T: one frozen vector per definition of a pathology")
    show("E_T(a)", a_text, "n,T: one per place, such as 'It is located at the left hilum.'")
    torch.manual_seed(args.seed)
    model = MeDSLIP(MeDSLIPConfig("small", image_size=64, dim=96, layers=2, position=True,
                                  existence="evidence")).eval()
    image = to_input(torch.tensor(pixels)[None], 64)                            # [1,3,64,64]
    out = look(model, image, p_text, a_text)
    sum_losses(out, y, p_text, a_text)
    print(f"the film, its findings and its matrix: {out_dir / 'walk.png'}")


if __name__ == "__main__":
    run(main, parse_args)
