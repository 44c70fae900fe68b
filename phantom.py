"""Synthetic chest radiographs with findings, masks and reports, in the data sets' own folders.

    python phantom.py --layout nih --root data/nih --count 1000 --variant folders   # rehearse a set
    python phantom.py --layout siim --root /tmp/siim --count 100 --size 256
    python phantom.py --layout mimic --root /tmp/mimic --count 2000

train.py has its own data drawn in the mimic layout on first use. Nothing here is meant to teach
radiology: the looks are cartoons of thirteen findings and COVID-19, drawn so that neither the
brightest point nor one fixed point a finding tells where they are (tests/test_phantom.py).

Images are drawn in a chest frame: x runs over [-1, 1] from left to right of the image, y downwards,
the spine at x = 0. The patient's left is on the image's RIGHT, as on every radiograph. A finding is
(pathology, anatomy, mask); its cell of the existence matrix is (anatomy, pathology).

S pixels a side. Boxes are (x, y, width, height) in pixels from the top left corner.
"""
import concurrent.futures
import csv
import functools
import gzip
import io
import json
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
CONTRAST = 0.85              # of lesions: 1 is learned to near perfection in four epochs

# ------------------------------------------------------------------------------------------------
# The chest without findings


@functools.lru_cache(maxsize=4)
def pixel_grid(size):
    """x, y of the pixel centres, float32 [size, size] in [-1, 1]."""
    line = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    return np.meshgrid(line, line)


@functools.lru_cache(maxsize=32)
def stretch(size, cells):
    """Bicubic interpolation from `cells` to `size` values as a matrix [size, cells]."""
    unit = Image.fromarray(np.eye(cells, dtype=np.float32))
    return np.array(unit.resize((cells, size), Image.Resampling.BICUBIC))


def smooth_noise(rng, size, cells):
    """Noise of about `cells` bumps across the image, standard deviation near 0.7: [size, size]."""
    matrix = stretch(size, cells)
    return matrix @ rng.standard_normal((cells, cells), dtype=np.float32) @ matrix.T


def pick(rng, *things):
    return things[rng.integers(len(things))]


def ramp(distance, width):
    """0 outside, 1 inside, linear over `width` around distance 0."""
    return np.minimum(np.maximum(distance * (1 / width) + 0.5, 0), 1)


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


def pose_chest(rng, size, wanted):
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
        if ("elevation", name) in wanted:
            c.raised[side] = c.base[side]
            c.base[side] -= rng.uniform(0.24, 0.34)
    large = ("cardiomegaly", "heart_size") in wanted
    grow = rng.uniform(1.32, 1.55) if large else rng.uniform(0.88, 1.06)
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
            knob = disc(c, 0.07, -0.26, 0.12, 0.15)   # of the aorta
            field = np.minimum(field, (knob - 1) * 0.06)
        c.lung[side] = ramp(field, c.soft)
    c.rib_start = rng.uniform()                       # ribs are where the phase is a whole number
    c.rib_phase = (c.y - 0.33 * c.x_abs * c.x_abs) * (1 / 0.2) + np.float32(c.rib_start)
    c.cage = ramp(1.04 - c.chest, 0.1)
    return c


def rib_band(phase):
    return np.clip((np.cos(2 * np.pi * phase) - 0.5) * 2.5, 0, 1)


def render_chest(c, rng):
    """The film without findings, float32 [S, S]: air 0, lung near 0.25, tissue from 0.6 on."""
    neck = c.x_abs - 0.22                             # > 0 on the shoulders
    body = ramp(c.y + 0.98 - np.minimum(0.45 * neck, 8 * neck), 0.16) * ramp(1.04 - c.x_abs, 0.12)
    film = body * (0.60 - 0.9 * np.maximum(c.x_abs - 0.72, 0) ** 2)             # thinner sides
    lungs = c.lung[LEFT] + c.lung[RIGHT]
    film -= lungs * np.float32(rng.uniform(0.32, 0.40))
    c.markings = 0.035 * smooth_noise(rng, c.size, 22) * lungs
    from_hilum = (c.x_abs - 0.16) ** 2 + (c.y - 0.02) ** 2
    c.markings *= np.maximum(1 - 1.2 * from_hilum, 0)             # vessels thin out
    film += c.markings + 0.09 * np.maximum(1 - 14 * from_hilum, 0)
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
    """Metal that is no finding, above 1, in the frame of the film: side marker, ECG leads."""
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
    """Centre x, y and side of a lesion in the named zone, at most a third of it in the wall."""
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
    change = change * c.space[side] * np.clip((0.75 - c.film) * 2.5, 0.5, 1)
    return [(change, (shape > 0.35) & (c.space[side] > 0.5))]


def draw_patch(strength, radii, fall, texture=0.0, fissure=False):
    """A patch with ragged edges: opacity is faint and soft, pneumonia mottled by `texture`,
    consolidation dense with one straight edge, where a fissure holds it back."""
    def patch(c, anatomy):
        rng, r = c.rng, c.rng.uniform(*radii)
        x, y, side = place_in_lung(c, anatomy, r)
        ragged = 1 + 0.2 * smooth_noise(rng, c.size, 9)
        wide, high, turn = 1.0, rng.uniform(0.75, 1.15), rng.uniform(0, 3)
        if fissure:
            wide, high, turn = 1.25, 1.1, 0.0
        shape = ramp(ragged - disc(c, x, y, wide * r, high * r, turn), fall)
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
    density = np.float32(rng.uniform(0.75, 1.0))
    return [(fluid * np.maximum(0.60 - c.film, 0) * density, fluid > 0.5)]


def draw_pneumothorax(c, anatomy):
    side, rng = side_of(anatomy), c.rng
    depth, reach = rng.uniform(0.11, 0.16), rng.uniform(-0.32, 0.05)
    wall = (1 - c.chest) * 0.4 - depth * ramp(reach - c.y, 0.4)   # < 0 in the air outside the lung
    where = ramp(reach - c.y, 0.12) * c.lung[side]
    air = ramp(-wall, c.soft) * where
    line = ramp(0.5 * c.soft + 0.006 - np.abs(wall), c.soft) * where              # the pleura
    change = -air * (0.18 + c.markings) + line * 0.28
    return [(change, air > 0.5)]


