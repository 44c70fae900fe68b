"""Synthetic chest radiographs with findings, masks, boxes and reports, in MIMIC-CXR-JPG's layout.

    python phantom.py --layout mimic --root data/synthetic --count 12000   # train.py does this itself
    python phantom.py --layout mimic --root /tmp/phantom --count 200 --size 256

Images are drawn in a chest frame: x runs over [-1, 1] from left to right of the image, y downwards,
the spine at x = 0. The patient's left is on the image's RIGHT, as on every radiograph. One finding
is (pathology, anatomy, mask); its cell of the existence matrix is (anatomy, pathology).
"""
import collections
import csv
import functools
import gzip
import io
import json
import multiprocessing
import os
import sys
import textwrap
import types
import uuid
from xml.sax.saxutils import escape

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
    c.markings = 0.035 * smooth_noise(rng, c.size, 22) * lungs
    c.markings *= np.exp(-3.0 * (c.x_abs - 0.14) ** 2 - 2.0 * (c.y - 0.02) ** 2)
    film += c.markings + 0.09 * np.exp(-40 * (c.x_abs - 0.19) ** 2 - 18 * (c.y - 0.02) ** 2)    # hila
    film += c.cage * rib_band(c.rib_phase) * np.float32(rng.uniform(0.035, 0.055))
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
    """Density adds up in air; before the heart or ribs a lesion shows less."""
    change = change * c.space[side] * np.clip((0.75 - c.film) * 2.5, 0.2, 1)
    return [(change, (shape > 0.35) & (c.space[side] > 0.5))]


def draw_patch(strength, radii, fall, texture=0.0, fissure=False):
    """A patch with ragged edges: opacity is faint and soft, pneumonia mottled by `texture`,
    consolidation dense with one straight edge, where a fissure holds it back."""
    def patch(c, anatomy):
        rng, r = c.rng, c.rng.uniform(*radii)
        x, y, side = place_in_lung(c, anatomy, r)
        ragged = 1 + 0.2 * smooth_noise(rng, c.size, 9)
        wide, high = (1.25, 1.1) if fissure else (1.0, rng.uniform(0.75, 1.15))
        shape = ramp(ragged - disc(c, x, y, wide * r, high * r, 0 if fissure else rng.uniform(0, 3)), fall)
        if fissure:
            shape = shape * ramp(y + 0.05 - c.y + rng.normal(0, 0.15) * (c.x - x), c.soft)
        if texture:
            shape = shape * np.clip(0.8 + texture * smooth_noise(rng, c.size, 24), 0, 2.5)
        return in_lung(c, side, shape * np.float32(rng.uniform(*strength)), shape)
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
    change = -air * (0.15 + c.markings) + line * 0.22
    return [(change, air > 0.5)]


def draw_atelectasis(c, anatomy):
    side, rng = side_of(anatomy), c.rng
    x, y = side * rng.uniform(0.36, 0.56), c.base[side] - rng.uniform(0.10, 0.34)
    half, tilt = rng.uniform(0.16, 0.24), side * rng.normal(0.1, 0.22)
    plate = ramp(0.05 - segment(c, x - half, y - half * tilt, x + half, y + half * tilt), c.soft)
    return in_lung(c, side, plate * np.float32(rng.uniform(0.34, 0.42)), plate)


def draw_cardiomegaly(c, anatomy):
    return [(np.float32(0), c.heart < 1)]             # pose_chest has already enlarged the heart


def draw_elevation(c, anatomy):
    side = side_of(anatomy)
    risen = (c.dome[side] < 0.04) & (c.dome[side] > c.base[side] - c.raised[side] + 0.02)
    return [(np.float32(0), risen & (c.chest < 1) & (c.x * side > 0.12))]


def draw_edema(c, anatomy):
    strength, reach = c.rng.uniform(0.17, 0.23), c.rng.uniform(0.20, 0.27)
    streaks = 1 + 0.25 * smooth_noise(c.rng, c.size, 18)
    wings = []
    for side in (LEFT, RIGHT):
        shape = ramp(1 - disc(c, side * 0.34, 0.02, reach, 1.35 * reach), 1.2)
        wings += in_lung(c, side, shape * streaks * np.float32(strength), shape)
    return wings


def draw_covid(c, anatomy):
    """Patches at the outer edge of both lungs, lower down, with a coarse grain."""
    rng, patches = c.rng, []
    grain = np.clip(1 + 0.6 * smooth_noise(rng, c.size, 20), 0, 2)
    for side in (LEFT, RIGHT):
        shape = ramp(1 - disc(c, side * 0.68, rng.uniform(0.08, 0.22), rng.uniform(0.22, 0.28), 0.34), 0.8)
        patches += in_lung(c, side, shape * grain * np.float32(rng.uniform(0.16, 0.22)), shape)
    return patches


def draw_fracture(c, anatomy):
    rng = c.rng
    side, x, k = (LEFT, RIGHT)[rng.integers(2)], rng.uniform(0.38, 0.60), rng.integers(-2, 2)
    y = (float(k) - c.rib_start) * 0.2 + 0.33 * x * x             # on the k-th rib
    along, rib = c.x * side - x, c.rib_phase - k                  # outwards; 0 on the rib, 1 = next
    near = ramp(1 - disc(c, side * x, y, 0.22, 0.17), 0.3)
    # the outer fragment is stepped by 0.4 of the gap between ribs; both are bright, the gap is dark
    broken = np.where(along > 0, rib - 0.4, rib)
    bone = ramp(0.24 - np.abs(broken), 0.2)
    gap = ramp(0.03 - np.abs(along), c.soft) * (np.abs(rib - 0.2) < 0.5)
    change = near * (0.38 * bone - 0.04 * rib_band(c.rib_phase) - 0.25 * gap)
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
    return [(wall * np.float32(rng.uniform(0.32, 0.42)), seen)]


