"""Proves that a film is a function of its seed and findings: the same bytes from any number of
workers; to take a finding away changes the film in its mask only. Findings lie where their names
say, at several places as often as asked; trivial answers do not find them. Reports tell what was
drawn, and hard training films lack what they should."""
import collections
import filecmp
import functools
import re
import tempfile

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

import phantom
from cli import InputError
from formats.chest import HELD_OUT, LOOKS, draw_film
from formats.images import read_image
from phantom import Finding, choose_findings, lay_out, plan
from reports import extract_triplets


@functools.cache
def drawn(count, world):
    """[(film, image, {finding: mask})]"""
    films = []
    with tempfile.TemporaryDirectory() as folder:
        for film in plan(count, 7, 64, 0.27, world):
            film.draw(f"{folder}/film.png")
            masks = {(found.pathology, found.anatomy): found.mask for found in film.findings}
            films.append((film, read_image(film.path), masks))
    return films


def test_bytes_do_not_depend_on_the_workers(tmp_path):
    for workers in (0, 2):
        phantom.write("mimic", f"{tmp_path}/{workers}", 260, seed=2, size=32, workers=workers)
    paths = [p.relative_to(tmp_path / "0") for p in tmp_path.glob("0/**/*") if p.is_file()]
    same, _, _ = filecmp.cmpfiles(tmp_path / "0", tmp_path / "2", paths, shallow=False)
    assert len(same) == len(paths) > 700


@pytest.mark.parametrize("world", ["easy", "hard"])
def test_a_finding_taken_away_changes_the_film_in_its_mask(world):
    for film, image, masks in drawn(50, world):
        for finding, mask in masks.items():
            others = [other for other in choose_findings(film) if other != finding]
            without, masks_without, _ = draw_film(film.seed, others, 64, world)
            change = np.abs(image.astype(int) - without)  # grey levels
            assert change[mask].max() > 20 and change[~binary_dilation(mask)].max() < 16, finding
            assert change[~binary_dilation(mask, iterations=10)].max() < 10, finding
            for other in masks_without.keys() & masks.keys():
                assert (masks_without[other] == masks[other]).mean() > 0.97


@pytest.mark.parametrize("size", [64, 300])
def test_masks_and_boxes(size):
    """The patient's left is on the film's right; a box holds its mask and is 6 of 64 pixels."""
    for pathology, place in [(name, place) for name in LOOKS for place in LOOKS[name][1]]:
        masks = draw_film(5, [(pathology, place)], size)[1]
        rows, columns = np.nonzero(masks[pathology, place])
        if place.startswith(("left", "right")):
            assert (columns.mean() > size / 2) == ("left" in place)
        x, y, width, height = Finding(pathology, place, masks[pathology, place]).box
        assert x <= columns.min() and columns.max() < x + width and width >= 6 * size / 64
        assert y <= rows.min() and rows.max() < y + height and height >= 6 * size / 64


@pytest.mark.parametrize("rate", [0, 0.27, 0.5])
def test_share_of_pathologies_at_several_places(rate):
    counts = []
    for film in plan(3000, 1, 64, rate, "easy"):
        counts += collections.Counter(name for name, _ in choose_findings(film)).values()
    assert abs(np.mean(np.array(counts) > 1) - rate) < 0.03 and max(counts) <= 4


def test_held_out_findings_are_in_test_films_only():
    found, films = collections.defaultdict(set), plan(4000, 0, 64, 0.27, "hard")
    for film in films:
        found[film.split].update(choose_findings(film))
    assert not HELD_OUT & (found["train"] | found["validate"]) and HELD_OUT <= found["test"]
    assert 0.38 < np.mean([film.split == "train" for film in films]) < 0.42


def test_trivial_answers_point_wrong():
    """Neither the brightest point nor a point that is fixed for each pathology."""
    bright, masks_of = [], collections.defaultdict(list)
    for film, image, masks in drawn(600, "easy"):
        for name in film.pathologies:
            mask = np.any([masks[finding] for finding in masks if finding[0] == name], axis=0)
            masks_of[name].append(mask)
            bright.append(mask.flat[image.argmax()])
    fixed = [np.mean(found[1::2], axis=0).flat[np.mean(found[::2], axis=0).argmax()]
             for found in masks_of.values()]
    assert np.mean(bright) < 0.25 and np.mean(fixed) < 0.5


@pytest.mark.parametrize("world, least, most", [("easy", 0.05, 0.15), ("hard", 0.2, 0.3)])
def test_reports_tell_what_was_drawn(world, least, most):
    count = collections.Counter()
    for film, _, masks in drawn(600, world):
        report, pathologies = lay_out(film.sections), {name for name, _ in masks}
        triplets = extract_triplets(report)
        present = {t[:2] for t in triplets if t.existence == 1 and t.pathology in LOOKS}
        for pathology, anatomy in present - masks.keys():  # the joint name of both sides
            assert pathology in pathologies and not re.search("left|right", anatomy), report
        assert not pathologies & {t.pathology for t in triplets if t.existence == 0}, report
        for finding, mask in masks.items():
            stated = film.mentions.get(finding[0]) == 1
            count.update(drawn=1, stated=stated, read=stated and finding in present)
            if finding[0] == "fracture" and stated:
                wrong = "right" if np.nonzero(mask)[1].mean() > 32 else "left"
                assert not re.search(rf"{wrong} rib|rib fracture on the {wrong}|intact", report)
    assert count["read"] >= 0.97 * count["stated"]
    assert least < 1 - count["stated"] / count["drawn"] < most


def test_no_folder_of_others_is_written_to(tmp_path):
    (tmp_path / "note").write_text("mine")
    with pytest.raises(InputError):
        phantom.write("mimic", str(tmp_path), 2)