def draw_atelectasis(c, anatomy):
    side, rng = side_of(anatomy), c.rng
    x, y = side * rng.uniform(0.36, 0.56), c.base[side] - rng.uniform(0.10, 0.34)
    half, tilt = rng.uniform(0.16, 0.24), side * rng.normal(0.1, 0.22)
    plate = ramp(0.05 - segment(c, x - half, y - half * tilt, x + half, y + half * tilt), c.soft)
    return in_lung(c, side, plate * np.float32(rng.uniform(0.40, 0.48)), plate)


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
        y, wide = rng.uniform(0.08, 0.22), rng.uniform(0.22, 0.28)
        shape = ramp(1 - disc(c, side * 0.68, y, wide, 0.34), 0.8)
        patches += in_lung(c, side, shape * grain * np.float32(rng.uniform(0.16, 0.22)), shape)
    return patches


def draw_fracture(c, anatomy):
    rng = c.rng
    side, x, k = pick(rng, LEFT, RIGHT), rng.uniform(0.38, 0.60), pick(rng, -2, -1, 0, 1)
    y = (k - c.rib_start) * 0.2 + 0.33 * x * x             # on the k-th rib
    along, rib = c.x * side - x, c.rib_phase - k                  # outwards; 0 on the rib, 1 = next
    near = ramp(1 - disc(c, side * x, y, 0.22, 0.17), 0.3)
    # the outer fragment is stepped by 0.4 of the gap between ribs; both are bright, the gap is dark
    broken = np.where(along > 0, rib - 0.4, rib)
    bone = ramp(0.24 - np.abs(broken), 0.2)
    gap = ramp(0.03 - np.abs(along), c.soft) * (np.abs(rib - 0.2) < 0.5)
    change = near * (0.55 * bone - 0.04 * rib_band(c.rib_phase) - 0.35 * gap)
    return [(change, near > 0.5)]


def draw_tube(c, anatomy):
    rng, side = c.rng, side_of(anatomy)
    if side:                                          # chest tube, from the side towards the apex
        y0, y1 = rng.uniform(0.10, 0.35), rng.uniform(-0.45, -0.20)
        points = [(side * 0.95, y0 + 0.12), (side * 0.66, y0), (side * rng.uniform(0.3, 0.5), y1)]
        d = np.minimum(segment(c, *points[0], *points[1]), segment(c, *points[1], *points[2]))
        seen = (d < 0.055) & (c.chest < 1)
    else:
        x, tip = rng.uniform(-0.015, 0.035), rng.uniform(-0.38, -0.22)
        d = segment(c, x + rng.normal(0, 0.03), -1.3, x, tip)
        seen = d < 0.06
    wall = ramp(0.032 - np.abs(d - 0.012), c.soft)
    return [(wall * np.float32(rng.uniform(0.40, 0.50)), seen)]


LUNG_ZONES = [f"{side}_{zone}_lung" for side in ("left", "right") for zone in ZONES]
PLEURA = ["left_pleural", "right_pleural"]

# pathology: (how often, anatomies it is drawn at, how it is drawn)
LOOKS = {
    "effusion": (1.2, PLEURA, draw_effusion),
    "pneumothorax": (1.0, ["left_apical_lung", "right_apical_lung"], draw_pneumothorax),
    "consolidation": (1.2, LUNG_ZONES, draw_patch((0.38, 0.46), (0.22, 0.28), 0.5, fissure=True)),
    "opacity": (1.2, LUNG_ZONES, draw_patch((0.22, 0.27), (0.24, 0.31), 1.2)),
    "pneumonia": (1.1, LUNG_ZONES, draw_patch((0.30, 0.36), (0.22, 0.29), 0.6, texture=1.5)),
    "nodule": (1.1, LUNG_ZONES, draw_round((0.44, 0.52), (0.115, 0.145), 0.0)),
    "mass": (1.0, LUNG_ZONES[0:2] + LUNG_ZONES[3:5] + ["left_hilar", "right_hilar"],
             draw_round((0.38, 0.46), (0.19, 0.25), 0.2)),
    "atelectasis": (1.0, ["left_lower_lung", "right_lower_lung"], draw_atelectasis),
    "cardiomegaly": (0.8, ["heart_size"], draw_cardiomegaly),
    "edema": (0.8, ["hilar_unspec"], draw_edema),
    "fracture": (1.2, ["rib"], draw_fracture),
    "tube": (1.0, ["trachea"] + PLEURA, draw_tube),
    "elevation": (0.9, ["left_diaphragm", "right_diaphragm"], draw_elevation),
}

UNSEEN = {"covid-19": (0, ["lung_bases"], draw_covid)}   # in two layouts only, not in mimic

# findings that would hide each other share a spot; one image has at most one finding a spot
SPOTS = {"pleural": "lower", "diaphragm": "lower", "lower_lung": "lower", "apical_lung": "upper",
         "upper_lung": "upper", "mid_lung": "mid", "hilar": "mid"}


def spots(pathology, anatomy):
    bilateral = {"edema": "mid", "covid-19": "lower"}.get(pathology)
    if bilateral:
        return {f"left {bilateral}", f"right {bilateral}"}
    side, _, place = anatomy.partition("_")
    return {f"{side} {'drain' if pathology == 'tube' else SPOTS.get(place, place)}"}


def choose_findings(rng, among=None, sure=None):
    """0-3 (pathology, anatomy) pairs; consolidation and pneumonia often bring an effusion along.

    among: the pathologies to choose from, all of LOOKS by default; sure: one that comes first.
    """
    names = list(among or LOOKS)
    weights = np.array([LOOKS[name][0] for name in names])
    wanted = min(rng.choice([0, 1, 2, 3], p=[0.24, 0.34, 0.27, 0.15]), len(names))
    chosen, taken = {}, set()                         # pathology: anatomy

    def add(pathology, anatomies):
        free = [a for a in anatomies if not spots(pathology, a) & taken]
        if free and pathology not in chosen and len(chosen) < 3:
            chosen[pathology] = free[rng.integers(len(free))]
            taken.update(spots(pathology, chosen[pathology]))

    if sure:
        add(sure, (LOOKS | UNSEEN)[sure][1])
    for name in rng.choice(names, wanted, replace=False, p=weights / weights.sum()).tolist():
        add(name, LOOKS[name][1])
        last = next(reversed(chosen), None)
        if last in ("consolidation", "pneumonia") and not among and rng.uniform() < 0.3:
            add("effusion", [chosen[last].split("_")[0] + "_pleural"])
    return list(chosen.items())


