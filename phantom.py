"""Synthetic chest radiographs with findings, masks, boxes and reports, in MIMIC-CXR-JPG's layout.

    python phantom.py --layout mimic --root data/synthetic --count 12000   # train.py does this itself
    python phantom.py --layout mimic --root /tmp/phantom --count 200 --size 256

Images are drawn in a chest frame: x runs over [-1, 1] from left to right of the image, y downwards,
the spine at x = 0. The patient's left is on the image's RIGHT, as on every radiograph. One finding
is (pathology, anatomy, mask); its cell of the existence matrix is (anatomy, pathology).
"""
import csv
import functools
import gzip
import io
import multiprocessing
import os
import sys
import textwrap
import types

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from text import InputError, Parser

LEFT, RIGHT = 1, -1          # sign of x: the patient's left is on the image's right
DETAIL = 256                 # films larger than this are drawn at 256 pixels and enlarged

# ------------------------------------------------------------------------------------------------
# The chest without findings


@functools.lru_cache(maxsize=4)
def pixel_grid(size):
    """x, y of the pixel centres, float32 [size, size] in [-1, 1]."""
    line = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    return np.meshgrid(line, line)


def smooth_noise(rng, size, cells):
    """Noise of about `cells` bumps across the image, standard deviation near 0.7: [size, size]."""
    noise = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(noise.resize((size, size), Image.Resampling.BICUBIC))


def ramp(distance, width):
    """0 outside, 1 inside, linear over `width` around distance 0."""
    return np.clip(distance * (1 / width) + 0.5, 0, 1)


def disc(c, x, y, rx, ry=None, angle=0.0):
    """Squared elliptical radius around (x, y): below 1 inside. [S, S]"""
    dx, dy = c.x - np.float32(x), c.y - np.float32(y)
    if angle:
        cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        dx, dy = dx * cos + dy * sin, dy * cos - dx * sin
    return dx * dx * (1 / rx ** 2) + dy * dy * (1 / (ry or rx) ** 2)


def segment(c, x0, y0, x1, y1):
    """Distance to the segment from (x0, y0) to (x1, y1). [S, S]"""
    dx, dy = x1 - x0, y1 - y0
    along = np.clip(((c.x - x0) * dx + (c.y - y0) * dy) * (1 / (dx * dx + dy * dy)), 0, 1)
    return np.sqrt((c.x - x0 - along * dx) ** 2 + (c.y - y0 - along * dy) ** 2)


def pose_chest(rng, size, names):
    """Geometry of one patient: a namespace of fields [S, S]; findings that move organs act here."""
    c = types.SimpleNamespace(size=size, rng=rng)
    px, py = pixel_grid(size)
    angle, scale = rng.normal(0, 0.035), rng.uniform(0.98, 1.14)
    cos, sin = np.float32(np.cos(angle) * scale), np.float32(np.sin(angle) * scale)
    shift = rng.uniform(-0.1, 0.1, 2)
    c.x = px * cos - py * sin + np.float32(shift[0])                            # [S, S]
    c.y = px * sin + py * cos + np.float32(shift[1])
    c.soft = max(0.03, 2.5 / size)                    # width of an edge, at least a pixel or so
    c.width = rng.uniform(0.76, 0.84)                 # half width of the thorax
    c.chest = disc(c, 0, 0.25, c.width, 1.06)         # below 1 inside the rib cage

    c.base = {LEFT: rng.normal(0.56, 0.04), RIGHT: rng.normal(0.50, 0.04)}      # diaphragm tops
    c.raised = {}
    for side, name in ((LEFT, "left_diaphragm"), (RIGHT, "right_diaphragm")):
        if ("elevation", name) in names:
            c.raised[side] = c.base[side]
            c.base[side] -= rng.uniform(0.24, 0.34)
    grow = rng.uniform(1.32, 1.55) if ("cardiomegaly", "heart_size") in names else rng.uniform(0.88, 1.06)
    c.heart_at, c.heart_r = (0.10 + 0.05 * grow, 0.32), (0.35 * grow, 0.27 * grow ** 0.6)
    c.heart = disc(c, *c.heart_at, *c.heart_r, angle=0.35)

    inside = (1 - c.chest) * 0.4
    c.x_abs, c.dome, c.space, c.lung = np.abs(c.x), {}, {}, {}
    for side in (LEFT, RIGHT):
        out = c.x * side                              # grows outwards on this side
        c.dome[side] = c.base[side] + 1.1 * (out - 0.34) ** 2 - c.y             # > 0 above it
        field = np.minimum(np.minimum(inside, out - 0.12), c.dome[side])
        c.space[side] = ramp(field, c.soft)           # lung, the part behind the heart included
        field = np.minimum(field, (c.heart - 1) * 0.2)
        if side == LEFT:
            field = np.minimum(field, (disc(c, 0.07, -0.26, 0.12, 0.15) - 1) * 0.06)    # aortic knob
        c.lung[side] = ramp(field, c.soft)
    c.rib_start = rng.uniform()                       # ribs are where the phase is a whole number
    c.rib_phase = (c.y - 0.33 * c.x_abs * c.x_abs) * (1 / 0.2) + np.float32(c.rib_start)
    c.cage = ramp(1.04 - c.chest, 0.1)
    return c


