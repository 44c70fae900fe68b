"""Proves that the README keeps its word where a machine can tell: its commands parse, its links are
alive, its line counts are true, and its table of departures is train.py's.

    python -m pytest tests/test_readme.py
"""
import importlib
import re
import shlex

import pytest

import train
from conftest import ROOT

TEXT = (ROOT / "README.md").read_text() + (ROOT / "RESULTS.md").read_text()
VALUES = {"$task": "classification", "$seed": "0", "$s": "0"}  # of the variables of loops
COMMANDS = sorted({f"{name} {rest}".strip() for name, rest in
                   re.findall(r"(?:python|\d) (\w+)\.py\b([^`;|&#\n]*)", TEXT)})


@pytest.mark.parametrize("command", COMMANDS)
def test_command_parses(command):
    name, *argv = shlex.split(command)
    argv = [VALUES.get(word, word) for word in argv if word != "..." and "=" not in word]
    argv = [word.replace("$s", "0").replace("$seed", "0") for word in argv]
    importlib.import_module(name).parse_args(argv)


def test_links_and_line_counts():
    assert len(COMMANDS) > 15
    for target in re.findall(r"\]\(([^)#:]+)[)#]", TEXT):
        assert (ROOT / target).exists(), target
    counts = re.findall(r"\| \[(\w+\.py)\]\(\1\) \| (\d+) \|", TEXT)
    assert len(counts) == 7
    for file, lines in counts:
        assert int(lines) == len((ROOT / file).read_text().splitlines()), file


def test_departures_are_those_of_the_code():
    rows = re.findall(r"^\| `--([\w-]+)` \| (\S+) \| (\S+) \| (\S+) \|", TEXT, re.M)
    table = {flag.replace("-", "_"): tuple(cells) for flag, *cells in rows}
    assert table == {flag: tuple(str(v) for v in row) for flag, row in train.RECIPES.items()}


def test_no_file_is_too_long():
    """Nobody reads a file of more than 400 lines in one sitting."""
    for path in [*ROOT.glob("*.py"), *ROOT.glob("formats/*.py"), *ROOT.glob("tests/*.py")]:
        lines = path.read_text().splitlines()
        assert len(lines) <= 400 and max(map(len, lines)) <= 100, path
