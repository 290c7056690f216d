#!/usr/bin/env -S uv run --script
# /// script
# dependencies = ["nox>=2025.10.14"]
# ///
"""`make matrix`: the wheel, away from the repository, in each Python with the oldest and the newest NumPy

Without PyTorch and JAX: tests that need them are left out, and the first lines of pytest say which.
"""

from pathlib import Path

import nox

ROOT = Path(__file__).parent
OLDEST = {"3.11": "2.0", "3.12": "2.0", "3.13": "2.1"}  # 2.0 has no wheels for 3.13
NEEDS = (
    "array-api-compat",
    "array-api-strict",
    "hypothesis",
    "ml_dtypes",
    "mpmath",
    "optree",
    "pytest",
    "pytest-xdist",
)
APART = ("conform_command", "docs", "examples", "interop")  # of pages, scripts and adaptors for PyTorch and JAX

nox.needs_version = ">=2025.10.14"
nox.options.default_venv_backend = "venv"
nox.options.stop_on_first_error = False


@nox.session
def build(session: nox.Session) -> None:
    """The sdist, and the wheel from it"""
    for old in ROOT.glob("dist/*"):
        old.unlink()
    session.install("build")
    session.run("python", "-m", "build", "--outdir", "dist", ".")


@nox.session(python=list(OLDEST))
@nox.parametrize("numpy", ["oldest", "newest"])
def core(session: nox.Session, numpy: str) -> None:
    """The core suite, in a folder of its own"""
    (wheel,) = ROOT.glob("dist/*.whl")
    wanted = f"numpy=={OLDEST[str(session.python)]}.*" if numpy == "oldest" else "numpy"
    session.install(str(wheel), wanted, *NEEDS)
    session.chdir(session.create_tmp())
    apart = [f"--ignore={ROOT / 'tests' / f'test_{name}.py'}" for name in APART]
    options = ["-q", "-n", "auto", "-m", "not slow", "-p", "no:cacheprovider", *apart]
    session.run("python", "-m", "pytest", *options, str(ROOT / "tests"))


if __name__ == "__main__":
    nox.main()