def rib_band(phase):
    return np.clip((np.cos(2 * np.pi * phase) - 0.5) * 2.5, 0, 1)


def render_chest(c, rng):
    """The film without findings, float32 [S, S]: air 0, lung about 0.25, soft tissue 0.6, metal 1."""
    neck = c.x_abs - 0.22                             # > 0 on the shoulders
    body = ramp(c.y + 0.98 - np.minimum(0.45 * neck, 8 * neck), 0.16) * ramp(1.04 - c.x_abs, 0.12)
    film = body * (0.60 - 0.9 * np.maximum(c.x_abs - 0.72, 0) ** 2)             # thinner sides
    lungs = c.lung[LEFT] + c.lung[RIGHT]
    film -= lungs * np.float32(rng.uniform(0.32, 0.40))
    c.markings = 0.05 * smooth_noise(rng, c.size, 22) * lungs
    c.markings *= np.exp(-3.0 * (c.x_abs - 0.14) ** 2 - 2.0 * (c.y - 0.02) ** 2)
    film += c.markings + 0.09 * np.exp(-40 * (c.x_abs - 0.19) ** 2 - 18 * (c.y - 0.02) ** 2)    # hila
    film += c.cage * rib_band(c.rib_phase) * np.float32(rng.uniform(0.05, 0.08))
    film += ramp(1 - c.heart, 0.5) * 0.06
    film += ramp(0.10 - c.x_abs, 0.05) * (0.035 + 0.02 * np.cos(c.y * 44))      # spine
    film -= ramp(0.04 - np.abs(c.x - 0.015), 0.04) * ramp(-0.24 - c.y, 0.1) * 0.10      # trachea
    abdomen = np.maximum(ramp(-c.dome[LEFT], 0.06), ramp(-c.dome[RIGHT], 0.06))
    film += abdomen * body * 0.10
    slope, high = rng.uniform(0.18, 0.30), rng.uniform(-0.66, -0.58)
    clavicle = np.abs(c.y - high + slope * (c.x_abs - 0.12))
    film += ramp(0.03 - clavicle, 0.03) * (c.x_abs > 0.09) * (c.x_abs < 0.78) * 0.12
    if rng.uniform() < 0.35:                                                    # breast shadows
        x, y = rng.uniform(0.40, 0.48), rng.uniform(0.25, 0.38)
        film += ramp(0.085 - (c.x_abs - x) ** 2 - (c.y - y) ** 2, 0.06) * 0.05
    return film


def hang_hardware(film, rng):
    """Bright things that are no findings, in the frame of the film: side marker, ECG leads."""
    x, y = pixel_grid(film.shape[0])
    if rng.uniform() < 0.8:                           # the letter L beside the patient's left
        at, top = rng.uniform(0.80, 0.90), rng.uniform(-0.95, -0.70)
        stem = (np.abs(x - at) < 0.025) & (np.abs(y - top) < 0.08)
        foot = (np.abs(x - at - 0.035) < 0.06) & (np.abs(y - top - 0.08) < 0.025)
        film = np.maximum(film, 1.12 * (stem | foot))
    if rng.uniform() < 0.35:
        for _ in range(rng.integers(1, 4)):
            dx, dy = rng.uniform(-0.75, 0.75), rng.uniform(-0.55, 0.7)
            radius = (x - dx) ** 2 + (y - dy) ** 2
            wire = (np.abs(x - dx - 0.15 * (y - dy)) < 0.012) & (y > dy)
            film = np.maximum(film, 1.05 * ramp(0.045 ** 2 - radius, 0.002) * (radius < 0.01))
            film = film + 0.07 * wire
    return film


# ------------------------------------------------------------------------------------------------
# Findings. Each function takes the chest and the anatomy's name and returns a list of
# (change of the film [S, S], mask [S, S] bool): one entry a place, so a bilateral look has two.

ZONES = {"upper": (-0.42, -0.24), "mid": (-0.10, 0.08), "lower": (0.22, 0.36)}  # y of the centre


def side_of(anatomy):
    return LEFT if "left" in anatomy else RIGHT if "right" in anatomy else 0


def place_in_lung(c, anatomy, radius):
    """A centre (x, y) in the named zone, far enough from the wall for a lesion of this radius."""
    side, rng = side_of(anatomy), c.rng
    low, high = ZONES[anatomy.split("_")[1]]
    y = rng.uniform(low, min(high, c.base[side] - 0.12))
    wall = c.width * np.sqrt(max(1 - ((y - 0.25) / 1.06) ** 2, 0.05)) - 0.65 * radius
    inner = 0.24
    if side == LEFT and y > c.heart_at[1] - c.heart_r[1]:                       # beside the heart
        inner = max(inner, c.heart_at[0] + 0.8 * c.heart_r[0])
    return side * rng.uniform(min(inner, wall - 0.04), wall), y, side


