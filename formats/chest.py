"""A chest film as a function of its seed, its findings and the world, for phantom.py.

    image, masks, lungs = draw_film(7, [("nodule", "left_mid_lung")])    # 64 x 64 pixels
    image, masks, lungs = draw_film(7, [("mass", "left_mid_lung")])      # the same but for that

The looks are cartoons of thirteen findings and teach no radiology. A finding is a (pathology,
anatomy). Each part of a film has random numbers of its own, so to take a finding away, to move it
or to exchange its pathology changes nothing else. The mask of a finding is its evidence: the pixels
in which the film differs from the same film without it.

x runs over [-1, 1] from left to right of the film, y downwards, the spine is at x = 0. S is pixels
a side.
"""
import math
import random
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageFilter
from scipy.ndimage import binary_fill_holes

SIGN = {"left": 1, "right": -1}  # of x: the patient's left is on the film's right
DETAIL = 256                     # larger films are drawn at 256 pixels and enlarged
VISIBLE = 0.05                   # the least difference in a mask; lung is 0.25, the heart 0.65
ZONES = {"upper": (-0.42, -0.24), "mid": (-0.10, 0.08), "lower": (0.22, 0.36)}  # y of lesions
HELD_OUT = {(pathology, f"{side}_{zone}_lung") for side in SIGN for pathology, zone in (
    ("nodule", "upper"), ("consolidation", "mid"), ("opacity", "lower"), ("pneumonia", "upper"),
    ("mass", "mid"))}


class World(NamedTuple):     # the easy one
    contrast: float = 0.85   # of lesions; with 1 they are learned to near perfection
    growth: float = 1.0      # of large hearts and raised diaphragms
    alike: float = 0.0       # 0: each look its own; 1: patches look alike, nodule and mass as well
    left_out: float = 0.07   # share of pathologies that the report does not mention
    hedged: float = 0.03     # share of pathologies in the lung that it only suspects
    splits: tuple = 8, 1, 1  # train, validate and test patients of ten
    held_out: set = frozenset()  # findings that only test films have


WORLDS = {"easy": World(), "hard": World(contrast=0.65, growth=0.8, alike=0.5, left_out=0.20,
                                         hedged=0.05, splits=(4, 1, 5), held_out=HELD_OUT)}

# ------------------------------------------------------------------------------ the healthy chest


def stream(*names):
    """The random numbers of one part of one film."""
    return random.Random(" ".join(map(str, names)))


def noise(rng, size, cells):
    """[S,S] with about `cells` bumps a side and standard deviation near 0.7."""
    bumps = np.random.default_rng(rng.getrandbits(32)).standard_normal((cells, cells), np.float32)
    return np.asarray(Image.fromarray(bumps).resize((size, size), Image.Resampling.BICUBIC))


def pixel_grid(size):
    """x, y of the pixel centres, float32 [S,S]."""
    line = (np.arange(size, dtype=np.float32) + 0.5) * (2 / size) - 1
    return np.meshgrid(line, line)


def ramp(distance, width):
    """0 outside, 1 inside, linear over `width` around distance 0."""
    return np.clip(distance * (1 / width) + 0.5, 0, 1)


def ellipse(c, x, y, rx, ry, angle=0.0):
    """Squared elliptical radius around (x, y): below 1 inside. [S,S]"""
    cos, sin = math.cos(angle), math.sin(angle)
    dx, dy = c.x - x, c.y - y
    return (dx * cos + dy * sin) ** 2 * (1 / rx**2) + (dy * cos - dx * sin) ** 2 * (1 / ry**2)


def segment(c, x0, y0, x1, y1):
    """Distance to the segment from (x0, y0) to (x1, y1). [S,S]"""
    dx, dy = x1 - x0, y1 - y0
    along = np.clip(((c.x - x0) * dx + (c.y - y0) * dy) * (1 / (dx * dx + dy * dy)), 0, 1)
    return np.sqrt((c.x - x0 - along * dx) ** 2 + (c.y - y0 - along * dy) ** 2)