LUNG_ZONES = [f"{side}_{zone}_lung" for side in ("left", "right") for zone in ZONES]
PLEURA = ["left_pleural", "right_pleural"]

# pathology: (how often, anatomies it is drawn at, how it is drawn)
LOOKS = {
    "effusion": (1.2, PLEURA, draw_effusion),
    "pneumothorax": (1.0, ["left_apical_lung", "right_apical_lung"], draw_pneumothorax),
    "consolidation": (1.2, LUNG_ZONES, draw_patch((0.38, 0.46), (0.22, 0.28), 0.5, fissure=True)),
    "opacity": (1.2, LUNG_ZONES, draw_patch((0.20, 0.25), (0.24, 0.31), 1.2)),
    "pneumonia": (1.1, LUNG_ZONES, draw_patch((0.22, 0.27), (0.22, 0.29), 0.6, texture=1.5)),
    "nodule": (1.1, LUNG_ZONES, draw_round((0.40, 0.48), (0.11, 0.14), 0.0)),
    "mass": (1.0, LUNG_ZONES[0:2] + LUNG_ZONES[3:5] + ["left_hilar", "right_hilar"],
             draw_round((0.38, 0.46), (0.19, 0.25), 0.2)),
    "atelectasis": (1.0, ["left_lower_lung", "right_lower_lung"], draw_atelectasis),
    "cardiomegaly": (0.8, ["heart_size"], draw_cardiomegaly),
    "edema": (0.8, ["hilar_unspec"], draw_edema),
    "fracture": (1.2, ["rib"], draw_fracture),
    "tube": (1.0, ["trachea"] + PLEURA, draw_tube),
    "elevation": (0.9, ["left_diaphragm", "right_diaphragm"], draw_elevation),
}

UNSEEN = {"covid-19": (0, ["lung_bases"], draw_covid)}   # drawn by two layouts only, never trained on

# findings that would hide each other share a spot; one image has at most one finding a spot
SPOTS = {"pleural": "lower", "diaphragm": "lower", "lower_lung": "lower", "apical_lung": "upper",
         "upper_lung": "upper", "mid_lung": "mid", "hilar": "mid"}


def spots(pathology, anatomy):
    if pathology == "edema":
        return {"left mid", "right mid"}
    if pathology == "covid-19":
        return {"left lower", "right lower"}
    if pathology == "tube" and side_of(anatomy):
        return {anatomy.split("_")[0] + " drain"}
    if "_" not in anatomy or anatomy == "heart_size":
        return {anatomy}
    side, rest = anatomy.split("_", 1)
    return {f"{side} {SPOTS[rest]}"}


def choose_findings(rng, among=None, sure=None):
    """0-3 (pathology, anatomy) pairs; consolidation and pneumonia often bring an effusion along.

    among: the pathologies to choose from, all of LOOKS by default; sure: one that comes first.
    """
    names = list(among or LOOKS)
    weights = np.array([LOOKS[name][0] for name in names])
    wanted = rng.choice([0, 1, 2, 3], p=[0.24, 0.34, 0.27, 0.15])
    chosen, taken = [], set()

    def add(pathology, anatomies):
        free = [a for a in anatomies if not spots(pathology, a) & taken]
        if free and len(chosen) < 3:
            chosen.append((pathology, free[rng.integers(len(free))]))
            taken.update(spots(*chosen[-1]))

    if sure:
        add(sure, (LOOKS | UNSEEN)[sure][1])
    for name in rng.choice(names, size=min(wanted, len(names)), replace=False, p=weights / weights.sum()):
        if name not in [p for p, _ in chosen]:
            add(str(name), LOOKS[name][1])
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
    "box" (x, y, w, h) in pixels, "mask" bool [size, size]}, "lungs" bool [size, size], "report" str,
    and the report's parts "sections", "mentions" as in `dictate`}.
    """
    wanted = choose_findings(rng) if findings is None else list(findings)
    small = min(size, DETAIL)
    c = pose_chest(rng, small, wanted)
    c.film = render_chest(c, rng)
    drawn = []
    for pathology, anatomy in wanted:
        for change, mask in (LOOKS | UNSEEN)[pathology][2](c, anatomy):
            c.film = c.film + change
            if mask.sum() >= small * small / 500:
                drawn.append((pathology, anatomy, mask))
    image = develop(hang_hardware(c.film, rng), rng, size)
    found = []
    lungs = c.lung[LEFT] + c.lung[RIGHT] > 0.5
    if size != small:
        def enlarge(mask):
            return np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))
        drawn, lungs = [(p, a, enlarge(mask)) for p, a, mask in drawn], enlarge(lungs)
    for pathology, anatomy, mask in drawn:
        found.append(dict(pathology=pathology, anatomy=anatomy, box=bounding_box(mask), mask=mask))
    sections, mentions = dictate(rng, list(dict.fromkeys((p, a) for p, a, _ in drawn)))
    return dict(image=image, findings=found, lungs=lungs, report=lay_out(sections), sections=sections,
                mentions=mentions)


def develop(film, rng, size):
    """Blur, grain, exposure and contrast: float [S, S] -> uint8 [size, size]."""
    gain, gamma, black = rng.uniform(0.85, 1.1), rng.uniform(0.8, 1.25), rng.uniform(0, 0.06)
    film = film + smooth_noise(rng, film.shape[0], 5) * 0.022
    film = film + rng.standard_normal(film.shape, dtype=np.float32) * np.float32(rng.uniform(0.006, 0.016))
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
    "covid-19": ["Peripheral opacities at both lung bases.", "There are bilateral basilar opacities."],
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


def dictate(rng, cells):
    """What a radiologist says about the drawn (pathology, anatomy) cells.

    About a tenth of the findings is left out or only suspected; about 30% of the absent pathologies
    are denied. Returns ([(section, text)], {pathology: 1 stated, 0 denied, -1 suspected}).
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
    return sections, mentions


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
# From drawings to files. A job is a dict that says what to draw and which files to write; workers
# run jobs and hand back what the label files need.