def bounding_box(mask):
    """(x, y, width, height) inside the image, none below 0.094 of it: 6 pixels of 64."""
    sides = []
    for axis in (0, 1):                               # columns, then rows
        hit, size = np.flatnonzero(mask.any(axis)), mask.shape[0]
        length = hit[-1] + 1 - hit[0]
        grow = max(0, 0.094 * size - length)
        low = min(max(hit[0] - grow / 2, 0), size - length - grow)
        sides.append((float(low), float(length + grow)))
    (x, width), (y, height) = sides
    return x, y, width, height


def draw(rng, size=64, findings=None):
    """One radiograph.

    findings: list of (pathology, anatomy) to draw; by default `choose_findings` draws 0-3.
    Returns {"image" uint8 [S, S]; "findings": a list of {"pathology", "anatomy", "box", "mask" bool
    [S, S]}, two of a bilateral one, none of one too small to see; "lungs" bool [S, S]; "report" str
    as in a MIMIC file; "sections" and "mentions" of it, see `dictate`}.
    """
    wanted = choose_findings(rng) if findings is None else list(findings)
    small = min(size, DETAIL)
    c = pose_chest(rng, small, wanted)
    c.film = render_chest(c, rng)
    drawn = []
    for pathology, anatomy in wanted:
        for change, mask in (LOOKS | UNSEEN)[pathology][2](c, anatomy):
            c.film = c.film + np.float32(CONTRAST) * change
            if mask.sum() >= small * small / 500:
                drawn.append((pathology, anatomy, mask))
    image = develop(hang_hardware(c.film, rng), rng, size)
    lungs = c.lung[LEFT] + c.lung[RIGHT] > 0.5
    if size != small:
        drawn, lungs = [(p, a, enlarge(mask, size)) for p, a, mask in drawn], enlarge(lungs, size)
    sections, mentions = dictate(rng, list(dict.fromkeys((p, a) for p, a, _ in drawn)))
    return dict(image=image, lungs=lungs, findings=[
        dict(pathology=p, anatomy=a, box=bounding_box(mask), mask=mask) for p, a, mask in drawn],
        report=lay_out(sections), sections=sections, mentions=mentions)


def enlarge(mask, size):
    return np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))


def develop(film, rng, size):
    """Uneven exposure, grain, tone curve, blur: float [S, S] -> uint8 [size, size]."""
    gain, gamma, black = rng.uniform(0.85, 1.1), rng.uniform(0.8, 1.25), rng.uniform(0, 0.06)
    film = film + smooth_noise(rng, film.shape[0], 5) * 0.022
    grain = rng.random(film.shape, dtype=np.float32) - np.float32(0.5)
    film = film + grain * np.float32(rng.uniform(0.02, 0.055))
    tone = np.linspace(0, 1.1, 1127) ** gamma * gain + black     # a table: a power a pixel is slow
    tone = (np.clip(tone, 0, 1) * 255).astype(np.uint8)
    image = Image.fromarray(tone[(np.clip(film, 0, 1.1) * 1023).astype(np.int16)])
    if rng.uniform() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.6) * film.shape[0] / 64))
    if size != film.shape[0]:
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


# ------------------------------------------------------------------------------------------------
# The report: what a radiologist might dictate about the drawn findings

# {where} is a place in words, {side} left or right, {amount} and {a} a word or nothing
PATCH = ["{amount}{name} in the {where}.", "There is {amount}{name} in the {where}.",
         "{where} {name}.", "{where} {name} is noted.", "{amount}{name} is seen in the {where}."]
BALL = ["{a} {name} in the {where}.", "There is a {name} in the {where}.", "{where} {name}.",
        "A {name} projects over the {where}."]
STATED = {
    "effusion": [
        "{amount}{side} pleural effusion.", "There is a {amount}{side} pleural effusion.",
        "{amount}pleural effusion on the {side}.", "{amount}{side}-sided pleural effusion is seen.",
        "Blunted {side} costophrenic angle from a {side} pleural effusion."],
    "pneumothorax": [
        "{amount}{side} apical pneumothorax.", "{side} apical pneumothorax is present.",
        "There is a {amount}{side} apical pneumothorax.",
        "{amount}pneumothorax at the {side} apex."],
    "consolidation": PATCH, "opacity": PATCH, "pneumonia": PATCH, "nodule": BALL, "mass": BALL,
    "atelectasis": [
        "{side} basilar atelectasis.", "{amount}atelectasis at the {side} lung base.",
        "Plate-like atelectasis in the {where}.",
        "There is {amount}atelectasis at the {side} base."],
    "cardiomegaly": [
        "{amount}cardiomegaly.", "There is {amount}cardiomegaly.", "Cardiomegaly is present."],
    "edema": ["Bilateral perihilar edema.", "There is {amount}perihilar edema on both sides.",
              "{amount}bilateral perihilar pulmonary edema."],
    "fracture": ["Displaced {side} rib fracture.", "There is a rib fracture on the {side}.",
                 "Fracture of a {side} rib is seen.", "Rib fracture."],
    "tube": ["A {side} pleural tube is in place.", "{side} pleural tube.",
             "There is a {side} pleural tube."],
    "trachea": ["Endotracheal tube in the trachea.", "An endotracheal tube is in the trachea.",
                "There is a tube in the trachea."],
    "elevation": [
        "Elevation of the {side} hemidiaphragm.", "The {side} hemidiaphragm is elevated.",
        "There is elevation of the {side} hemidiaphragm.", "Elevated {side} hemidiaphragm."],
    "covid-19": [
        "Peripheral opacities at both lung bases.", "There are bilateral basilar opacities."]}
HEDGED = ["Possible {name} in the {where}.", "{name} in the {where} cannot be excluded."]
DENIED = {"effusion": "pleural effusion", "opacity": "focal opacity", "edema": "pulmonary edema",
          "consolidation": "focal consolidation", "fracture": "rib fracture",
          "tube": "endotracheal tube", "elevation": "elevation of the hemidiaphragm"}


def place_words(anatomy, rng):
    """An anatomy in a radiologist's words: left_upper_lung -> "upper zone of the left lung"."""
    side, _, rest = anatomy.partition("_")
    zone = rest.split("_")[0]
    if zone in ZONES:
        return pick(rng, f"{side} {zone} lung", f"{side} {zone} lung zone",
                    f"{zone} zone of the {side} lung", f"{zone} {side} lung")
    return f"{side} hilum" if rest == "hilar" else anatomy.replace("_", " ")