def in_lung(c, side, change, shape):
    change = change * c.space[side]
    return [(change, (shape > 0.35) & (c.space[side] > 0.5))]


def draw_patch(strength, radii, fall, texture=0.0):
    """Soft patch: consolidation is dense, opacity faint, pneumonia mottled by `texture`."""
    def patch(c, anatomy):
        r = c.rng.uniform(*radii)
        x, y, side = place_in_lung(c, anatomy, r)
        ragged = 1 + 0.22 * smooth_noise(c.rng, c.size, 9)
        shape = ramp(ragged - disc(c, x, y, r, r * c.rng.uniform(0.75, 1.15), c.rng.uniform(0, 3)), fall)
        grain = np.clip(1 + texture * smooth_noise(c.rng, c.size, 26), 0, 3) if texture else 1
        return in_lung(c, side, shape * grain * np.float32(c.rng.uniform(*strength)), shape)
    return patch


def draw_round(strength, radii, lobes):
    """Round and sharp: a nodule is small, a mass large with lobulated edges."""
    def ball(c, anatomy):
        r = c.rng.uniform(*radii)
        if "hilar" in anatomy:
            side = side_of(anatomy)
            x, y = side * c.rng.uniform(0.20, 0.27), c.rng.uniform(-0.06, 0.10)
        else:
            x, y, side = place_in_lung(c, anatomy, r)
        d = disc(c, x, y, r)
        if lobes:
            d = d * (1 + lobes * smooth_noise(c.rng, c.size, 12))
        shape = ramp(1 - d, max(0.35, 2.2 * c.soft / r))
        return in_lung(c, side, shape * np.float32(c.rng.uniform(*strength)), shape)
    return ball


def draw_effusion(c, anatomy):
    side, rng = side_of(anatomy), c.rng
    level = c.base[side] - rng.uniform(0.02, 0.30)                # fluid level near the midline
    rise = rng.uniform(0.25, 0.45)                                # meniscus: higher along the wall
    out = np.clip(c.x * side, 0, 1)
    above = level + 0.10 - rise * out * out * out * 2.2 - c.y     # > 0 above the fluid
    fluid = ramp(-above, 0.07) * c.lung[side]
    return [(fluid * np.maximum(0.60 - c.film, 0) * np.float32(rng.uniform(0.75, 1.0)), fluid > 0.5)]


def draw_pneumothorax(c, anatomy):
    side, rng = side_of(anatomy), c.rng
    depth, reach = rng.uniform(0.09, 0.14), rng.uniform(-0.32, 0.05)
    wall = (1 - c.chest) * 0.4 - depth * ramp(reach - c.y, 0.4)   # < 0 in the air outside the lung
    air = ramp(-wall, c.soft) * ramp(reach - c.y, 0.12) * c.lung[side]
    line = ramp(0.5 * c.soft + 0.006 - np.abs(wall), c.soft) * ramp(reach - c.y, 0.12) * c.lung[side]
    change = -air * (0.11 + c.markings) + line * 0.14
    return [(change, air > 0.5)]


def draw_atelectasis(c, anatomy):
    side, rng = side_of(anatomy), c.rng
    x, y = side * rng.uniform(0.36, 0.56), c.base[side] - rng.uniform(0.10, 0.34)
    half, tilt = rng.uniform(0.16, 0.24), side * rng.normal(0.1, 0.22)
    plate = ramp(0.05 - segment(c, x - half, y - half * tilt, x + half, y + half * tilt), c.soft)
    return in_lung(c, side, plate * np.float32(rng.uniform(0.20, 0.26)), plate)


def draw_cardiomegaly(c, anatomy):
    return [(np.float32(0), c.heart < 1)]             # pose_chest has already enlarged the heart


def draw_elevation(c, anatomy):
    side = side_of(anatomy)
    risen = (c.dome[side] < 0.04) & (c.dome[side] > c.base[side] - c.raised[side] + 0.02)
    return [(np.float32(0), risen & (c.chest < 1) & (c.x * side > 0.12))]


def draw_edema(c, anatomy):
    strength, reach = c.rng.uniform(0.14, 0.20), c.rng.uniform(0.20, 0.27)
    streaks = 1 + 0.25 * smooth_noise(c.rng, c.size, 18)
    wings = []
    for side in (LEFT, RIGHT):
        shape = ramp(1 - disc(c, side * 0.34, 0.02, reach, 1.35 * reach), 1.2)
        wings += in_lung(c, side, shape * streaks * np.float32(strength), shape)
    return wings