class Chest:
    """A patient's geometry in fields [S,S], and `film`, the film without lesions: air 0, lung near
    0.25, tissue from 0.6 on. Cardiomegaly and elevation move organs, so they act here."""

    def __init__(self, seed, findings, size, world):
        self.seed, self.size, self.world = seed, size, world
        rng = stream(seed, "pose")
        angle, scale = rng.gauss(0, 0.035), rng.uniform(0.98, 1.14)
        cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
        px, py = pixel_grid(size)
        self.x = px * cos - py * sin + rng.uniform(-0.1, 0.1)                   # [S,S]
        self.y = px * sin + py * cos + rng.uniform(-0.1, 0.1)
        self.soft = max(0.03, 2.5 / size)             # width of an edge: a pixel or so at least
        self.width = rng.uniform(0.76, 0.84)          # half width of the thorax
        self.cage = ellipse(self, 0, 0.25, self.width, 1.06)                    # below 1 inside
        self.rib_start = rng.random()                 # ribs are where the phase is a whole number
        self.rib_phase = (self.y - 0.33 * self.x**2) * (1 / 0.2) + self.rib_start
        self.ribs = np.clip((np.cos(2 * math.pi * self.rib_phase) - 0.5) * 2.5, 0, 1)
        # lesions are placed by the healthy heart and diaphragm, whatever else is drawn
        self.diaphragm = {"left": rng.gauss(0.56, 0.04), "right": rng.gauss(0.50, 0.04)}
        heart, density = rng.uniform(0.88, 1.06), 0.06
        self.beside_heart = 0.10 + 0.33 * heart
        if ("cardiomegaly", "heart_size") in findings:
            heart = 1 + stream(seed, "cardiomegaly").uniform(0.32, 0.55) * world.growth
            density += 0.08 * world.growth            # a large heart is also thick
        self.heart = ellipse(self, 0.10 + 0.05 * heart, 0.32, 0.35 * heart, 0.27 * heart**0.6, 0.35)
        aorta = (ellipse(self, 0.07, -0.26, 0.12, 0.15) - 1) * 0.06
        self.above, self.space, self.lung = {}, {}, {}
        for side, sign in SIGN.items():
            top = self.diaphragm[side]
            if ("elevation", f"{side}_diaphragm") in findings:
                top -= stream(seed, "elevation", side).uniform(0.24, 0.34) * world.growth
            out = self.x * sign                       # grows outwards on this side
            self.above[side] = top + 1.1 * (out - 0.34) ** 2 - self.y           # the diaphragm
            inside = np.minimum(np.minimum((1 - self.cage) * 0.4, out - 0.12), self.above[side])
            self.space[side] = ramp(inside, self.soft)  # lung, the part behind the heart included
            inside = np.minimum(np.minimum(inside, (self.heart - 1) * 0.2), aorta)
            self.lung[side] = ramp(inside, self.soft)
        self.lungs = self.lung["left"] + self.lung["right"]
        self.film = self.expose(stream(seed, "chest"), density)

    def expose(self, rng, heart_density):
        x, y, x_abs = self.x, self.y, np.abs(self.x)
        neck = x_abs - 0.22                           # > 0 on the shoulders
        body = ramp(y + 0.98 - np.minimum(0.45 * neck, 8 * neck), 0.16) * ramp(1.04 - x_abs, 0.12)
        film = body * (0.60 - 0.9 * np.maximum(x_abs - 0.72, 0) ** 2)           # thinner sides
        film -= self.lungs * rng.uniform(0.32, 0.40)
        from_hilum = (x_abs - 0.16) ** 2 + (y - 0.02) ** 2
        thinning = np.maximum(1 - 1.2 * from_hilum, 0)
        self.vessels = 0.035 * noise(rng, self.size, 22) * self.lungs * thinning
        film += self.vessels + 0.09 * np.maximum(1 - 14 * from_hilum, 0)
        film += ramp(1.04 - self.cage, 0.1) * self.ribs * rng.uniform(0.035, 0.055)
        film += ramp(1 - self.heart, 0.5) * heart_density
        film += ramp(0.10 - x_abs, 0.05) * (0.035 + 0.02 * np.cos(y * 44))      # spine
        film -= ramp(0.04 - np.abs(x - 0.015), 0.04) * ramp(-0.24 - y, 0.1) * 0.10  # trachea
        abdomen = np.maximum(ramp(-self.above["left"], 0.06), ramp(-self.above["right"], 0.06))
        film += abdomen * body * 0.10
        slope, high = rng.uniform(0.18, 0.30), rng.uniform(-0.66, -0.58)
        clavicle = np.abs(y - high + slope * (x_abs - 0.12))
        return film + ramp(0.03 - clavicle, 0.03) * (x_abs > 0.09) * (x_abs < 0.78) * 0.12