def sentence(templates, pathology, anatomy, rng):
    side = {LEFT: "left", RIGHT: "right", 0: pick(rng, "left", "right")}[side_of(anatomy)]
    where = place_words(anatomy, rng)
    amount = pick(rng, "", "", "small ", "moderate ", "mild ", "large ")
    said = pick(rng, *templates).format(
        name=pathology, where=where, side=side, amount=amount, a=pick(rng, "small", "round", "a"))
    return said[0].upper() + said[1:]


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
            seen.append(sentence(HEDGED, pathology, anatomy, rng))
            mentions.setdefault(pathology, -1)
        else:
            templates = STATED["trachea" if anatomy == "trachea" else pathology]
            for said in (seen, impression):
                said.append(sentence(templates, pathology, anatomy, rng))
            mentions[pathology] = 1
    drawn = {pathology for pathology, _ in cells}
    absent = [p for p in LOOKS if p not in drawn and rng.uniform() < 0.3]
    mentions.update((p, 0) for p in absent)
    while absent:
        several = rng.integers(1, 4)
        *first, last = [DENIED.get(p, p) for p in absent[:several]]
        absent = absent[several:]
        seen.append(pick(rng, "No ", "There is no ", "No evidence of ", "There is no evidence of ")
                    + (", ".join(first) + " or " if first else "") + last + ".")
    if "cardiomegaly" not in drawn and rng.uniform() < 0.4:
        seen.append(pick(rng, "Heart size is normal.", "The heart is normal in size."))
    if rng.uniform() < 0.3:
        seen.append(pick(rng, "The mediastinal contours are unremarkable.",
                         "Mediastinal contours are normal.", "Osseous structures are intact."))
    if not drawn:
        if rng.uniform() < 0.5:
            seen.append(pick(rng, "The lungs are clear.", "Lungs are clear."))
        impression.append(pick(rng, "No acute cardiopulmonary process.",
                               "Normal chest radiograph."))
    seen, impression = " ".join(seen[i] for i in rng.permutation(len(seen))), " ".join(impression)

    reason = pick(rng, "cough", "fever", "shortness of breath", "chest pain", "hypoxia", "fall")
    fear = pick(rng, "pneumonia", "effusion", "pneumothorax", "acute process")  # asked, not seen
    sections = [("EXAMINATION", pick(rng, "CHEST (PORTABLE AP)", "CHEST RADIOGRAPH", "Chest PA")),
                ("INDICATION", f"___{pick(rng, 'F', 'M')} with {reason}.  Evaluate for {fear}.")]
    if rng.uniform() < 0.5:
        sections.append(("COMPARISON", pick(rng, "None.", "Chest radiograph from ___.")))
    style = rng.uniform()                             # findings alone, impression alone, or both
    if style < 0.15 and seen:
        sections.append(("FINDINGS", seen))
    elif style < 0.35:
        sections.append(("IMPRESSION", seen or impression or "Comparison with prior films."))
    else:
        sections += [("FINDINGS", seen or "Single frontal view."),
                     ("IMPRESSION", impression or "As above.")]
    return sections, mentions


def lay_out(sections):
    """MIMIC's page: FINAL REPORT, one leading space a line, 79 columns, " " for a blank line."""
    lines = [" " * 33 + "FINAL REPORT"]
    for header, text in sections:
        if header in ("FINDINGS", "IMPRESSION"):
            lines += [f" {header}:  ", " "]
        else:
            text = f"{header}:  {text}"
        lines += [" " + line for line in textwrap.wrap(text, 78)] + [" "]
    return "\n".join(lines[:-1]) + "\n"


# ------------------------------------------------------------------------------------------------
# From drawings to files


class Film(types.SimpleNamespace):
    """Whose image, what to draw, where to write it. plan() gives seed, size, index, patient, visit,
    split, age, sex and view; a writer gives image, its path, and what of the below is not as usual;
    make() adds what the label files need: cells, boxes, mentions, sections, rle."""
    among, sure = None, (None, 0)           # draw these pathologies only; this one at this rate
    mode, shape, raw = "L", None, False     # of the file: Pillow's, (height, width), `save_dicom`'s
    report = bits = mask = lungs = None     # paths of other files, where they are wanted
    of = None                               # the pathology whose masks are written; None: all


def plan(count, seed, size):
    """The films of a set: patients come 1-3 times; splits by patient, 8:1:1."""
    rng, films, patient = np.random.default_rng([seed, 0]), [], 0
    while len(films) < count:
        if patient % 10 == 0:
            splits = rng.permutation(["train"] * 8 + ["validate", "test"]).tolist()
        age, sex = int(rng.integers(18, 90)), pick(rng, "M", "F")
        for visit in range(min(rng.integers(1, 4), count - len(films))):
            films.append(Film(seed=seed, size=size, index=len(films), patient=patient, visit=visit,
                              split=splits[patient % 10], age=age, sex=sex,
                              view=pick(rng, "PA", "AP")))
        patient += 1
    return films


def make(film):
    """Draw one film and write its files."""
    rng = np.random.default_rng([film.seed, 1, film.index])
    sure, rate = film.sure
    sure = sure if rng.uniform() < rate else None
    drawn = draw(rng, film.size, choose_findings(rng, film.among, sure))
    found = drawn["findings"]
    masks = [f["mask"] for f in found if film.of in (None, f["pathology"])]
    save_image(film, Image.fromarray(drawn["image"]))
    if film.report:
        write_text(film.report, drawn["report"])
    if film.bits and masks:                           # bit k: the image's k-th row in boxes.csv
        bits = sum(mask.astype(np.uint8) << k for k, mask in enumerate(masks))
        Image.fromarray(bits).save(with_folder(film.bits), compress_level=1)
    if film.mask:
        union = np.any(masks or [np.zeros_like(drawn["lungs"])], 0)
        Image.fromarray(union).convert("L").save(with_folder(film.mask))
    if film.lungs:
        Image.fromarray(drawn["lungs"]).convert("L").save(with_folder(film.lungs))
    film.cells = [(f["pathology"], f["anatomy"]) for f in found]
    film.boxes = [f["box"] for f in found]
    film.rle = [runs for mask in masks for runs in encode_rle(mask)] if film.of else []
    film.mentions, film.sections = drawn["mentions"], dict(drawn["sections"])
    return film


def encode_rle(mask, frame=1024):
    """SIIM's runs in its 1024-pixel frame, column by column: gap since the last run, then length.

    Tall masks come as two overlapping pieces, as if drawn by two readers.
    """
    mask = enlarge(mask, frame)
    rows, pieces = np.flatnonzero(mask.any(1)), []
    cut = (rows[0] + rows[-1]) // 2
    tall = rows[-1] - rows[0] > 0.25 * frame
    for top, end in [(0, cut + 9), (cut - 9, frame)] if tall else [(0, frame)]:
        flat = np.zeros(frame * frame + 2, np.int8)   # a zero before and after
        flat[1:-1].reshape(frame, frame).T[top:end] = mask[top:end]
        edges = np.flatnonzero(np.diff(flat))
        pieces.append(" ".join(map(str, np.diff(edges, prepend=0))))
    return pieces