def draw_fracture(c, anatomy):
    rng = c.rng
    side, x, k = (LEFT, RIGHT)[rng.integers(2)], rng.uniform(0.38, 0.60), rng.integers(-2, 2)
    y = (float(k) - c.rib_start) * 0.2 + 0.33 * x * x             # on the k-th rib
    along, rib = c.x * side - x, c.rib_phase - k                  # outwards; 0 on the rib, 1 = next
    near = ramp(1 - disc(c, side * x, y, 0.18, 0.14), 0.3)
    # the outer fragment is stepped by 0.4 of the gap between ribs; both are bright, the gap is dark
    broken = np.where(along > 0, rib - 0.4, rib)
    bone = ramp(0.2 - np.abs(broken), 0.2)
    gap = ramp(0.03 - np.abs(along), c.soft) * (np.abs(rib - 0.2) < 0.5)
    change = near * (0.24 * bone - 0.06 * rib_band(c.rib_phase) - 0.18 * gap)
    return [(change, near > 0.5)]


def draw_tube(c, anatomy):
    rng, side = c.rng, side_of(anatomy)
    if side:                                          # chest tube, from the side towards the apex
        y0, y1 = rng.uniform(0.10, 0.35), rng.uniform(-0.45, -0.20)
        points = [(side * 0.95, y0 + 0.12), (side * 0.66, y0), (side * rng.uniform(0.3, 0.5), y1)]
        d = np.minimum(segment(c, *points[0], *points[1]), segment(c, *points[1], *points[2]))
        seen = d < 0.055
        seen &= c.chest < 1
    else:
        x, tip = rng.uniform(-0.015, 0.035), rng.uniform(-0.38, -0.22)
        d = segment(c, x + rng.normal(0, 0.03), -1.3, x, tip)
        seen = d < 0.06
    wall = ramp(0.032 - np.abs(d - 0.012), c.soft)
    return [(wall * np.float32(rng.uniform(0.20, 0.28)), seen)]


LUNG_ZONES = [f"{side}_{zone}_lung" for side in ("left", "right") for zone in ZONES]
PLEURA = ["left_pleural", "right_pleural"]

# pathology: (how often, anatomies it is drawn at, how it is drawn)
LOOKS = {
    "effusion": (1.2, PLEURA, draw_effusion),
    "pneumothorax": (1.0, ["left_apical_lung", "right_apical_lung"], draw_pneumothorax),
    "consolidation": (1.2, LUNG_ZONES, draw_patch((0.22, 0.28), (0.17, 0.24), 0.5)),
    "opacity": (1.2, LUNG_ZONES, draw_patch((0.11, 0.15), (0.20, 0.27), 1.2)),
    "pneumonia": (1.1, LUNG_ZONES, draw_patch((0.12, 0.16), (0.19, 0.26), 0.7, texture=1.3)),
    "nodule": (1.1, LUNG_ZONES, draw_round((0.22, 0.28), (0.095, 0.125), 0.0)),
    "mass": (1.0, LUNG_ZONES[0:2] + LUNG_ZONES[3:5] + ["left_hilar", "right_hilar"],
             draw_round((0.22, 0.28), (0.16, 0.22), 0.25)),
    "atelectasis": (1.0, ["left_lower_lung", "right_lower_lung"], draw_atelectasis),
    "cardiomegaly": (0.8, ["heart_size"], draw_cardiomegaly),
    "edema": (0.8, ["hilar_unspec"], draw_edema),
    "fracture": (1.2, ["rib"], draw_fracture),
    "tube": (1.0, ["trachea"] + PLEURA, draw_tube),
    "elevation": (0.9, ["left_diaphragm", "right_diaphragm"], draw_elevation),
}

# findings that would hide each other share a spot; one image has at most one finding a spot
SPOTS = {"pleural": "lower", "diaphragm": "lower", "lower_lung": "lower", "apical_lung": "upper",
         "upper_lung": "upper", "mid_lung": "mid", "hilar": "mid"}


def spots(pathology, anatomy):
    if pathology == "edema":
        return {"left mid", "right mid"}
    if pathology == "tube" and side_of(anatomy):
        return {anatomy.split("_")[0] + " drain"}
    if "_" not in anatomy or anatomy == "heart_size":
        return {anatomy}
    side, rest = anatomy.split("_", 1)
    return {f"{side} {SPOTS[rest]}"}


