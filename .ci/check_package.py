"""Build the distributions, look at what they hold, and use the wheel where the sources are not.

Run at the root of the repository by the Python of an environment with the extra `ci` and all
dependencies.
"""

import os
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path


def _run(*command, **options):
    subprocess.run([str(part) for part in command], check=True, **options)


def _check_contents(wheel: Path, source: Path) -> None:
    """The wheel holds the package, whole and alone; the source distribution, what git tracks."""
    tracked = subprocess.run(
        ["git", "ls-files"], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    package = {name for name in tracked if name.startswith("skdeq/")}
    assert "skdeq/py.typed" in package
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == package, f"{wheel.name}: {sorted(held ^ package)}"
    root = source.name.removesuffix(".tar.gz")
    with tarfile.open(source) as archive:
        held = {member.name.removeprefix(f"{root}/") for member in archive if member.isfile()}
    # But for what only serves work on the repository itself.
    wanted = {name for name in tracked if not name.startswith((".ci/", ".git"))}
    assert wanted <= held, f"{source.name} lacks {sorted(wanted - held)}"


def _environment_with(wheel: Path, folder: Path) -> Path:
    """Make an environment of the wheel and this one's dependencies; return its Python."""
    _run(sys.executable, "-m", "venv", "--without-pip", folder)
    python = folder / "bin" / "python"
    options = ("--quiet", "--no-deps", "--ignore-installed")
    _run(sys.executable, "-m", "pip", "--python", python, "install", *options, wheel)
    # A folder named in a .pth file comes last, and the .pth files in it do not count: among them
    # that of the development install.
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python


def _main() -> None:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        # The constraints hold for the isolated environment of the build, too.
        constrained = {**os.environ, "PIP_CONSTRAINT": os.path.abspath("constraints.txt")}
        build = (sys.executable, "-m", "build", "--outdir", work / "dist")
        _run(*build, env=constrained, stdout=subprocess.DEVNULL)
        (wheel,) = (work / "dist").glob("*.whl")
        (source,) = (work / "dist").glob("*.tar.gz")
        _run(sys.executable, "-m", "twine", "check", "--strict", wheel, source)
        _check_contents(wheel, source)
        python = _environment_with(wheel, work / "clean")
        _run(python, "-I", os.path.abspath(".ci/smoke_test.py"), work / "clean", cwd=work)


if __name__ == "__main__":
    _main()
