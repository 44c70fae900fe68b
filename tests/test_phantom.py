"""Proves that a film is a function of its seed and findings: the same bytes from any number of
workers, counterfactual films that differ only where a finding was, masks that hold the difference.
That findings lie where their names say, at several places as often as asked, and that trivial
answers do not find them. That reports tell what was drawn. That hard training films lack what they
should. What a wrong call says."""
import collections
import filecmp
import re

import numpy as np
import pytest
from scipy.ndimage import binary_dilation

import phantom
from chest import HELD_OUT, LOOKS, draw_film
from cli import InputError
from phantom import Finding, bounding_box, choose_findings, dictate, lay_out, plan
from reports import extract_triplets
from text import ANATOMIES, PATHOLOGIES


def drawn(count, world="easy", seed=7):
    """[(film, image, masks)] with findings and reports, nothing written."""
    films = []
    for film in plan(count, seed, 64, 0.27, world):
        image, masks, _ = draw_film(film.seed, choose_findings(film), 64, world)
        film.findings = [Finding(*cell, bounding_box(mask)) for cell, mask in masks.items()]
        dictate(film)
        films.append((film, image, masks))
    return films


@pytest.fixture(scope="module")
def easy():
    return drawn(600)


def test_bytes_do_not_depend_on_the_workers(tmp_path):
    for workers in (1, 2):
        phantom.write("mimic", str(tmp_path / str(workers)), 40, seed=2, size=32, workers=workers)
    paths = [p.relative_to(tmp_path / "1") for p in (tmp_path / "1").rglob("*") if p.is_file()]
    assert len(paths) > 100
    _, different, missing = filecmp.cmpfiles(tmp_path / "1", tmp_path / "2", paths, shallow=False)
    assert not different and not missing


@pytest.mark.parametrize("world", ["easy", "hard"])
def test_a_finding_taken_away_changes_the_film_in_its_mask(world):
    """In grey levels of the exposed films, grain and blur included."""
    for film, image, masks in drawn(60, world):
        cells = choose_findings(film)
        for cell, mask in masks.items():
            without, others, _ = draw_film(film.seed, [c for c in cells if c != cell], 64, world)
            change = np.abs(image.astype(int) - without)
            assert change[mask].max() > 20 and change[~binary_dilation(mask)].max() < 16, cell
            assert change[~binary_dilation(mask, iterations=10)].max() < 10, cell
            assert all((others[c] == masks[c]).mean() > 0.97 for c in others if c in masks)


def test_a_finding_moved_or_exchanged_changes_nothing_else():
    stays = ("effusion", "right_pleural")
    one, masks, _ = draw_film(3, [stays, ("nodule", "left_upper_lung")])
    for other in (("nodule", "left_mid_lung"), ("pneumonia", "left_upper_lung")):
        two, moved, _ = draw_film(3, [stays, other])
        places = masks["nodule", "left_upper_lung"] | moved[other]
        assert (masks[stays] == moved[stays]).all()
        assert (one == two)[~binary_dilation(places, iterations=10)].all() and (one != two).any()


@pytest.mark.parametrize("size", [64, 100, 300])
def test_boxes_and_sides(size):
    """The patient's left is on the film's right; a box holds its mask and is 6 of 64 pixels."""
    for pathology, (_, places, _) in LOOKS.items():
        assert pathology in [*PATHOLOGIES, "covid-19"] and set(places) <= set(ANATOMIES)
        for place in places:
            image, masks, lungs = draw_film(5, [(pathology, place)], size)
            mask = masks[pathology, place]
            assert image.shape == lungs.shape == mask.shape == (size, size)
            rows, columns = np.nonzero(mask)
            if "left" in place or "right" in place:
                assert (columns.mean() > size / 2) == ("left" in place)
            x, y, width, height = bounding_box(mask)
            assert 0 <= x <= columns.min() and columns.max() < x + width <= size
            assert 0 <= y <= rows.min() and rows.max() < y + height <= size
            assert min(width, height) >= 6 * size / 64


@pytest.mark.parametrize("rate", [0, 0.27, 0.5])
def test_share_of_findings_at_several_places(rate):
    counts = [count for film in plan(3000, 1, 64, rate, "easy")
              for count in collections.Counter(p for p, _ in choose_findings(film)).values()]
    assert abs(np.mean(np.array(counts) > 1) - rate) < 0.03 and max(counts) <= 4


def test_held_out_findings_are_in_test_films_only():
    cells = {"train": set(), "validate": set(), "test": set()}
    films = plan(4000, 0, 64, 0.27, "hard")
    for film in films:
        cells[film.split].update(choose_findings(film))
    assert not HELD_OUT & (cells["train"] | cells["validate"]) and HELD_OUT <= cells["test"]
    assert 0.38 < np.mean([film.split == "train" for film in films]) < 0.42


def test_trivial_answers_point_wrong(easy):
    """The brightest pixel, and the best pixel of each pathology as found on other films."""
    bright, masks_of = [], collections.defaultdict(list)
    for _, image, masks in easy:
        for pathology in {p for p, _ in masks}:
            mask = np.any([m for (p, _), m in masks.items() if p == pathology], axis=0)
            masks_of[pathology].append(mask)
            bright.append(mask.flat[image.argmax()])
    fixed = [np.mean([mask.flat[np.mean(found[::2], axis=0).argmax()] for mask in found[1::2]])
             for found in masks_of.values()]
    print(f"brightest {np.mean(bright):.3f}, fixed {np.mean(fixed):.3f}")
    assert np.mean(bright) < 0.25 and np.mean(fixed) < 0.5


@pytest.mark.parametrize("world", ["easy", "hard"])
def test_reports_tell_what_was_drawn(easy, world):
    counts = collections.Counter()
    for film, _, masks in easy if world == "easy" else drawn(600, world):
        report, pathologies = lay_out(film.sections), {p for p, _ in masks}
        triplets = extract_triplets(report)
        present = {t[:2] for t in triplets if t.existence == 1 and t.pathology in LOOKS}
        for pathology, anatomy in present - masks.keys():  # at most the joint name of both sides
            assert pathology in pathologies and not re.search("left|right", anatomy), report
        assert not pathologies & {t.pathology for t in triplets if t.existence == 0}, report
        for (pathology, anatomy), mask in masks.items():
            stated = film.mentions.get(pathology) == 1
            counts["drawn"] += 1
            counts["stated"] += stated
            counts["read"] += stated and (pathology, anatomy) in present
            if pathology == "fracture" and stated:
                side = "left" if np.nonzero(mask)[1].mean() > 32 else "right"
                said = " ".join(s for s in re.split(r"\.\s", report) if re.search("rib", s))
                assert side in said.lower() and "intact" not in report, report
    assert counts["read"] >= 0.97 * counts["stated"]
    low, high = (0.05, 0.15) if world == "easy" else (0.2, 0.3)
    assert low < 1 - counts["stated"] / counts["drawn"] < high


def test_errors(tmp_path):
    with pytest.raises(InputError, match="no layout"):
        phantom.write("padchest", str(tmp_path / "new"), 2)
    (tmp_path / "note").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        phantom.write("mimic", str(tmp_path), 2)