def choose_findings(rng, only=None):
    """0-3 (pathology, anatomy) pairs; consolidation and pneumonia often bring an effusion along."""
    names = list(only or LOOKS)
    weights = np.array([LOOKS[name][0] for name in names])
    wanted = rng.choice([0, 1, 2, 3], p=[0.24, 0.34, 0.27, 0.15])
    chosen, taken = [], set()

    def add(pathology, anatomies):
        free = [a for a in anatomies if not spots(pathology, a) & taken]
        if free and len(chosen) < 3:
            chosen.append((pathology, free[rng.integers(len(free))]))
            taken.update(spots(*chosen[-1]))

    for name in rng.choice(names, size=min(wanted, len(names)), replace=False, p=weights / weights.sum()):
        if name not in [p for p, _ in chosen]:
            add(name, LOOKS[name][1])
        pathology, anatomy = chosen[-1] if chosen else ("", "")
        if pathology in ("consolidation", "pneumonia") and "effusion" in names and rng.uniform() < 0.3:
            if "effusion" not in [p for p, _ in chosen]:
                add("effusion", [anatomy.split("_")[0] + "_pleural"])
    return chosen


def bounding_box(mask):
    """(x, y, width, height) in pixels, at least a tenth of the image each way, inside the image."""
    size = mask.shape[0]
    sides = []
    for axis in (0, 1):
        hit = np.flatnonzero(mask.any(axis))
        low, high = hit[0], hit[-1] + 1
        need = max(0, 0.094 * size - (high - low)) / 2
        low = min(max(low - need, 0), size - (high - low) - 2 * need)
        sides.append((float(low), float(high - hit[0] + 2 * need)))
    return sides[0][0], sides[1][0], sides[0][1], sides[1][1]


def draw(rng, size=64, findings=None):
    """One radiograph.

    findings: list of (pathology, anatomy) to draw; by default `choose_findings` draws 0-3.
    Returns {"image" uint8 [size, size], "findings" list of {"pathology", "anatomy",
    "box" (x, y, w, h) in pixels, "mask" bool [size, size]}, "report" str, "mentions" dict}.
    """
    wanted = choose_findings(rng) if findings is None else list(findings)
    small = min(size, DETAIL)
    c = pose_chest(rng, small, wanted)
    c.film = render_chest(c, rng)
    drawn = []
    for pathology, anatomy in wanted:
        for change, mask in LOOKS[pathology][2](c, anatomy):
            c.film = c.film + change
            if mask.sum() >= small * small / 500:
                drawn.append((pathology, anatomy, mask))
    image = develop(hang_hardware(c.film, rng), rng, size)
    found = []
    for pathology, anatomy, mask in drawn:
        if size != small:
            mask = np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))
        found.append(dict(pathology=pathology, anatomy=anatomy, box=bounding_box(mask), mask=mask))
    report, mentions = write_report(rng, list(dict.fromkeys((p, a) for p, a, _ in drawn)))
    return dict(image=image, findings=found, report=report, mentions=mentions)


def develop(film, rng, size):
    """Blur, grain, exposure and contrast: float [S, S] -> uint8 [size, size]."""
    gain, gamma, black = rng.uniform(0.85, 1.1), rng.uniform(0.8, 1.25), rng.uniform(0, 0.06)
    film = film + smooth_noise(rng, film.shape[0], 5) * 0.022
    film = film + rng.standard_normal(film.shape, dtype=np.float32) * np.float32(rng.uniform(0.008, 0.022))
    film = np.clip(film, 0, 1.1) ** np.float32(gamma) * np.float32(gain) + np.float32(black)
    image = Image.fromarray((np.clip(film, 0, 1) * 255).astype(np.uint8))
    if rng.uniform() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.6) * film.shape[0] / 64))
    if size != film.shape[0]:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


# ------------------------------------------------------------------------------------------------
# The report: what a radiologist might dictate about the drawn findings

REASONS = ["cough", "fever", "shortness of breath", "chest pain", "hypoxia", "fall", "weakness"]
AMOUNT = ["", "", "small ", "moderate ", "mild ", "large "]

# {where} is a zone phrase ("left upper lung"), {side} left or right, {amount} a word or nothing
_PATCH = ["{Amount}{name} in the {where}.", "There is {amount}{name} in the {where}.",
          "{Where} {name}.", "{Where} {name} is noted.", "{Amount}{name} is seen in the {where}."]
_BALL = ["{A} {name} in the {where}.", "There is a {name} in the {where}.", "{Where} {name}.",
         "A {name} projects over the {where}."]
