"""Proves that the README keeps its word where a machine can tell: its commands parse, its links hit
the equations, its line counts are true, and its new data set works as printed.

    python -m pytest tests/test_readme.py
"""
import importlib
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data

REPO = Path(__file__).resolve().parent.parent
TEXT = (REPO / "README.md").read_text()
VALUES = {"task": "classification", "seed": "0", "init": "random", "ratio": "0.1", "S": "0"}
COMMANDS = sorted({f"{name} {rest}".strip() for name, rest in
                   re.findall(r"(?:python|\d) (\w+)\.py\b([^`;|&#\n]*)", TEXT)})


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command):
    name, *argv = shlex.split(command)
    # of a loop's variables, those that hold one value; the others hold several flags or none
    argv = [VALUES.get(a.strip("$"), a) for a in argv if a != "..." and (
        not a.startswith("$") or a.strip("$") in VALUES)]
    if argv:
        importlib.import_module(name).parse_args(argv)
    assert (REPO / f"{name}.py").exists()


def test_commands_were_found():
    assert len(COMMANDS) > 20
    assert {c.split()[0] for c in COMMANDS} == {f.stem for f in REPO.glob("*.py")} - {"losses"}


def test_equations_are_where_the_links_point():
    links = re.findall(r"\| \[(\d)\]\((\w+\.py)#L(\d+)\)", TEXT)
    assert [int(number) for number, _, _ in links] == [1, 2, 3, 4, 5, 6, 7]
    for number, file, line in links:
        assert f"Eq. {number}" in (REPO / file).read_text().splitlines()[int(line) - 1]


def test_other_links_and_line_counts():
    for target in re.findall(r"\]\(([^)#:]+)[)#]", TEXT):
        assert (REPO / target).exists(), target
    counts = re.findall(r"\| \[(\w+\.py)\]\(\1\) \| (\d+) \|", TEXT)
    assert len(counts) == len(list(REPO.glob("*.py")))
    for file, lines in counts:
        assert int(lines) == len((REPO / file).read_text().splitlines()), file


def test_the_new_data_set(tmp_path, monkeypatch):
    """The example under "How to change it", pasted."""
    reader = re.search(r"(  def read_mine.*?)\n\n", TEXT, re.S)[1]
    source = re.search(r'"mine": Source.*?,\n  ```', TEXT, re.S)[0].removesuffix("```")
    space = dict(vars(data))
    exec(reader.replace("\n  ", "\n").strip(), space)
    monkeypatch.setitem(data.SOURCES, "mine", eval("{" + source + "}", space)["mine"])
    rows = ["image,patient,report,pneumonia"]
    for k in range(30):
        Image.fromarray(np.full((40, 40), 8 * k, np.uint8)).save(tmp_path / f"{k}.png")
        rows.append(f"{k}.png,p{k},Right pleural effusion.,{k % 2}")
    (tmp_path / "index.csv").write_text("\n".join(rows) + "\n")
    table = data.load("mine", tmp_path, size=32, cache_dir=tmp_path / "cache", workers=0)
    assert len(table.rows("all")) == 30 and 18 <= len(table.rows("train")) <= 29  # hashed patients
    assert table.labels.sum() == 15 and list(table.label_names) == ["Pneumonia"]
    assert table.existence([0], ["effusion"], ["right_pleural"]).item() == 1