Row = collections.namedtuple("Row", "index patient visit split age sex view")


def plan(count, seed):
    """Who the images belong to: a Row an image. Patients come 1-3 times; splits by patient, 8:1:1."""
    rng, rows, patient = np.random.default_rng([seed, 0]), [], 0
    while len(rows) < count:
        if patient % 10 == 0:
            splits = rng.permutation(["train"] * 8 + ["validate", "test"])
        split = str(splits[patient % 10])
        age, sex = int(rng.integers(18, 90)), "MF"[rng.integers(2)]
        for visit in range(min(rng.integers(1, 4), count - len(rows))):
            rows.append(Row(len(rows), patient, visit, split, age, sex, ("PA", "AP")[rng.integers(2)]))
        patient += 1
    return rows


def names(seed, row):
    """The random generator of an image's file names, apart from the one that draws it."""
    return np.random.default_rng([seed, 2, row.index])


def uuid4(rng):
    return str(uuid.UUID(bytes=rng.bytes(16), version=4))


def run_job(job):
    """Draw one image and write its files; returns {"cells", "boxes", "mentions", "sections", "rle"}."""
    rng, size = np.random.default_rng(job["seed"]), job["size"]
    sure, rate = job.get("sure", ("", 0))
    found = choose_findings(rng, job.get("among"), sure if rng.uniform() < rate else None)
    drawn = draw(rng, size, found)
    for path in (job[kind] for kind in ("image", "report", "bits", "mask", "lungs") if job.get(kind)):
        os.makedirs(os.path.dirname(path), exist_ok=True)
    save_image(job, drawn["image"])
    masks = [f["mask"] for f in drawn["findings"] if f["pathology"] == job.get("of", f["pathology"])]
    if "report" in job:
        with open(job["report"], "w", newline="") as file:
            file.write(drawn["report"])
    if "bits" in job and masks:                       # bit k: the image's k-th row in boxes.csv
        bits = sum(mask.astype(np.uint8) << k for k, mask in enumerate(masks))
        Image.fromarray(bits).save(job["bits"])
    if "mask" in job:
        Image.fromarray(np.any(masks, 0) if masks else np.zeros((size, size), bool)).convert("L").save(job["mask"])
    if "lungs" in job:
        Image.fromarray(drawn["lungs"]).convert("L").save(job["lungs"])
    return dict(cells=[(f["pathology"], f["anatomy"]) for f in drawn["findings"]],
                boxes=[f["box"] for f in drawn["findings"]], mentions=drawn["mentions"],
                sections=drawn["sections"], rle=[rle for m in masks for rle in encode_rle(m)] if "of" in job else [])


def encode_rle(mask, frame=1024):
    """SIIM's runs of a mask in its 1024-pixel frame: gap since the last run and length, column by column.

    Tall masks come as two overlapping pieces, as if drawn by two readers.
    """
    mask = np.asarray(Image.fromarray(mask).resize((frame, frame), Image.Resampling.NEAREST))
    rows, runs = np.flatnonzero(mask.any(1)), []
    cut = (rows[0] + rows[-1]) // 2
    pieces = [(0, cut + 9), (cut - 9, frame)] if rows[-1] - rows[0] > 0.25 * frame else [(0, frame)]
    for top, end in pieces:
        flat = np.zeros(frame * frame + 2, np.int8)   # a zero before and after
        flat[1:-1].reshape(frame, frame).T[top:end] = mask[top:end]
        edges = np.flatnonzero(np.diff(flat))
        runs.append(" ".join(map(str, np.diff(edges, prepend=0))))
    return runs


def save_image(job, image):
    """PNG, JPEG or DICOM by the ending of the path; job["shape"] (height, width) stretches it."""
    image = Image.fromarray(image).convert(job.get("mode", "L"))
    if "shape" in job:
        image = image.resize(job["shape"][::-1], Image.Resampling.BICUBIC)
    if job["image"].endswith(".dcm"):
        save_dicom(job, image)
    elif job["image"].endswith(".png"):
        image.save(job["image"], compress_level=1)
    else:
        image.save(job["image"], quality=95)