STATED = {
    "effusion": ["{Amount}{side} pleural effusion.", "There is a {amount}{side} pleural effusion.",
                 "{Amount}pleural effusion on the {side}.", "{Amount}{side}-sided pleural effusion is seen.",
                 "Blunted {side} costophrenic angle from a {side} pleural effusion."],
    "pneumothorax": ["{Amount}{side} apical pneumothorax.", "There is a {amount}{side} apical pneumothorax.",
                     "{Amount}pneumothorax at the {side} apex.", "{Side} apical pneumothorax is present."],
    "consolidation": _PATCH, "opacity": _PATCH, "pneumonia": _PATCH, "nodule": _BALL, "mass": _BALL,
    "atelectasis": ["{Side} basilar atelectasis.", "{Amount}atelectasis at the {side} lung base.",
                    "Plate-like atelectasis in the {where}.", "There is {amount}atelectasis at the {side} base."],
    "cardiomegaly": ["{Amount}cardiomegaly.", "There is {amount}cardiomegaly.", "Cardiomegaly is present."],
    "edema": ["Bilateral perihilar edema.", "There is {amount}perihilar edema on both sides.",
              "{Amount}bilateral perihilar pulmonary edema."],
    "fracture": ["Displaced {side} rib fracture.", "There is a rib fracture on the {side}.",
                 "Fracture of a {side} rib is seen.", "Rib fracture."],
    "tube": ["A {side} pleural tube is in place.", "{Side} pleural tube.",
             "There is a {side} pleural tube."],
    "trachea": ["Endotracheal tube in the trachea.", "An endotracheal tube is in the trachea.",
                "There is a tube in the trachea."],
    "elevation": ["Elevation of the {side} hemidiaphragm.", "The {side} hemidiaphragm is elevated.",
                  "There is elevation of the {side} hemidiaphragm.", "Elevated {side} hemidiaphragm."],
}
DENIED = {"effusion": "pleural effusion", "pneumothorax": "pneumothorax", "opacity": "focal opacity",
          "consolidation": "focal consolidation", "pneumonia": "pneumonia", "nodule": "nodule",
          "mass": "mass", "atelectasis": "atelectasis", "cardiomegaly": "cardiomegaly",
          "edema": "pulmonary edema", "fracture": "rib fracture", "tube": "endotracheal tube",
          "elevation": "elevation of the hemidiaphragm"}
HEDGED = ["Possible {name} in the {where}.", "{Name} in the {where} cannot be excluded."]


def where_phrase(anatomy, rng):
    """An anatomy in a radiologist's words: left_upper_lung -> "left upper lung zone"."""
    side, _, rest = anatomy.partition("_")
    zone, _, lung = rest.partition("_")
    if lung == "lung" and zone in ZONES:
        return rng.choice([f"{side} {zone} lung", f"{side} {zone} lung zone", f"{zone} zone of the {side} lung",
                           f"{zone} {side} lung"])
    return {"hilar": f"{side} hilum", "pleural": f"{side} pleural space",
            "apical_lung": f"{side} lung apex", "diaphragm": f"{side} hemidiaphragm",
            "size": "heart", "unspec": "hila"}.get(rest, anatomy)


def state(templates, pathology, anatomy, rng, side):
    text = str(rng.choice(templates))
    name, where, amount = pathology, where_phrase(anatomy, rng), rng.choice(AMOUNT)
    text = text.format(name=name, Name=name.capitalize(), where=where, Where=where.capitalize(), side=side,
                       Side=side.capitalize(), amount=amount, Amount=amount, A=rng.choice(["Small", "Round", "A"]))
    return text[0].upper() + text[1:]


def describe(pathology, anatomy, rng):
    side = "left" if "left" in anatomy else "right" if "right" in anatomy else str(rng.choice(["left", "right"]))
    return state(STATED["trachea" if anatomy == "trachea" else pathology], pathology, anatomy, rng, side)


def join_names(names):
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " or " + names[-1]


def write_report(rng, cells):
    """Report text for the drawn (pathology, anatomy) cells, laid out as in MIMIC-CXR.

    About a tenth of the findings is left out or only suspected; about 30% of the absent pathologies
    are denied. Returns (text, mentions): mentions[pathology] is 1 stated, 0 denied, -1 suspected.
    """
    mentions, seen, impression = {}, [], []
    for pathology, anatomy in cells:
        luck = rng.uniform()
        if luck < 0.07:
            continue
        if luck < 0.10 and anatomy in LUNG_ZONES:
            seen.append(state(HEDGED, pathology, anatomy, rng, ""))
            mentions.setdefault(pathology, -1)
            continue
        seen.append(describe(pathology, anatomy, rng))
        impression.append(describe(pathology, anatomy, rng))
        mentions[pathology] = 1
    drawn = {pathology for pathology, _ in cells}
    absent = [p for p in LOOKS if p not in drawn and rng.uniform() < 0.3]
    mentions.update((p, 0) for p in absent)
    absent = [DENIED[p] for p in absent]
    while absent:
        several = rng.integers(1, 4)
        names, absent = absent[:several], absent[several:]
        opening = rng.choice(["No {}.", "There is no {}.", "No evidence of {}.", "There is no evidence of {}."])
        seen.append(str(opening).format(join_names(names)))
    if "cardiomegaly" not in drawn and rng.uniform() < 0.4:
        seen.append(str(rng.choice(["Heart size is normal.", "The heart is normal in size."])))
    if rng.uniform() < 0.3:
        seen.append(str(rng.choice(["The mediastinal contours are unremarkable.",
                                    "Mediastinal contours are normal.", "Osseous structures are intact."])))
    if not drawn:
        if rng.uniform() < 0.5:
            seen.insert(0, str(rng.choice(["The lungs are clear.", "Lungs are clear."])))
        impression.append(str(rng.choice(["No acute cardiopulmonary process.", "Normal chest radiograph."])))
    seen = [seen[i] for i in rng.permutation(len(seen))]
    sex = rng.choice(["F", "M"])
    sections = [("EXAMINATION", str(rng.choice(["CHEST (PORTABLE AP)", "CHEST RADIOGRAPH", "Chest PA"]))),
                ("INDICATION", f"___{sex} with {rng.choice(REASONS)}.  Evaluate for "
                               f"{rng.choice(['pneumonia', 'effusion', 'pneumothorax', 'acute process'])}.")]
    if rng.uniform() < 0.5:
        sections.append(("COMPARISON", str(rng.choice(["None.", "Chest radiograph from ___."]))))
    seen, impression = " ".join(seen), " ".join(impression)
    style = rng.uniform()                             # the findings section alone, the other, both
    if style < 0.15 and seen:
        sections.append(("FINDINGS", seen))
    elif style < 0.35:
        sections.append(("IMPRESSION", seen or impression or "Comparison with prior films."))
    else:
        sections += [("FINDINGS", seen or "Single frontal view."), ("IMPRESSION", impression or "As above.")]
    return lay_out(sections), mentions