# ------------------------------------------------------------------------------------------ looks
# A look takes (chest, pathology, side, place, random numbers) and returns the change of the film
# [S,S]. Side and place are the parts of an anatomy, such as "left" and "lower_lung".

# Traits of lesions: strength from .. to, radius from .. to, softness and raggedness of the edge,
# mottling, oblongness, straightness of the lower edge (a fissure holds a consolidation back)
PATCHES = {
    "consolidation": (0.38, 0.46, 0.22, 0.28, 0.5, 0.2, 0.0, 0.2, 1.0),
    "opacity": (0.22, 0.27, 0.24, 0.31, 1.2, 0.2, 0.0, 0.2, 0.0),
    "pneumonia": (0.30, 0.36, 0.22, 0.29, 0.6, 0.2, 1.2, 0.2, 0.0)}
BALLS = {
    "nodule": (0.44, 0.52, 0.115, 0.145, 0.35, 0.0, 0.0, 0.0, 0.0),
    "mass": (0.38, 0.46, 0.19, 0.25, 0.35, 0.2, 0.0, 0.0, 0.0)}


def in_lung(c, side, density):
    """Density adds up in air; before heart, ribs or another lesion it shows less."""
    return density * c.space[side] * np.clip((0.75 - c.film) * 2.5, 0.5, 1)


def place_lesion(c, side, place, radius):
    """Centre x, y in a zone or hilum, at most a third in the wall. The random numbers are those of
    the place, so that a pathology exchanged for another lies at the same spot."""
    rng = stream(c.seed, side, place)
    if place == "hilar":
        return SIGN[side] * rng.uniform(0.20, 0.27), rng.uniform(-0.06, 0.10)
    low, high = ZONES[place.removesuffix("_lung")]
    y = rng.uniform(low, min(high, c.diaphragm[side] - 0.12))
    wall = c.width * math.sqrt(1 - ((y - 0.25) / 1.06) ** 2) - 0.65 * radius
    inner = c.beside_heart if side == "left" and y > 0.05 else 0.24
    return SIGN[side] * rng.uniform(min(inner, wall - 0.04), wall), y


def draw_lesion(c, pathology, side, place, rng):
    """A patch or a ball. Its traits are moved towards the mean of its table by `alike`."""
    table = PATCHES if pathology in PATCHES else BALLS
    own, mean = np.array(table[pathology]), np.mean(list(table.values()), axis=0)
    low, high, small, large, soft, ragged, mottling, oblong, straight = (
        own + c.world.alike * (mean - own)).tolist()
    radius = rng.uniform(small, large)
    x, y = place_lesion(c, side, place, radius)
    wide, tall = radius * (1 + 0.25 * straight), radius * rng.uniform(1 - oblong, 1 + oblong)
    distance = ellipse(c, x, y, wide, tall, rng.uniform(0, 3) * (1 - straight))
    shape = ramp(1 + ragged * noise(rng, c.size, 9) - distance, max(soft, 2.2 * c.soft / radius))
    cut = 1 - ramp(y + 0.05 - c.y + rng.gauss(0, 0.15) * (c.x - x), c.soft)
    mottles = np.clip(1 + mottling * (noise(rng, c.size, 24) - 0.13), 0, 2.5)
    return in_lung(c, side, shape * (1 - straight * cut) * mottles * rng.uniform(low, high))


