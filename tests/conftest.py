"""What several test files share: a folder of small phantoms, drawn once per test session."""
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also for the processes that tests start
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """160 phantoms of 32 pixels in MIMIC-CXR-JPG's layout."""
    import phantom
    root = tmp_path_factory.mktemp("data") / "phantoms"
    phantom.write("mimic", str(root), 160, seed=1, size=32, workers=1)
    return root
