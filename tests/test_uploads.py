import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llava_app.ui.uploads import UNFINISHED, Uploads
from tests.serving import ROOT


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # set back afterwards


def folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir())


def write(folder: Path, name: str, *, age: float) -> Path:
    path = folder / name / "file.png"
    path.parent.mkdir()
    path.write_bytes(bytes(100))
    os.utime(path, (time.time() - age,) * 2)
    return path


DIES = """
import os, sys
from pathlib import Path
from llava_app.ui.uploads import Uploads
(Uploads(Path(sys.argv[1])).folder / "file").write_bytes(bytes(100))
os._exit(9)
"""


def test_the_folder_of_a_process_that_died_is_removed_at_once_and_that_of_another_page_stays(tmp_path: Path) -> None:
    other = Uploads(tmp_path)
    for _ in range(2):
        subprocess.run([sys.executable, "-c", DIES, str(tmp_path)], cwd=ROOT, check=False)
    assert len(folders(tmp_path)) == 2  # the second to die removed what the first had left
    own = Uploads(tmp_path)
    assert folders(tmp_path) == sorted([other.folder, own.folder])
    assert os.environ["GRADIO_TEMP_DIR"] == str(own.folder)
    own.remove(), other.remove()
    assert list(tmp_path.iterdir()) == []


def test_the_oldest_uploads_go_first_and_what_the_page_shows_itself_stays(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path, most_bytes=250)
    icon = write(uploads.folder, "icon", age=1000)
    uploads.settle()
    files = [write(uploads.folder, str(age), age=age) for age in (30, 20, 10, 0)]
    uploads.bound()
    assert [path.exists() for path in (icon, *files)] == [True, False, False, True, True]


def test_what_is_left_of_an_upload_that_broke_off_goes_and_one_that_goes_on_stays(tmp_path: Path) -> None:
    uploads = Uploads(tmp_path)
    going_on, broken = uploads.folder / "tmp1", uploads.folder / "tmp2"
    for path in (going_on, broken):
        path.write_bytes(bytes(100))
    os.utime(broken, (time.time() - UNFINISHED - 1,) * 2)
    whole = write(uploads.folder, "whole", age=UNFINISHED + 1)
    uploads.bound()
    assert [path.exists() for path in (going_on, broken, whole)] == [True, False, True]