def save_image(film, image):
    """PNG, JPEG or DICOM by the ending of film.image."""
    image = image.convert(film.mode)
    if film.shape:
        image = image.resize(film.shape[::-1], Image.Resampling.BICUBIC)
    path = with_folder(film.image)
    if path.endswith(".dcm"):
        save_dicom(film, image)
    elif path.endswith(".png"):
        image.save(path, compress_level=1)
    else:
        image.save(path, quality=95)


def save_dicom(film, image):
    """A file like RSNA's and SIIM's: 8-bit MONOCHROME2 in baseline JPEG, lossy flag, bare age.

    film.raw: 12 bits in 16, MONOCHROME1, uncompressed, rescaled, windowed, as hospitals send it.
    """
    import pydicom
    from pydicom import encaps, uid
    tags = dict(
        SpecificCharacterSet="ISO_IR 100", SOPClassUID=uid.SecondaryCaptureImageStorage,
        StudyInstanceUID=film.uids[0], SeriesInstanceUID=film.uids[1], SOPInstanceUID=film.uids[2],
        StudyDate="19010101", StudyTime="000000.00", AccessionNumber="", ReferringPhysicianName="",
        PatientBirthDate="", StudyID="", PatientOrientation="", Modality="CR", ConversionType="WSD",
        SeriesDescription=f"view: {film.view}", ViewPosition=film.view, BodyPartExamined="CHEST",
        PatientName=film.person, PatientID=film.person, PatientSex=film.sex,
        PatientAge=str(film.age), SeriesNumber="1", InstanceNumber="1", SamplesPerPixel=1,
        PixelRepresentation=0, Rows=image.height, Columns=image.width,
        PixelSpacing=["0.168", "0.168"])
    if film.raw:
        stored = (255 - np.asarray(image, np.uint16)) * 8 + 19
        tags |= dict(PhotometricInterpretation="MONOCHROME1", BitsAllocated=16, BitsStored=12,
                     HighBit=11, RescaleSlope="2", RescaleIntercept="-100", WindowCenter="1979",
                     WindowWidth="4080", PixelData=stored.astype("<u2").tobytes())
    else:
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=90)
        tags |= dict(PhotometricInterpretation="MONOCHROME2", BitsAllocated=8, BitsStored=8,
                     HighBit=7, LossyImageCompression="01",
                     LossyImageCompressionMethod="ISO_10918_1",
                     PixelData=encaps.encapsulate([jpeg.getvalue()]))
    file = pydicom.Dataset()
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = (
        uid.ExplicitVRLittleEndian if film.raw else uid.JPEGBaseline8Bit)
    with pydicom.config.disable_value_validation():   # an age must have a unit; theirs have none
        for name, value in tags.items():
            setattr(file, name, value)
        file["PixelData"].VR = "OW" if film.raw else "OB"
        file.save_as(film.image, enforce_file_format=True)


