"""Check what `make dist` has built: what the two files contain, and that the wheel works without a clone.

    python -m tests.dist dist

The wheel is installed into a new environment without its dependencies; those (torch and numpy) are read from the
environment that runs this, through a .pth file, so that torch is not installed twice. That environment's own editable
flexpg is not found this way.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
IN_SDIST_ONLY = {"CHANGELOG.md", "CITATION.cff", "MANIFEST.in", "PKG-INFO", "README.md", "pyproject.toml", "setup.cfg"}
SMOKE_TEST = """
import sys
import flexpg
from flexpg.masks import group_block_mask

assert flexpg.__file__.startswith(sys.prefix), f"imported {flexpg.__file__} instead of the wheel"
mask = group_block_mask(prefix_lens=[300], suffix_lens=[[20, 30]])
assert mask.shape[-1] == 384, mask.shape
print(flexpg.__version__)
"""


def tracked_files() -> list[str]:
    """Return the paths of what is packaged, as they are in the repository."""
    command = ["git", "ls-files", "-z", "flexpg", "recipes"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, check=True, text=True).stdout.rstrip("\0").split("\0")


def check_wheel(path: Path) -> None:
    """Check that a wheel has every file of flexpg and recipes as it is in the repository, the license, and no more."""
    with zipfile.ZipFile(path) as wheel:
        contents = {name: wheel.read(name) for name in wheel.namelist()}
    metadata = {name.partition("/")[2] for name in contents if ".dist-info/" in name}
    assert {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"} <= metadata, metadata
    inside = {path: f"flexpg/{path}" if path.startswith("recipes/") else path for path in tracked_files()}
    expected = {inside[path]: (ROOT / path).read_bytes() for path in inside}
    assert {"flexpg/py.typed", "flexpg/recipes/configs/tiny_cpu.yaml", "flexpg/recipes/assets/README.md"} <= {*expected}
    packaged = {name: content for name, content in contents.items() if ".dist-info/" not in name}
    different = {name for name in packaged | expected if packaged.get(name) != expected.get(name)}
    assert not different, f"{path.name} differs from the repository in {sorted(different)}"


def check_sdist(path: Path) -> None:
    """Check that a source distribution has what a wheel is built from, and no tests, documentation or benchmarks."""
    with tarfile.open(path) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    names = {name for name in names if ".egg-info/" not in name}
    expected = {*tracked_files(), *IN_SDIST_ONLY, "LICENSE"}
    assert names == expected, f"{path.name} differs from the repository in {sorted(names ^ expected)}"


def smoke_test(wheel: Path, folder: Path) -> str:
    """Install a wheel into a new environment in an empty folder, use it, and return its version."""
    environment = folder / "env"
    venv.create(environment, with_pip=False)
    python = str(environment / "bin/python")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        result = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
        assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
        return result.stdout

    pip = [sys.executable, "-m", "pip", "-qq", "--python", python, "install"]
    run(*pip, "--no-deps", "--no-index", "--no-compile", str(wheel))
    site = sysconfig.get_path("purelib", vars={"base": str(environment)})
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    version = run(python, "-W", "error", "-c", SMOKE_TEST).strip()
    flexpg = str(environment / "bin/flexpg")
    assert run(flexpg, "--help").startswith("usage: flexpg ")
    assert run(flexpg, "cp", "grpo") == "recipes/__init__.py\nrecipes/grpo.py\n"
    assert (folder / "recipes/grpo.py").read_bytes() == (ROOT / "recipes/grpo.py").read_bytes()
    return version


def main() -> None:
    """Check the wheel and the source distribution of a folder, and print their sizes."""
    folder = Path(sys.argv[1])
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    with tempfile.TemporaryDirectory() as empty:
        version = smoke_test(wheel.resolve(), Path(empty))
    assert wheel.name == f"flexpg-{version}-py3-none-any.whl" and sdist.name == f"flexpg-{version}.tar.gz"
    for file in (wheel, sdist):
        print(f"{file.name:<36} {file.stat().st_size / 1000:7.0f} kB")


if __name__ == "__main__":
    main()