def lay_out(sections):
    """MIMIC's page: FINAL REPORT, one leading space a line, 79 columns, " " for a blank line."""
    lines = [" " * 33 + "FINAL REPORT"]
    for header, text in sections:
        lines += [f" {header}:  "] if header in ("FINDINGS", "IMPRESSION") else []
        if header in ("FINDINGS", "IMPRESSION"):
            lines.append(" ")
        else:
            text = f"{header}:  {text}"
        lines += [" " + line for line in textwrap.wrap(text, 78)] + [" "]
    return "\n".join(lines[:-1]) + "\n"


# ------------------------------------------------------------------------------------------------
# Folders in the publishers' formats


def plan(count, seed):
    """Who the images belong to: one (index, patient, study of the patient, split) per image.

    Patients have 1-3 studies of one image; splits are by patient, 8:1:1.
    """
    rng, rows, patient = np.random.default_rng([seed, 0]), [], 0
    while len(rows) < count:
        split = str(rng.choice(["train", "validate", "test"], p=[0.8, 0.1, 0.1]))
        for study in range(min(rng.integers(1, 4), count - len(rows))):
            rows.append((len(rows), patient, study, split))
        patient += 1
    return rows


def image_rng(seed, index):
    return np.random.default_rng([seed, 1, index])


CHEXPERT_LABELS = {  # in MIMIC-CXR-JPG's order; names of LOOKS that count for the label
    "Atelectasis": ["atelectasis"], "Cardiomegaly": ["cardiomegaly"],
    "Consolidation": ["consolidation"], "Edema": ["edema"], "Enlarged Cardiomediastinum": [],
    "Fracture": ["fracture"], "Lung Lesion": ["nodule", "mass"],
    "Lung Opacity": ["opacity", "consolidation", "pneumonia", "edema", "atelectasis"],
    "No Finding": [], "Pleural Effusion": ["effusion"], "Pleural Other": [],
    "Pneumonia": ["pneumonia"], "Pneumothorax": ["pneumothorax"], "Support Devices": ["tube"]}


def chexpert_values(mentions):
    """What a labeller would read: "1.0", "0.0", "-1.0" or "" for each of the 14 labels."""
    values = {}
    for label, names in CHEXPERT_LABELS.items():
        said = [mentions[name] for name in names if name in mentions]
        if label == "Lung Opacity":          # other findings imply it, but denying them does not deny it
            said = [v for name, v in mentions.items() if name in names and (v == 1 or name == "opacity")]
        best = 1 if 1 in said else -1 if -1 in said else 0 if said else None
        values[label] = "" if best is None else f"{best}.0"
    if not any(v in ("1.0", "-1.0") for k, v in values.items() if k != "Support Devices"):
        values["No Finding"] = "1.0"
    return values


def unique_number(first, index, seed):
    """A number in [first, first + 9999990], different for every index, in no visible order."""
    return first + (index * 7_654_321 + seed * 1_299_709 + 32) % 9_999_991