def run_all(films, workers):
    """make() for every film, in order. Each has its own seed, so `workers` changes nothing."""
    def bar(done):
        return list(tqdm(done, "drawing", len(films), unit="image", disable=len(films) < 1000))
    if workers <= 1 or len(films) < 32:
        return bar(map(make, films))
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        try:
            return bar(pool.map(make, films, chunksize=min(32, max(1, len(films) // workers))))
        except concurrent.futures.BrokenExecutor:
            raise InputError("a worker was killed, perhaps for want of memory: use fewer --workers")


def with_folder(path):
    """`path`, whose folder exists from now on."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return path


def write_text(path, text):
    """gzipped if the name ends so, without a time stamp: same text, same bytes."""
    data = text.encode()
    with open(with_folder(path), "wb") as file:
        file.write(gzip.compress(data, mtime=0) if path.endswith(".gz") else data)


def write_csv(path, header, rows):
    """`header` is the first line, verbatim."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, header + "\n" + text.getvalue())


# ------------------------------------------------------------------------------------------------
# The publishers' folders. A writer takes (root, films, run, variant): it names each film's files,
# run(films) draws them, and it writes the label files.

CHEXPERT = {  # label: the pathologies that count for it, in MIMIC-CXR-JPG's order
    "Atelectasis": {"atelectasis"}, "Cardiomegaly": {"cardiomegaly"},
    "Consolidation": {"consolidation"}, "Edema": {"edema"}, "Enlarged Cardiomediastinum": set(),
    "Fracture": {"fracture"}, "Lung Lesion": {"nodule", "mass"},
    "Lung Opacity": {"opacity", "consolidation", "pneumonia", "edema", "atelectasis"},
    "No Finding": set(), "Pleural Effusion": {"effusion"}, "Pleural Other": set(),
    "Pneumonia": {"pneumonia"}, "Pneumothorax": {"pneumothorax"}, "Support Devices": {"tube"}}


def chexpert_values(mentions):
    """What a labeller makes of a report: {label: "1.0", "0.0", "-1.0" or ""}."""
    values = {}
    for label, looks in CHEXPERT.items():
        said = {v for name, v in mentions.items() if name in looks
                # denying pneumonia does not deny every opacity
                and (v == 1 or name == "opacity" or label != "Lung Opacity")}
        values[label] = next((f"{v}.0" for v in (1, -1, 0) if v in said), "")
    if not any(v in ("1.0", "-1.0") for k, v in values.items() if k != "Support Devices"):
        values["No Finding"] = "1.0"
    return values


def write_mimic(root, films, run, variant):
    """MIMIC-CXR-JPG with the reports beside the study folders, plus boxes.csv and masks/."""
    def number(first, index):                         # in no visible order, and no two alike
        return first + (index * 7_654_321 + 32) % 9_999_991
    for f in films:
        rng = np.random.default_rng([f.seed, 2, f.index])
        f.id = "-".join(rng.bytes(4).hex() for _ in range(5))
        f.subject, f.study = number(10_000_000, f.patient), number(50_000_000, f.index)
        f.date = f"21{rng.integers(10, 60)}{rng.integers(1, 13):02d}{rng.integers(1, 29):02d}"
        f.time = f"{rng.integers(24)}{rng.integers(60):02d}{rng.integers(60):02d}".lstrip("0")
        f.time += f".{rng.integers(1000):03d}"        # 80556.875 is 08:05:56
        folder = f"{root}/files/p{f.subject // 1_000_000}/p{f.subject}/s{f.study}"
        f.image, f.report = f"{folder}/{f.id}.jpg", f"{folder}.txt"
        f.bits = f"{root}/masks/{f.id}.png"
    films = run(films)
    write_csv(f"{root}/boxes.csv", "dicom_id,finding,pathology,anatomy,x,y,width,height",
              [(f.id, k, *cell, *(round(v, 2) for v in box)) for f in films
               for k, (cell, box) in enumerate(zip(f.cells, f.boxes))])
    write_csv(f"{root}/mimic-cxr-2.0.0-chexpert.csv.gz",
              "subject_id,study_id," + ",".join(CHEXPERT),
              [(f.subject, f.study, *chexpert_values(f.mentions).values()) for f in films])
    exams = {"PA": ("CHEST (PA AND LAT)", "postero-anterior"),
             "AP": ("CHEST (PORTABLE AP)", "antero-posterior")}
    write_csv(f"{root}/mimic-cxr-2.0.0-metadata.csv.gz",
              "dicom_id,subject_id,study_id,PerformedProcedureStepDescription,ViewPosition,Rows,"
              "Columns,StudyDate,StudyTime,ProcedureCodeSequence_CodeMeaning,"
              "ViewCodeSequence_CodeMeaning,PatientOrientationCodeSequence_CodeMeaning",
              [(f.id, f.subject, f.study, exams[f.view][0], f.view, f.size, f.size, f.date, f.time,
                *exams[f.view], "Erect") for f in films])
    # the split file comes last: a folder without it was not finished
    write_csv(f"{root}/mimic-cxr-2.0.0-split.csv.gz", "dicom_id,study_id,subject_id,split",
              [(f.id, f.study, f.subject, f.split) for f in films])


NIH = {"atelectasis": "Atelectasis", "cardiomegaly": "Cardiomegaly", "effusion": "Effusion",
       "opacity": "Infiltration", "mass": "Mass", "nodule": "Nodule", "pneumonia": "Pneumonia",
       "pneumothorax": "Pneumothorax",                # these eight have boxes
       "consolidation": "Consolidation", "edema": "Edema"}


def write_nih(root, films, run, variant):
    """flat: NIH's tarballs in one place, 2020 entry file. folders: Kaggle's twelve, 2017 file."""
    kaggle = variant == "folders"
    for f in films:
        f.name = f"{f.patient + 1:08d}_{f.visit:03d}.png"
        folder = f"images_{1 + 12 * f.index // len(films):03d}/" if kaggle else ""
        f.image, f.mode = f"{root}/{folder}images/{f.name}", "RGBA" if f.index % 40 == 7 else "L"
    films = run(films)
    name, sex = ("", "Gender") if kaggle else ("_v2020", "Sex")
    write_csv(f"{root}/Data_Entry_2017{name}.csv",    # the header has brackets and a field too many
              f"Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient {sex},"
              "View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],",
              [(f.name, "|".join(dict.fromkeys(NIH[p] for p, _ in f.cells if p in NIH))
                or "No Finding", f.visit, f.patient + 1, f.age, f.sex, f.view, 2500, 2048, 0.168,
                0.168) for f in films])
    write_csv(f"{root}/BBox_List_2017.csv", "Image Index,Finding Label,Bbox [x,y,w,h],,,",
              [(f.name, NIH[p].replace("Infiltration", "Infiltrate"),
                *(v * 1024 / f.size for v in box))
               for f in films if f.split == "test" for (p, _), box in zip(f.cells, f.boxes)
               if p in list(NIH)[:8]])
    for name, tests in (("train_val_list.txt", False), ("test_list.txt", True)):
        write_text(f"{root}/{name}", "".join(
            f"{f.name}\n" for f in films if (f.split == "test") == tests))


def name_dicoms(films):
    """Study, series and image UIDs in the manner of RSNA and SIIM; persons are UUIDs."""
    for f in films:
        rng = np.random.default_rng([f.seed, 2, f.index])
        f.person = str(uuid.UUID(bytes=rng.bytes(16), version=4))
        f.uids = [f"1.2.276.0.7230010.3.1.{level}.8323329.{f.index + 301}."
                  f"15178752{f.index % 90 + 10}.{850000 + f.index}" for level in (2, 3, 4)]


def write_rsna(root, films, run, variant):
    """kaggle: stage 2 folders. site: the RSNA site's tree, with the mapping to NIH's patients and
    MedKLIP's test csv. monochrome1: kaggle's tree with uncompressed 12-bit inverted films."""
    name_dicoms(films)
    for f in films:
        f.sure, f.raw = ("pneumonia", 0.15), variant == "monochrome1"
        f.path = f"stage_2_train_images/{f.person}.dcm"
        if variant == "site":
            f.path = f"mdai_rsna_project_x9N20BZa_images_2018-07-20-153330/{'/'.join(f.uids)}.dcm"
        f.image = f"{root}/{f.path}"
    films = run(films)
    for f in films:
        f.boxes = [[float(round(v * 1024 / f.size)) for v in box]
                   for (p, _), box in zip(f.cells, f.boxes)
                   if p in ("pneumonia", "opacity", "consolidation")]
        f.kind = ("Lung Opacity" if f.boxes else
                  "No Lung Opacity / Not Normal" if f.cells else "Normal")
    write_csv(f"{root}/stage_2_train_labels.csv", "patientId,x,y,width,height,Target",
              [(f.person, *box, int(bool(f.boxes))) for f in films
               for box in f.boxes or [[""] * 4]])
    write_csv(f"{root}/stage_2_detailed_class_info.csv", "patientId,class",
              [(f.person, f.kind) for f in films for _ in f.boxes or [0]])  # a row a box here, too
    if variant == "site":
        write_csv(f"{root}/rsna_test.csv", "ID,img_path,boxes,classes",
                  [(f.person, f.path, "|".join(";".join(map(str, box)) for box in f.boxes) or "nan",
                    int(bool(f.boxes))) for f in films if f.split == "test"])
        write_text(f"{root}/pneumonia-challenge-dataset-mappings_2018.json", json.dumps([
            dict(img_id=f"{f.patient + 1:08d}_{f.visit:03d}.png", subset_img_id=f.person,
                 StudyInstanceUID=f.uids[0], SeriesInstanceUID=f.uids[1], SOPInstanceUID=f.uids[2])
            for f in films]))


def write_siim(root, films, run, variant):
    """stage1: train-rle.csv with its spaces. stage2: stage_2_train.csv without. png: re-pack."""
    name_dicoms(films)
    for f in films:
        f.of, f.sure = "pneumothorax", ("pneumothorax", 0.2)
        f.image = {"stage1": f"{root}/dicom-images-train/{'/'.join(f.uids)}.dcm",
                   "stage2": f"{root}/stage_2_images/{f.uids[2]}.dcm",
                   "png": f"{root}/png_images/{f.index}.png"}[variant]
        if variant == "png":
            f.mask = f"{root}/png_masks/{f.index}.png"
    films = run(films)
    if variant == "png":
        for part in ("train", "test"):
            chosen = [f for f in films if (f.split == "test") == (part == "test")]
            for k, f in enumerate(chosen):            # the label is part of the file name
                f.name = f"{k}_{part}_{int(bool(f.rle))}_.png"
                os.rename(f.image, f"{root}/png_images/{f.name}")
                os.rename(f.mask, f"{root}/png_masks/{f.name}")
            write_csv(f"{root}/stage_1_{part}_images.csv", "new_filename,ImageId,has_pneumo",
                      [(f.name, f.uids[2], int(bool(f.rle))) for f in chosen])
        return
    name, space = ("train-rle.csv", " ") if variant == "stage1" else ("stage_2_train.csv", "")
    lines = [(f.uids[2], space + rle) for f in films for rle in f.rle or ["-1"]]
    order = np.random.default_rng([films[0].seed, 3]).permutation(len(lines))  # a row a mask
    write_csv(f"{root}/{name}", f"ImageId,{space}EncodedPixels", [lines[k] for k in order])


def write_covidx(root, films, run, variant):
    """cxr4: train, val and test. v8: no val, other list names, patient ids with spaces.

    Every source has both classes here; in the real lists source and class go together.
    """
    cxr4 = variant == "cxr4"
    for f in films:
        f.sure = ("covid-19", 0.5)
        f.source = ["ricord", "rsna", "stonybrook", "sirm", "cohen"][f.patient % 5]
        f.person, name = f"{419639 + f.patient}-{f.patient:06d}", f"{f.source}-{f.patient}"
        if f.source == "sirm" and not cxr4:
            f.person, name = f"COVID {f.patient}", f"COVID({f.patient})"
        ending, f.mode = [("png", "L"), ("jpg", "RGB"), ("jpeg", "L"), ("png", "RGBA"),
                          ("JPG", "L")][f.index % 5]
        f.name = f"{name}-{f.visit}.{ending}"
        f.folder = {"test": "test", "validate": "val" if cxr4 else "train"}.get(f.split, "train")
        f.image = f"{root}/{f.folder}/{f.name}"
    films = run(films)
    for f in films:
        f.said = "positive" if "covid-19" in dict(f.cells) else "negative"
    for folder in ("train", "val", "test") if cxr4 else ("train", "test"):
        write_text(f"{root}/{folder}{'' if cxr4 else '_COVIDx8B'}.txt", "".join(
            f"{f.person} {f.name} {f.said} {f.source}\n" for f in films if f.folder == folder))


def write_chexpert(root, films, run, variant):
    """small or full: the same csv, another release folder. valid has no blanks; no test release."""
    header = ("Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,"
              "Cardiomegaly,Lung Opacity,Lung Lesion,Edema,Consolidation,Pneumonia,Atelectasis,"
              "Pneumothorax,Pleural Effusion,Pleural Other,Fracture,Support Devices")
    release = "CheXpert-v1.0-small" if variant == "small" else "CheXpert-v1.0"
    for f in films:
        f.part, first = ("train", 1) if f.split == "train" else ("valid", 64541)
        f.path = (f"{release}/{f.part}/patient{f.patient + first:05d}/study{f.visit + 1}/"
                  "view1_frontal.jpg")
        f.image, short = f"{root}/{f.path}", round(0.82 * f.size)
        f.shape = (f.size, short) if f.index % 3 == 0 else (short, f.size)
    lines = {"train": [], "valid": []}
    for f in run(films):
        values = chexpert_values(f.mentions)
        if f.part == "valid":                         # read by radiologists from the film itself
            drawn = {p for p, _ in f.cells}
            values = {k: f"{int(bool(drawn & looks))}.0" for k, looks in CHEXPERT.items()}
            values["No Finding"] = f"{int(not drawn - {'tube'})}.0"
        lines[f.part].append([f.path, {"M": "Male", "F": "Female"}[f.sex], f.age, "Frontal", f.view,
                              *(values[label] for label in header.split(",")[5:])])
    for part, rows in lines.items():
        write_csv(f"{root}/{release}/{part}.csv", header, rows)


MESH = {"opacity": "Opacity/lung", "atelectasis": "Pulmonary Atelectasis", "mass": "Mass/lung",
        "effusion": "Pleural Effusion", "nodule": "Nodule/lung", "edema": "Pulmonary Edema",
        "fracture": "Fractures, Bone/ribs", "tube": "Tube, Inserted",
        "elevation": "Diaphragm/elevated"}


def mesh_term(pathology, anatomy):
    """A cell as Open-i's indexers put it: Opacity/lung/upper lobe/left, Pleural Effusion/right."""
    base = "base" if pathology == "atelectasis" else "lower lobe"
    parts = {"upper": "upper lobe", "lower": base, "hilar": "hilum", "apical": "apex"}
    words = anatomy.split("_")
    return "/".join([MESH.get(pathology, pathology.capitalize()),
                     *(parts[word] for word in words if word in parts),
                     *(word for word in words if word in ("left", "right", "trachea"))])


def write_openi(root, films, run, variant):
    """xml: ecgen-radiology/ and PNGs as from the NLM. kaggle: two csv files, other file names."""
    kaggle = variant == "kaggle"
    for f in films:
        f.uid = f.index + 1
        stem, f.shape = f"{f.uid}_IM-{f.uid:04d}-1001", (round(f.size * 1.2), f.size)
        folder, f.stem = (("images/images_normalized", f"{stem}.dcm") if kaggle else
                          ("NLMCXR_png", f"CXR{stem}"))
        f.image = f"{root}/{folder}/{f.stem}.png"
    films, parts = run(films), ("COMPARISON", "INDICATION", "FINDINGS", "IMPRESSION")
    for f in films:
        f.said = [f.sections.get(part, "").replace("___", "XXXX") for part in parts]
        f.terms = [mesh_term(*cell) for cell in dict.fromkeys(f.cells)
                   if f.mentions.get(cell[0]) == 1] or ["normal"]
    if kaggle:
        write_csv(f"{root}/indiana_reports.csv",
                  "uid,MeSH,Problems,image,indication,comparison,findings,impression",
                  [(f.uid, ";".join(f.terms), ";".join(term.split("/")[0] for term in f.terms),
                    "Xray Chest PA", f.said[1], f.said[0], *f.said[2:]) for f in films])
        write_csv(f"{root}/indiana_projections.csv", "uid,filename,projection",
                  [(f.uid, f.stem + ".png", "Frontal") for f in films])
        return
    for f in films:
        texts = "\n".join(f'            <AbstractText Label="{part}">{escape(said)}</AbstractText>'
                          for part, said in zip(parts, f.said))
        major = "\n".join(f"      <major>{escape(term)}</major>" for term in f.terms)
        write_text(f"{root}/ecgen-radiology/{f.uid}.xml", f"""\
<?xml version="1.0" encoding="utf-8"?>
<eCitation>
   <meta type="rr"/>
   <uId id="CXR{f.uid}"/>
   <MedlineCitation Owner="Indiana University" Status="supplied by publisher">
      <Article PubModel="Electronic">
         <Abstract>
{texts}
         </Abstract>
      </Article>
   </MedlineCitation>
   <MeSH>
{major}
   </MeSH>
   <parentImage id="{f.stem}">
      <caption>PA view of the chest.</caption>
   </parentImage>
</eCitation>
""")


def write_covid_chestxray(root, films, run, variant):
    """ieee8023's metadata.csv of 2020-06, images/, and lung masks of every other image."""
    for f in films:
        f.among, f.sure = ["pneumonia"], ("covid-19", 0.6)
        stem = f"phantom-{f.patient}-{f.visit}"
        f.name = f"{stem}.{['jpeg', 'png', 'jpg'][f.index % 3]}"
        f.image = f"{root}/images/{f.name}"
        if f.index % 2 == 0:
            f.lungs = f"{root}/annotations/lungVAE-masks/{stem}_mask.png"
    header = ("patientid,offset,sex,age,finding,survival,intubated,intubation_present,went_icu,"
              "in_icu,needed_supplemental_O2,extubated,temperature,pO2_saturation,leukocyte_count,"
              "neutrophil_count,lymphocyte_count,view,modality,date,location,folder,filename,doi,"
              "url,license,clinical_notes,other_notes,")
    lines = []
    for f in run(films):
        drawn = dict(f.cells)
        known = dict(
            patientid=f.patient + 1, offset=3 * f.visit, sex=f.sex, age=f.age, date="2020",
            finding="Pneumonia" if drawn else "No Finding", modality="X-ray", folder="images",
            view="AP Supine" if f.index % 7 == 3 else f.view, location="Phantom",
            filename=f.name, license="MIT", clinical_notes=" ".join(
                f.sections[part] for part in ("FINDINGS", "IMPRESSION") if part in f.sections))
        if "covid-19" in drawn:
            known["finding"] = "COVID-19, ARDS" if f.patient % 9 == 0 else "COVID-19"
        lines.append([known.get(column, "") for column in header.split(",")])
    write_csv(f"{root}/metadata.csv", header, lines)


LAYOUTS = {  # writer, pixels a side by default, variants (the first is the default)
    "mimic": (write_mimic, 64, ["jpg"]), "nih": (write_nih, 1024, ["flat", "folders"]),
    "rsna": (write_rsna, 1024, ["kaggle", "site", "monochrome1"]),
    "siim": (write_siim, 1024, ["stage1", "stage2", "png"]),
    "covidx": (write_covidx, 256, ["cxr4", "v8"]),
    "chexpert": (write_chexpert, 390, ["small", "full"]),
    "openi": (write_openi, 512, ["xml", "kaggle"]),
    "covid-chestxray": (write_covid_chestxray, 448, ["2020-06"])}


def write(layout, root, count, seed=0, size=None, workers=None, variant=None):
    """Draw `count` radiographs into a publisher's folder layout at `root`.

    The bytes depend on (layout, count, seed, size, variant) alone. Boxes and RLE masks of nih, rsna
    and siim are in the 1024-pixel frame of the real films whatever the size. Raises InputError for
    an unknown layout or variant, numbers out of range, or a root that holds files already.
    """
    if layout not in LAYOUTS:
        raise InputError(f"no layout {layout!r}; choose one of {', '.join(LAYOUTS)}")
    writer, default_size, variants = LAYOUTS[layout]
    size = default_size if size is None else size
    variant, workers = variant or variants[0], workers or os.cpu_count()
    if variant not in variants:
        raise InputError(f"{layout} has no variant {variant!r}; it has: {', '.join(variants)}")
    if count < 1 or size < 32 or seed < 0:
        raise InputError(f"count {count}, size {size}, seed {seed}: count must be at least 1, "
                         "size at least 32, seed at least 0")
    if layout in ("rsna", "siim") and variant != "png":
        try:
            import pydicom  # noqa: F401
        except ImportError:
            raise InputError(f"the {layout} layout writes DICOM files: pip install pydicom")
    try:
        if os.path.isdir(root) and os.listdir(root):
            raise InputError(f"{root} is not empty; give another --root or delete it first")
        writer(root, plan(count, seed, size), lambda films: run_all(films, workers), variant)
    except OSError as error:
        raise InputError(f"cannot write to {root}: {error.strerror or error}")


def parse_args(argv=None):
    p = Parser(prog="phantom.py", description="Draw synthetic chest radiographs with reports.")
    p.add_argument("--layout", default="mimic", metavar="NAME",
                   help="whose folders: " + " ".join(LAYOUTS))
    p.add_argument("--root", metavar="DIR", help="new folder to fill (data/phantom-<layout>)")
    p.add_argument("--count", type=int, default=200, metavar="N", help="images (200)")
    p.add_argument("--seed", type=int, default=0, metavar="N")
    p.add_argument("--size", type=int, metavar="PIXELS",
                   help=f"a side; above {DETAIL} films are drawn at {DETAIL} and enlarged "
                        f"({', '.join(f'{k} {size}' for k, (_, size, _) in LAYOUTS.items())})")
    p.add_argument("--variant", metavar="NAME", help="another tree of the same data set: "
                   + "; ".join(f"{k} {' '.join(v)}" for k, (_, _, v) in LAYOUTS.items() if v[1:]))
    p.add_argument("--workers", type=int, metavar="N", help="processes (one a core)")
    return p.parse_args(argv)


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