def draw_edema(c, pathology, side, place, rng):
    """Wings around both hila."""
    grain, change = noise(rng, c.size, 19), 0
    for side, sign in SIGN.items():
        strength, reach = rng.uniform(0.17, 0.22), rng.uniform(0.21, 0.27)
        shape = ramp(1 - ellipse(c, sign * 0.34, 0.02, reach, 1.35 * reach), 1.2)
        change = change + in_lung(c, side, shape * (1 + 0.25 * grain) * strength)
    return change


def draw_effusion(c, pathology, side, place, rng):
    level = c.diaphragm[side] - rng.uniform(-0.08, 0.20)          # of the fluid near the midline
    rise = rng.uniform(0.55, 1.0)                                 # meniscus: higher along the wall
    below = c.y - level + rise * np.clip(c.x * SIGN[side], 0, 1) ** 3
    return ramp(below, 0.07) * c.lung[side] * np.maximum(0.60 - c.film, 0) * rng.uniform(0.75, 1)


def draw_pneumothorax(c, pathology, side, place, rng):
    depth, reach = rng.uniform(0.11, 0.16), rng.uniform(-0.32, 0.05)
    wall = (1 - c.cage) * 0.4 - depth * ramp(reach - c.y, 0.4)    # < 0 in the air around the lung
    where = ramp(reach - c.y, 0.12) * c.lung[side]
    pleura = ramp(0.5 * c.soft + 0.006 - np.abs(wall), c.soft) * where
    return pleura * 0.28 - ramp(-wall, c.soft) * where * (0.18 + c.vessels)


def draw_atelectasis(c, pathology, side, place, rng):
    x, y = SIGN[side] * rng.uniform(0.36, 0.56), c.diaphragm[side] - rng.uniform(0.10, 0.34)
    half, tilt = rng.uniform(0.16, 0.24), SIGN[side] * rng.gauss(0.1, 0.22)
    plate = segment(c, x - half, y - half * tilt, x + half, y + half * tilt)
    return in_lung(c, side, ramp(0.05 - plate, c.soft) * rng.uniform(0.40, 0.48))


def draw_fracture(c, pathology, side, place, rng):
    """Both fragments are bright, the outer one a step lower, and the gap between them is dark."""
    sign, x, rib = rng.choice((1, -1)), rng.uniform(0.38, 0.60), rng.choice((-2, -1, 0, 1))
    along, phase = c.x * sign - x, c.rib_phase - rib              # outwards; 0 on the rib, 1 = next
    bone = ramp(0.24 - np.abs(np.where(along > 0, phase - 0.4, phase)), 0.2)
    gap = ramp(0.03 - np.abs(along), c.soft) * (np.abs(phase - 0.2) < 0.5)
    y = (rib - c.rib_start) * 0.2 + 0.33 * x**2
    near = ramp(1 - ellipse(c, sign * x, y, 0.22, 0.17), 0.3)
    return near * (0.55 * bone - 0.04 * c.ribs - 0.35 * gap)


def draw_tube(c, pathology, side, place, rng):
    if side == "trachea":
        x, tip = rng.uniform(-0.015, 0.035), rng.uniform(-0.38, -0.22)
        distance = segment(c, x + rng.gauss(0, 0.03), -1.3, x, tip)
    else:  # chest tube, from the side towards the apex
        sign = SIGN[side]
        y0, y1 = rng.uniform(0.10, 0.35), rng.uniform(-0.45, -0.20)
        outer = segment(c, sign * 0.95, y0 + 0.12, sign * 0.66, y0)
        inner = segment(c, sign * 0.66, y0, sign * rng.uniform(0.3, 0.5), y1)
        distance = np.minimum(outer, inner)
    return ramp(0.032 - np.abs(distance - 0.012), c.soft) * rng.uniform(0.40, 0.50)