def save_dicom(job, image):
    """A file like RSNA's and SIIM's: 8-bit MONOCHROME2 in baseline JPEG, bare age, lossy flag.

    job["raw"]: 12 bits in 16, MONOCHROME1, uncompressed, with rescale and window, as hospitals send.
    """
    import pydicom
    from pydicom.encaps import encapsulate
    d, row, (study, series, sop) = pydicom.Dataset(), job["row"], job["uids"]
    d.file_meta = pydicom.dataset.FileMetaDataset()
    d.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian if job["raw"] else pydicom.uid.JPEGBaseline8Bit
    with pydicom.config.disable_value_validation():   # PatientAge "58" has no unit
        d.SOPClassUID = d.file_meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
        d.SOPInstanceUID = d.file_meta.MediaStorageSOPInstanceUID = sop
        d.StudyInstanceUID, d.SeriesInstanceUID = study, series
        d.SpecificCharacterSet, d.StudyDate, d.StudyTime = "ISO_IR 100", "19010101", "000000.00"
        d.AccessionNumber = d.ReferringPhysicianName = d.PatientBirthDate = d.StudyID = d.PatientOrientation = ""
        d.Modality, d.ConversionType, d.BodyPartExamined = "CR", "WSD", "CHEST"
        d.SeriesDescription, d.ViewPosition = f"view: {row.view}", row.view
        d.PatientName = d.PatientID = job["person"]
        d.PatientSex, d.PatientAge, d.SeriesNumber, d.InstanceNumber = row.sex, str(row.age), "1", "1"
        d.SamplesPerPixel, d.PixelRepresentation, d.PixelSpacing = 1, 0, ["0.168", "0.168"]
        d.Rows, d.Columns = image.height, image.width
        if job["raw"]:
            d.PhotometricInterpretation, d.BitsAllocated, d.BitsStored, d.HighBit = "MONOCHROME1", 16, 12, 11
            d.RescaleSlope, d.RescaleIntercept, d.WindowCenter, d.WindowWidth = "2", "-100", "1979", "4080"
            d.PixelData = ((255 - np.asarray(image, np.uint16)) * 8 + 19).astype("<u2").tobytes()
        else:
            d.PhotometricInterpretation, d.BitsAllocated, d.BitsStored, d.HighBit = "MONOCHROME2", 8, 8, 7
            d.LossyImageCompression, d.LossyImageCompressionMethod = "01", "ISO_10918_1"
            jpeg = io.BytesIO()
            image.save(jpeg, "JPEG", quality=90)
            d.PixelData = encapsulate([jpeg.getvalue()])
            d["PixelData"].VR = "OB"
        d.save_as(job["image"], enforce_file_format=True)


