"""Proves that every label file is read as its publisher means it: what `write` draws `read` gives
back; the other published variants (a few lines each) and the real label files give the published
counts; a row that cannot be used is counted and costs nothing else."""
import gzip
import json
import shutil
import tarfile
import types
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cli import InputError
from formats import (BLANK, PATHOLOGY, UNKNOWN, Mask, chexpert, covid_chestxray, covidx, csv_rows,
                     find, mimic, nih, openi, roco, rsna, siim, write_csv, write_text)
from text import PATHOLOGIES

REAL = Path(__file__).resolve().parent.parent.parent / "shared" / "real"
real = pytest.mark.skipif(not REAL.exists(), reason="../shared/real is not here")


def read(form, root, views="all", labels="chexpert"):
    """(label names, {id: item}, problems)"""
    names, items, problems = form.read(str(root), views, labels)
    assert len({item.id for item in items}) == len(items)
    return names, {item.id: item for item in items}, problems


def present(names, item):
    return {name for name, value in zip(names, item.labels) if value == 1}


# ------------------------------------------------------------------------------ write, then read

FINDINGS = [("pneumonia", "left_lower_lung"), ("pneumothorax", "right_apical_lung"),
            ("covid-19", "lung_bases"), ("effusion", "left_pleural"), ("opacity", "left_mid_lung")]


def plan(count=20, size=32):
    """Films with what phantom.plan gives: two visits per patient, a tenth validate, a tenth test."""
    splits = ["train"] * 8 + ["validate", "test"]
    return [types.SimpleNamespace(
        index=i, patient=i // 2, visit=i % 2, split=splits[i // 2 % 10], age=40 + i, sex="F",
        view="PA", size=size, mode="L", shape=None, report=None, bits=None, lungs=None, person=None,
        uids=None, keep_masks=False, sure=None, among=None) for i in range(count)]


def draw(films):
    """Blank films with the findings of FINDINGS in turn; every sixth has none."""
    for f in films:
        mask = np.zeros((f.size, f.size), bool)
        mask[8:16, 4:20] = True
        f.findings = [types.SimpleNamespace(pathology=pathology, anatomy=anatomy, mask=mask,
                                            box=(4.0, 8.0, 16.0, 8.0))
                      for pathology, anatomy in FINDINGS[f.index % 6:f.index % 6 + 1]]
        f.mentions = {found.pathology: 1 for found in f.findings} | {"fracture": 0}
        f.sections = {"FINDINGS": "Something & nothing.", "INDICATION": "Cough."}
        image = Image.new(f.mode, f.shape[::-1] if f.shape else (f.size, f.size))
        for path in filter(None, (f.image, f.report, f.bits, f.lungs)):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        if f.image.endswith(".dcm"):
            rsna.save_dicom(f, image)
        else:
            image.save(f.image)
    return films


@pytest.fixture
def drawn(tmp_path, request):
    """(format, root, films) of a layout filled with 20 films."""
    form, films = request.param, plan()
    form.write(str(tmp_path), films, draw)
    root = tmp_path / "CheXpert-v1.0-small" if form is chexpert else tmp_path
    return form, root, films