LUNG_ZONES = [f"{side}_{zone}_lung" for side in SIGN for zone in ZONES]
PLEURA = ["left_pleural", "right_pleural"]
CENTRAL = [zone for zone in LUNG_ZONES if "lower" not in zone] + ["left_hilar", "right_hilar"]
LOOKS = {  # pathology: (how often, places, look; None where Chest has moved an organ)
    "effusion": (1.2, PLEURA, draw_effusion),
    "pneumothorax": (1.0, ["left_apical_lung", "right_apical_lung"], draw_pneumothorax),
    "consolidation": (1.2, LUNG_ZONES, draw_lesion),
    "opacity": (1.2, LUNG_ZONES, draw_lesion),
    "pneumonia": (1.1, LUNG_ZONES, draw_lesion),
    "nodule": (1.1, LUNG_ZONES, draw_lesion),
    "mass": (1.0, CENTRAL, draw_lesion),
    "atelectasis": (1.0, ["left_lower_lung", "right_lower_lung"], draw_atelectasis),
    "cardiomegaly": (0.8, ["heart_size"], None),
    "edema": (0.8, ["hilar_unspec"], draw_edema),
    "fracture": (1.2, ["rib"], draw_fracture),
    "tube": (1.0, ["trachea"] + PLEURA, draw_tube),
    "elevation": (0.9, ["left_diaphragm", "right_diaphragm"], None)}

# ------------------------------------------------------------------------------------------ films


def draw_film(seed, findings, size=64, world="easy"):
    """(image uint8 [size,size], {finding: mask bool [size,size]}, lungs bool [size,size]).

    Findings too small to see have no mask. The same seed with other findings is the
    counterfactual film. world: a key of WORLDS.
    """
    world, small = WORLDS[world], min(size, DETAIL)
    chest, masks = Chest(seed, findings, small, world), {}
    healthy = chest.film
    for finding in sorted(findings):
        pathology, (side, _, place) = finding[0], finding[1].partition("_")
        look = LOOKS[pathology][2]
        if look:
            change = look(chest, pathology, side, place, stream(seed, *finding)) * world.contrast
            chest.film = chest.film + change
        else:
            others = [other for other in findings if other != finding]
            change = healthy - Chest(seed, others, small, world).film
        mask = binary_fill_holes(np.abs(change) > VISIBLE)
        if mask.sum() >= small**2 / 500:
            masks[finding] = enlarge(mask, size)
    return develop(chest.film, seed, size), masks, enlarge(chest.lungs > 0.5, size)


def enlarge(mask, size):
    return np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))


def develop(film, seed, size):
    """Hang metal that is no finding, expose, add grain: float [S,S] -> uint8 [size,size]."""
    rng, small = stream(seed, "hardware"), len(film)
    x, y = pixel_grid(small)
    if rng.random() < 0.8:                            # the letter L beside the patient's left
        dx, dy = x - rng.uniform(0.80, 0.90), y + rng.uniform(0.70, 0.95)
        stem = (np.abs(dx) < 0.025) & (np.abs(dy) < 0.08)
        foot = (np.abs(dx - 0.035) < 0.06) & (np.abs(dy - 0.08) < 0.025)
        film = np.maximum(film, 1.12 * (stem | foot))
    if rng.random() < 0.35:                           # leads of an ECG with their wires
        for _ in range(rng.randint(1, 3)):
            dx, dy = x - rng.uniform(-0.75, 0.75), y - rng.uniform(-0.55, 0.7)
            film = np.maximum(film, 1.05 * ramp(0.045**2 - dx**2 - dy**2, 0.002))
            film = film + 0.07 * ((np.abs(dx - 0.15 * dy) < 0.012) & (dy > 0))
    rng = stream(seed, "exposure")
    grain = np.random.default_rng(rng.getrandbits(32)).random(film.shape, np.float32) - 0.5
    film = film + noise(rng, small, 5) * 0.022 + grain * rng.uniform(0.02, 0.055)
    film = np.clip(film, 0, 1.1) ** rng.uniform(0.8, 1.25) * rng.uniform(0.85, 1.1)
    image = Image.fromarray((np.clip(film + rng.uniform(0, 0.06), 0, 1) * 255).astype(np.uint8))
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.6) * small / 64))
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))