def run_jobs(jobs, workers):
    """run_job of every job, in order. Each image has its own seed, so workers change nothing."""
    bar = functools.partial(tqdm, total=len(jobs), desc="drawing", unit="image", disable=len(jobs) < 1000)
    if workers <= 1 or len(jobs) < 32:
        return list(bar(map(run_job, jobs)))
    with multiprocessing.Pool(workers) as pool:
        return list(bar(pool.imap(run_job, jobs, chunksize=min(32, len(jobs) // workers))))


def write_text(path, text):
    """gzipped without a time stamp if the name ends so: same rows, same bytes."""
    with open(path, "wb") as file:
        file.write(gzip.compress(text.encode(), mtime=0) if path.endswith(".gz") else text.encode())


def write_csv(path, header, rows):
    """header: the first line, verbatim."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, header + "\n" + text.getvalue())


# ------------------------------------------------------------------------------------------------
# The publishers' folders. Every writer takes (root, rows, job, run, variant): job(row, image=...,
# ...) makes a job, run(jobs) draws them. Formats and their traps: each data set's own pages.

CHEXPERT = {  # label: names of LOOKS that count for it, in MIMIC-CXR-JPG's order
    "Atelectasis": ["atelectasis"], "Cardiomegaly": ["cardiomegaly"],
    "Consolidation": ["consolidation"], "Edema": ["edema"], "Enlarged Cardiomediastinum": [],
    "Fracture": ["fracture"], "Lung Lesion": ["nodule", "mass"],
    "Lung Opacity": ["opacity", "consolidation", "pneumonia", "edema", "atelectasis"],
    "No Finding": [], "Pleural Effusion": ["effusion"], "Pleural Other": [],
    "Pneumonia": ["pneumonia"], "Pneumothorax": ["pneumothorax"], "Support Devices": ["tube"]}


def chexpert_values(mentions):
    """What a labeller reads in a report: {label: "1.0", "0.0", "-1.0" or ""}."""
    values = {}
    for label, looks in CHEXPERT.items():
        said = [mentions[name] for name in looks if name in mentions]
        if label == "Lung Opacity":                   # denying pneumonia does not deny every opacity
            said = [v for name, v in mentions.items() if name in looks and (v == 1 or name == "opacity")]
        best = 1 if 1 in said else -1 if -1 in said else 0 if said else None
        values[label] = "" if best is None else f"{best}.0"
    if not any(v in ("1.0", "-1.0") for k, v in values.items() if k != "Support Devices"):
        values["No Finding"] = "1.0"
    return values


def write_mimic(root, rows, job, run, variant):
    """MIMIC-CXR-JPG with the reports beside the study folders, plus boxes.csv and masks/."""
    def number(first, index):                         # no visible order, and no two alike
        return first + (index * 7_654_321 + 32) % 9_999_991
    jobs, ids = [], []
    for row in rows:
        rng = names(job.seed, row)
        dicom = "-".join(rng.bytes(4).hex() for _ in range(5))
        subject, study = number(10_000_000, row.patient), number(50_000_000, row.index)
        folder = f"{root}/files/p{subject // 1_000_000}/p{subject}/s{study}"
        date = f"21{rng.integers(10, 60)}{rng.integers(1, 13):02d}{rng.integers(1, 29):02d}"
        time = f"{int(f'{rng.integers(24)}{rng.integers(60):02d}{rng.integers(60):02d}')}.{rng.integers(1000):03d}"
        ids.append((dicom, subject, study, date, time))
        jobs.append(job(row, image=f"{folder}/{dicom}.jpg", report=f"{folder}.txt", bits=f"{root}/masks/{dicom}.png"))
    os.makedirs(f"{root}/masks", exist_ok=True)
    results = run(jobs)
    write_csv(f"{root}/boxes.csv", "dicom_id,finding,pathology,anatomy,x,y,width,height",
              [(i[0], k, *cell, *(round(v, 2) for v in box)) for i, r in zip(ids, results)
               for k, (cell, box) in enumerate(zip(r["cells"], r["boxes"]))])
    write_csv(f"{root}/mimic-cxr-2.0.0-chexpert.csv.gz", "subject_id,study_id," + ",".join(CHEXPERT),
              [(i[1], i[2], *chexpert_values(r["mentions"]).values()) for i, r in zip(ids, results)])
    looks = {"PA": ("CHEST (PA AND LAT)", "postero-anterior"), "AP": ("CHEST (PORTABLE AP)", "antero-posterior")}
    write_csv(f"{root}/mimic-cxr-2.0.0-metadata.csv.gz",
              "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,Columns,StudyDate,"
              "StudyTime,ProcedureCodeSequence_CodeMeaning,ViewCodeSequence_CodeMeaning,"
              "PatientOrientationCodeSequence_CodeMeaning",
              [(*i[:3], looks[row.view][0], row.view, job.size, job.size, *i[3:], looks[row.view][0],
                looks[row.view][1], "Erect") for i, row in zip(ids, rows)])
    # the split file comes last: a folder without it was not finished
    write_csv(f"{root}/mimic-cxr-2.0.0-split.csv.gz", "dicom_id,study_id,subject_id,split",
              [(i[0], i[2], i[1], row.split) for i, row in zip(ids, rows)])


NIH = {"atelectasis": "Atelectasis", "cardiomegaly": "Cardiomegaly", "effusion": "Effusion",
       "opacity": "Infiltration", "mass": "Mass", "nodule": "Nodule", "pneumonia": "Pneumonia",
       "pneumothorax": "Pneumothorax", "consolidation": "Consolidation", "edema": "Edema"}


def write_nih(root, rows, job, run, variant):
    """flat: NIH's tarballs in one place, 2020 entry file. folders: Kaggle's twelve, 2017 entry file."""
    files = [f"{row.patient + 1:08d}_{row.visit:03d}.png" for row in rows]
    results = run([job(row, mode="RGBA" if row.index % 40 == 7 else "L", image=f"{root}/" + (
        f"images_{1 + 12 * row.index // len(rows):03d}/images/{name}" if variant == "folders" else f"images/{name}"))
        for row, name in zip(rows, files)])
    labels = [list(dict.fromkeys(NIH[p] for p, _ in r["cells"] if p in NIH)) for r in results]
    kaggle = variant == "folders"
    write_csv(f"{root}/Data_Entry_2017.csv" if kaggle else f"{root}/Data_Entry_2017_v2020.csv",
              f"Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient {'Gender' if kaggle else 'Sex'},"
              "View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],",  # a field too many
              [(name, "|".join(said) or "No Finding", row.visit, row.patient + 1, row.age, row.sex, row.view,
                2500, 2048, 0.168, 0.168) for name, said, row in zip(files, labels, rows)])
    boxed = {"Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax"}
    write_csv(f"{root}/BBox_List_2017.csv", "Image Index,Finding Label,Bbox [x,y,w,h],,,",
              [(name, NIH[p].replace("Infiltration", "Infiltrate"), *(v * 1024 / job.size for v in box))
               for name, r, row in zip(files, results, rows) if row.split == "test"
               for (p, _), box in zip(r["cells"], r["boxes"]) if NIH.get(p) in boxed])
    for which, splits in (("train_val_list.txt", ("train", "validate")), ("test_list.txt", ("test",))):
        write_text(f"{root}/{which}", "".join(f"{n}\n" for n, row in zip(files, rows) if row.split in splits))


def dicom_uids(row):
    """Study, series and image UID in the manner of RSNA and SIIM."""
    return [f"1.2.276.0.7230010.3.1.{k}.8323329.{row.index + 301}.15178752{row.index % 90 + 10}.{850_000 + row.index}"
            for k in (2, 3, 4)]


def write_rsna(root, rows, job, run, variant):
    """kaggle: stage 2 folders. site: the RSNA site's tree, with the mapping to NIH patients and
    MedKLIP's test csv. monochrome1: kaggle's tree, uncompressed 12-bit inverted films."""
    ids = [uuid4(names(job.seed, row)) for row in rows]
    uids = [dicom_uids(row) for row in rows]
    top = "mdai_rsna_project_x9N20BZa_images_2018-07-20-153330"
    paths = ["/".join([top, *u]) + ".dcm" if variant == "site" else f"stage_2_train_images/{i}.dcm"
             for i, u in zip(ids, uids)]
    results = run([job(row, image=f"{root}/{path}", uids=u, person=i, raw=variant == "monochrome1",
                       sure=("pneumonia", 0.15)) for row, path, i, u in zip(rows, paths, ids, uids)])
    boxes = [[[float(round(v * 1024 / job.size)) for v in box] for (p, _), box in zip(r["cells"], r["boxes"])
              if p in ("pneumonia", "opacity", "consolidation")] for r in results]
    kinds = ["Lung Opacity" if found else "No Lung Opacity / Not Normal" if r["cells"] else "Normal"
             for found, r in zip(boxes, results)]
    write_csv(f"{root}/stage_2_train_labels.csv", "patientId,x,y,width,height,Target",
              [(i, *box, int(bool(found))) for i, found in zip(ids, boxes) for box in found or [[""] * 4]])
    write_csv(f"{root}/stage_2_detailed_class_info.csv", "patientId,class",  # a row a box here, too
              [(i, kind) for i, kind, found in zip(ids, kinds, boxes) for _ in found or [0]])
    if variant == "site":
        write_csv(f"{root}/rsna_test.csv", "ID,img_path,boxes,classes",
                  [(i, path, "|".join(";".join(map(str, box)) for box in found) or "nan", int(bool(found)))
                   for i, path, found, row in zip(ids, paths, boxes, rows) if row.split == "test"])
        write_text(f"{root}/pneumonia-challenge-dataset-mappings_2018.json", json.dumps(
            [dict(img_id=f"{row.patient + 1:08d}_{row.visit:03d}.png", subset_img_id=i, StudyInstanceUID=u[0],
                  SeriesInstanceUID=u[1], SOPInstanceUID=u[2]) for row, i, u in zip(rows, ids, uids)]))


def write_siim(root, rows, job, run, variant):
    """stage1: train-rle.csv with its spaces. stage2: stage_2_train.csv without. png: the re-pack."""
    uids, jobs, files = [dicom_uids(row) for row in rows], [], []
    for row, u in zip(rows, uids):
        more = dict(of="pneumothorax", sure=("pneumothorax", 0.2), uids=u, raw=False,
                    person=uuid4(names(job.seed, row)))
        where = "/".join(u) if variant == "stage1" else u[2]
        path = {"png": f"{row.index}.png", "stage2": f"stage_2_images/{where}.dcm"}.get(
            variant, f"dicom-images-train/{where}.dcm")
        if variant == "png":
            more["mask"] = f"{root}/png_masks/{path}"
            path = f"png_images/{path}"
        jobs.append(job(row, image=f"{root}/{path}", **more))
    results = run(jobs)
    sick = [int(bool(r["rle"])) for r in results]
    if variant == "png":                              # the label is part of the file name
        parts, counts = [("test" if row.split == "test" else "train") for row in rows], collections.Counter()
        for row, part, s in zip(rows, parts, sick):
            files.append(f"{counts[part]}_{part}_{s}_.png")
            counts[part] += 1
            for folder in ("png_images", "png_masks"):
                os.rename(f"{root}/{folder}/{row.index}.png", f"{root}/{folder}/{files[-1]}")
        for part in ("train", "test"):
            write_csv(f"{root}/stage_1_{part}_images.csv", "new_filename,ImageId,has_pneumo",
                      [(name, u[2], s) for name, u, s, p in zip(files, uids, sick, parts) if p == part])
    else:                                             # a row a mask, in no order
        space, order = " " if variant == "stage1" else "", np.random.default_rng([job.seed, 4])
        lines = [(u[2], space + rle) for u, r in zip(uids, results) for rle in r["rle"] or ["-1"]]
        write_csv(f"{root}/train-rle.csv" if variant == "stage1" else f"{root}/stage_2_train.csv",
                  f"ImageId,{space}EncodedPixels", [lines[i] for i in order.permutation(len(lines))])


def write_covidx(root, rows, job, run, variant):
    """cxr4: train, val and test. v8: no val, other list names, patient ids with spaces."""
    jobs, lines, folders = [], [], []
    for row in rows:
        ending, mode = (("png", "L"), ("jpg", "RGB"), ("jpeg", "L"), ("png", "RGBA"), ("JPG", "L"))[row.index % 5]
        folder = {"train": "train", "validate": "val", "test": "test"}[row.split]
        folder = "train" if variant == "v8" and folder == "val" else folder
        # a source has both classes here; in the real lists source and class go together
        source = ("ricord", "rsna", "stonybrook", "sirm", "cohen")[row.patient % 5]
        patient, name = f"{419639 + row.patient}-{row.patient:06d}", f"{source}-{row.patient}-{row.visit}.{ending}"
        if source == "sirm" and variant == "v8":
            patient, name = f"COVID {row.patient}", f"COVID({row.patient}-{row.visit}).{ending}"
        folders.append(folder)
        lines.append((patient, name, source))
        jobs.append(job(row, image=f"{root}/{folder}/{name}", mode=mode, sure=("covid-19", 0.5)))
    results = run(jobs)
    for folder in dict.fromkeys(("train", "val", "test") if variant == "cxr4" else ("train", "test")):
        os.makedirs(f"{root}/{folder}", exist_ok=True)
        write_text(f"{root}/{folder}.txt" if variant == "cxr4" else f"{root}/{folder}_COVIDx8B.txt", "".join(
            f"{patient} {name} {'positive' if ('covid-19', 'lung_bases') in r['cells'] else 'negative'} {source}\n"
            for (patient, name, source), f, r in zip(lines, folders, results) if f == folder))


def write_chexpert(root, rows, job, run, variant):
    """small or full: the same csv, another release folder. valid has no blanks; no test release."""
    order = ["No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
             "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other",
             "Fracture", "Support Devices"]
    release, jobs, paths = "CheXpert-v1.0" + ("-small" if variant == "small" else ""), [], []
    for row in rows:
        folder, first = ("train", 1) if row.split == "train" else ("valid", 64541)
        paths.append(f"{release}/{folder}/patient{row.patient + first:05d}/study{row.visit + 1}/view1_frontal.jpg")
        tall = job.size, round(job.size * 0.82)
        jobs.append(job(row, image=f"{root}/{paths[-1]}", shape=tall[::-1] if row.index % 3 else tall))
    results, lines = run(jobs), {"train": [], "valid": []}
    for row, path, r in zip(rows, paths, results):
        if row.split == "train":
            values = chexpert_values(r["mentions"])
        else:
            drawn = {p for p, _ in r["cells"]}
            values = {label: f"{int(bool(drawn & set(looks)))}.0" for label, looks in CHEXPERT.items()}
            values["No Finding"] = f"{int(not drawn - {'tube'})}.0"
        lines[path.split("/")[1]].append((path, {"M": "Male", "F": "Female"}[row.sex], row.age, "Frontal", row.view,
                                          *(values[label] for label in order)))
    for which, found in lines.items():
        write_csv(f"{root}/{release}/{which}.csv", "Path,Sex,Age,Frontal/Lateral,AP/PA," + ",".join(order), found)


MESH = {"opacity": "Opacity/lung", "atelectasis": "Pulmonary Atelectasis", "effusion": "Pleural Effusion",
        "pneumothorax": "Pneumothorax", "consolidation": "Consolidation", "pneumonia": "Pneumonia",
        "nodule": "Nodule/lung", "mass": "Mass/lung", "cardiomegaly": "Cardiomegaly", "edema": "Pulmonary Edema",
        "fracture": "Fractures, Bone/ribs", "tube": "Tube, Inserted", "elevation": "Diaphragm/elevated"}


def mesh_term(pathology, anatomy):
    """A cell as Open-i's indexers write it: Opacity/lung/upper lobe/left."""
    zone = next((f"/{z} lobe" for z in ("upper", "lower") if z in anatomy), "/hilum" if "hilar" in anatomy else "")
    side = next((f"/{s}" for s in ("left", "right") if s in anatomy), "/trachea" if anatomy == "trachea" else "")
    return MESH[pathology] + zone.replace("lower lobe", "base" if pathology == "atelectasis" else "lower lobe") + side


def write_openi(root, rows, job, run, variant):
    """xml: ecgen-radiology/ and PNGs as from the NLM. kaggle: two csv files and other file names."""
    kaggle, jobs, stems = variant == "kaggle", [], []
    for row in rows:
        uid = row.index + 1
        stems.append(f"{uid}_IM-{row.index % 2400 + 1:04d}-1001.dcm" if kaggle else f"CXR{uid}_IM-{row.index % 2400 + 1:04d}-1001")
        folder = "images/images_normalized" if kaggle else "NLMCXR_png"
        jobs.append(job(row, image=f"{root}/{folder}/{stems[-1]}.png", shape=(round(job.size * 1.2), job.size)))
    results, reports = run(jobs), []
    for r in results:
        said = {name.capitalize(): text.replace("___", "XXXX") for name, text in r["sections"]}
        terms = [mesh_term(*cell) for cell in dict.fromkeys(r["cells"]) if r["mentions"].get(cell[0]) == 1]
        reports.append((terms or ["normal"], said))
    if kaggle:
        write_csv(f"{root}/indiana_reports.csv", "uid,MeSH,Problems,image,indication,comparison,findings,impression",
                  [(row.index + 1, ";".join(terms), ";".join(t.split("/")[0] for t in terms), "Xray Chest PA",
                    *(said.get(part, "") for part in ("Indication", "Comparison", "Findings", "Impression")))
                   for row, (terms, said) in zip(rows, reports)])
        write_csv(f"{root}/indiana_projections.csv", "uid,filename,projection",
                  [(row.index + 1, stem + ".png", "Frontal") for row, stem in zip(rows, stems)])
        return
    os.makedirs(f"{root}/ecgen-radiology", exist_ok=True)
    for row, stem, (terms, said) in zip(rows, stems, reports):
        parts = "".join(f'            <AbstractText Label="{part.upper()}">{escape(said.get(part, ""))}</AbstractText>\n'
                        for part in ("Comparison", "Indication", "Findings", "Impression"))
        major = "".join(f"      <major>{escape(term)}</major>\n" for term in terms)
        write_text(f"{root}/ecgen-radiology/{row.index + 1}.xml", f"""<?xml version="1.0" encoding="utf-8"?>
<eCitation>
   <meta type="rr"/>
   <uId id="CXR{row.index + 1}"/>
   <MedlineCitation Owner="Indiana University" Status="supplied by publisher">
      <Article PubModel="Electronic">
         <Abstract>
{parts}         </Abstract>
      </Article>
   </MedlineCitation>
   <MeSH>
{major}   </MeSH>
   <parentImage id="{stem}">
      <caption>PA view of the chest.</caption>
   </parentImage>
</eCitation>
""")


def write_covid_chestxray(root, rows, job, run, variant):
    """ieee8023's metadata.csv of 2020-06, images/ and lung masks of every other image."""
    files = [f"phantom-{row.patient}-{row.visit}." + ("jpeg", "png", "jpg")[row.index % 3] for row in rows]
    jobs = [job(row, image=f"{root}/images/{name}", among=["pneumonia"], sure=("covid-19", 0.6))
            for row, name in zip(rows, files)]
    for k in range(0, len(jobs), 2):
        jobs[k]["lungs"] = f"{root}/annotations/lungVAE-masks/{files[k].rsplit('.', 1)[0]}_mask.png"
    header = ("patientid,offset,sex,age,finding,survival,intubated,intubation_present,went_icu,in_icu,"
              "needed_supplemental_O2,extubated,temperature,pO2_saturation,leukocyte_count,neutrophil_count,"
              "lymphocyte_count,view,modality,date,location,folder,filename,doi,url,license,clinical_notes,other_notes,")
    lines = []
    for row, name, r in zip(rows, files, run(jobs)):
        drawn = {p for p, _ in r["cells"]}
        finding = "COVID-19" if "covid-19" in drawn else "Pneumonia" if drawn else "No Finding"
        known = dict(patientid=row.patient + 1, offset=3 * row.visit, sex=row.sex, age=row.age, modality="X-ray",
                     finding=finding + ", ARDS" * (finding == "COVID-19" and row.patient % 9 == 0),
                     view="AP Supine" if row.index % 7 == 3 else row.view, date="2020", location="Phantom",
                     folder="images", filename=name, license="MIT",
                     clinical_notes=" ".join(
                         text for name, text in r["sections"] if name in ("FINDINGS", "IMPRESSION")))
        lines.append([known.get(column, "") for column in header.split(",")])
    write_csv(f"{root}/metadata.csv", header, lines)


LAYOUTS = {  # writer, pixels a side by default, variants (the first is the default)
    "mimic": (write_mimic, 64, ["jpg"]), "nih": (write_nih, 1024, ["flat", "folders"]),
    "rsna": (write_rsna, 1024, ["kaggle", "site", "monochrome1"]),
    "siim": (write_siim, 1024, ["stage1", "stage2", "png"]),
    "covidx": (write_covidx, 256, ["cxr4", "v8"]), "chexpert": (write_chexpert, 390, ["small", "full"]),
    "openi": (write_openi, 512, ["xml", "kaggle"]), "covid-chestxray": (write_covid_chestxray, 448, ["2020-06"])}


def write(layout, root, count, seed=0, size=None, workers=None, variant=None):
    """Draw `count` radiographs into a publisher's folder layout at `root`.

    The bytes depend on (layout, count, seed, size, variant) alone. Boxes and RLE masks of nih, rsna
    and siim are in the 1024-pixel frame of the real films whatever the size. Raises InputError for
    an unknown layout or variant, numbers out of range, or a root that holds files already.
    """
    if layout not in LAYOUTS:
        raise InputError(f"no layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    writer, default_size, variants = LAYOUTS[layout]
    size, variant = size or default_size, variant or variants[0]
    if variant not in variants:
        raise InputError(f"{layout} has no variant {variant!r}; choose one of {', '.join(variants)}")
    if count < 1 or size < 32 or seed < 0:
        raise InputError(f"count {count}, size {size}, seed {seed}: needs count >= 1, size >= 32, seed >= 0")
    if layout in ("rsna", "siim") and variant != "png":
        try:
            import pydicom  # noqa: F401
        except ImportError:
            raise InputError(f"the {layout} layout writes DICOM files: pip install pydicom")

    def job(row, **more):
        return dict(row=row, seed=[seed, 1, row.index], size=size, **more)
    job.seed, job.size = seed, size
    try:
        if os.path.isdir(root) and os.listdir(root):
            raise InputError(f"{root} is not empty; give another --root or delete it first")
        os.makedirs(root, exist_ok=True)
        writer(root, plan(count, seed), job, lambda jobs: run_jobs(jobs, workers or os.cpu_count() or 1), variant)
    except OSError as error:
        raise InputError(f"cannot write to {root}: {error.strerror or error}")


def parse_args(argv=None):
    parser = Parser(prog="phantom.py", description="Draw synthetic chest radiographs in a published layout.")
    parser.add_argument("--layout", default="mimic", help="whose folder format: " + " ".join(LAYOUTS))
    parser.add_argument("--root", help="new folder to fill (data/phantom-<layout>)")
    parser.add_argument("--count", type=int, default=200, help="number of images (200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--size", type=int, help="pixels a side (as published; mimic 64). Above 256 it is enlarged")
    parser.add_argument("--variant", help="another tree of the same set: " + "; ".join(
        f"{name} {' '.join(v)}" for name, (_, _, v) in LAYOUTS.items() if len(v) > 1))
    parser.add_argument("--workers", type=int, help="processes (one a core); the files are the same")
    return parser.parse_args(argv)


def main(args):
    root = args.root or f"data/phantom-{args.layout}"
    write(args.layout, root, args.count, args.seed, args.size, args.workers, args.variant)
    print(f"{args.count} images in {root}")


if __name__ == "__main__":
    try:
        main(parse_args())
    except InputError as error:
        print(f"phantom.py: {error}", file=sys.stderr)
        sys.exit(2)