def save_mimic(task):
    """Draw and write one image, its mask and its report; returns the rows of the csv files."""
    root, size, seed, (index, patient, study, split) = task
    rng = image_rng(seed, index)
    subject, study_id = unique_number(10_000_000, patient, seed), unique_number(50_000_000, index, seed)
    dicom_id = "-".join(rng.bytes(4).hex() for _ in range(5))
    drawn = draw(rng, size)
    folder = os.path.join(root, "files", f"p{subject // 1_000_000}", f"p{subject}")
    os.makedirs(os.path.join(folder, f"s{study_id}"), exist_ok=True)
    Image.fromarray(drawn["image"]).save(os.path.join(folder, f"s{study_id}", dicom_id + ".jpg"), quality=95)
    with open(os.path.join(folder, f"s{study_id}.txt"), "w", newline="") as file:
        file.write(drawn["report"])
    if drawn["findings"]:
        bits = sum(f["mask"].astype(np.uint8) << k for k, f in enumerate(drawn["findings"]))
        Image.fromarray(bits).save(os.path.join(root, "masks", dicom_id + ".png"))
    boxes = [[dicom_id, k, f["pathology"], f["anatomy"], *(round(v, 2) for v in f["box"])]
             for k, f in enumerate(drawn["findings"])]
    view = str(rng.choice(["PA", "AP"]))
    pose = "postero-anterior" if view == "PA" else "antero-posterior"
    date = 21500101 + int(rng.integers(0, 40)) * 10000 + int(rng.integers(0, 12)) * 100 + int(rng.integers(0, 28))
    time = f"{rng.integers(0, 24) * 10000 + rng.integers(0, 60) * 100 + rng.integers(0, 60)}.{rng.integers(1, 1000):03d}"
    exam = "CHEST (PORTABLE AP)" if view == "AP" else "CHEST (PA AND LAT)"
    return dict(split=[dicom_id, study_id, subject, split], boxes=boxes,
                metadata=[dicom_id, subject, study_id, exam, view, size, size, date, time, exam, pose, "Erect"],
                chexpert=[subject, study_id, *chexpert_values(drawn["mentions"]).values()])


def write_mimic(root, count, seed, size, workers, variant):
    os.makedirs(os.path.join(root, "masks"), exist_ok=True)
    rows = draw_all(save_mimic, [(root, size, seed, row) for row in plan(count, seed)], workers)
    write_csv(root, "boxes.csv", "dicom_id,finding,pathology,anatomy,x,y,width,height".split(","),
              [box for row in rows for box in row["boxes"]])
    write_csv(root, "mimic-cxr-2.0.0-chexpert.csv.gz", ["subject_id", "study_id", *CHEXPERT_LABELS],
              [row["chexpert"] for row in rows])
    write_csv(root, "mimic-cxr-2.0.0-metadata.csv.gz",
              "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,"
              "StudyTime,ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,"
              "PatientOrientationCodeSequence_CodeMeaning".split(","), [row["metadata"] for row in rows])
    # the split file comes last: a folder without it was not finished
    write_csv(root, "mimic-cxr-2.0.0-split.csv.gz", "dicom_id,study_id,subject_id,split".split(","),
              [row["split"] for row in rows])


def write_csv(root, name, header, rows):
    """A csv file, gzipped if the name ends so (without a time stamp: same rows, same bytes)."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    data = text.getvalue().encode()
    with open(os.path.join(root, name), "wb") as file:
        file.write(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)


def draw_all(save, tasks, workers):
    """save(task) for every task, in order. Each image has its own seed, so workers change nothing."""
    bar = functools.partial(tqdm, total=len(tasks), desc="drawing", unit="image", disable=len(tasks) < 1000)
    if workers <= 1 or len(tasks) < 64:
        return list(bar(map(save, tasks)))
    with multiprocessing.Pool(workers) as pool:
        return list(bar(pool.imap(save, tasks, chunksize=32)))


LAYOUTS = {"mimic": (write_mimic, 64)}   # writer, size of the images unless --size says otherwise


def write(layout, root, count, seed=0, size=None, workers=None, variant=None):
    """Draw `count` radiographs into the publisher's folder layout at `root`.

    Raises InputError for an unknown layout or variant, or a root that already holds files.
    """
    if layout not in LAYOUTS:
        raise InputError(f"no layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    if os.path.isdir(root) and os.listdir(root):
        raise InputError(f"{root} is not empty; give another --root or delete it first")
    writer, default_size = LAYOUTS[layout]
    os.makedirs(root, exist_ok=True)
    writer(root, count, seed, size or default_size, workers or os.cpu_count() or 1, variant)


def parse_args(argv=None):
    parser = Parser(prog="phantom.py", description="Draw synthetic chest radiographs in a published layout.")
    parser.add_argument("--layout", default="mimic", help="which data set's folder format: " + " ".join(LAYOUTS))
    parser.add_argument("--root", help="folder to fill, default data/<layout>-phantom")
    parser.add_argument("--count", type=int, default=200, help="number of images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, help="pixels a side; default depends on the layout")
    parser.add_argument("--variant", help="another tree of the same data set")
    parser.add_argument("--workers", type=int, help="processes, default one a core; the files are the same")
    return parser.parse_args(argv)


def main(args):
    root = args.root or f"data/{args.layout}-phantom"
    write(args.layout, root, args.count, args.seed, args.size, args.workers, args.variant)
    print(f"{args.count} images in {root}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except InputError as error:
        print(f"phantom.py: {error}", file=sys.stderr)
        sys.exit(2)
