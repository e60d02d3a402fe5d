"""Wheel and sdist, built from the tree, install in an empty environment and bring all that the program reads."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SUFFIXES = {".py", ".typed", ".c", ".h", ".j2", ".css", ".md", ".txt", ".gguf"}


def said(*words: object, **environment: str) -> str:
    """Runs a program away from the tree and returns what it says; fails with its errors."""
    ran = subprocess.run(
        [*map(str, words)], cwd="/", env=os.environ | environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the sdist, built by the backend that pyproject.toml pins."""
    folder = tmp_path_factory.mktemp("built")
    needed = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    said(sys.executable, "-m", "pip", "install", "-q", "--target", folder / "backend", *needed)
    code = f"import os; os.chdir({str(ROOT)!r}); from hatchling.cli import hatchling; hatchling()"
    said(sys.executable, "-c", code, "build", "-d", folder / "dist", PYTHONPATH=str(folder / "backend"))
    return folder / "dist"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["*.whl", "*.tar.gz"])
def test_it_installs_in_an_empty_environment(built: Path, tmp_path: Path, kind: str) -> None:
    [package] = built.glob(kind)
    venv.create(tmp_path / "empty")
    python = tmp_path / "empty" / "bin" / "python"
    said(sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", package)
    site = Path(said(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))  # behind what was installed here

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert said(python.with_name("cerebellum"), "--version") == f"cerebellum, version {version}\n"
    assert Path(said(python, "-c", "import cerebellum; print(cerebellum.__file__)").strip()).is_relative_to(
        site
    )
    tracked = said("git", "-C", ROOT, "ls-files", "cerebellum").splitlines()
    wanted = [name for name in tracked if Path(name).suffix in SUFFIXES]
    assert len(wanted) > 100 and [name for name in wanted if not (site / name).exists()] == []
