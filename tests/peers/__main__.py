"""Judge the attentions of other libraries, each library in an environment of its own, and write down what was found.

    python tests/peers [LIBRARY ...]        default: all of tests/peers/*.txt, one after another

For each the environment is made, the referee judges what it has ready-made of it, docs/findings.md gets the rows, and
the environment is removed.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FINDINGS = ROOT / "docs/findings.md"
COLUMNS = "| target | versions | feature | dtypes | what came | case |\n"  # of the table that is written
SECONDS = 300  # for one implementation at most: those that are interpreted are slow
NEEDED = ("numpy>=2.0", "threadpoolctl", "ml_dtypes")  # of funcmha
AFTER = {  # what is installed when the rest is: nothing is compiled, but torch is imported
    "flash-attn": ("--no-deps", "--no-build-isolation", "--no-binary", "flash-attn", "flash-attn==2.8.3.post2")
}
FEATURES = {"tinygrad": ("plain", "causal", "mask", "empty rows")}  # of what takes a minute a case; else all
SET = {
    "tinygrad": {"DEV": "PYTHON"},  # its interpreter: no compiler is needed
    "flash-attn": {"FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE", "FLASH_ATTENTION_FORCE_BUILD": "TRUE"},
}


def main(names: list[str]) -> None:
    sys.path.insert(0, str(ROOT))
    from funcmha.testing.conform.ready import READY

    for name in names or sorted(path.stem for path in HERE.glob("*.txt")):
        environment = os.environ | SET.get(name, {}) | {"PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        with tempfile.TemporaryDirectory(prefix=f"peers-{name}-") as folder:
            print(f"{name}: an environment", flush=True)
            python = install(name, Path(folder), environment)
            for target in (target for target in READY if target.partition(":")[0] == name):
                print(target, flush=True)
                write_down(target, judged(python, target, environment))


def install(name: str, folder: Path, environment: dict[str, str]) -> Path:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin/python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-r", HERE / f"{name}.txt", *NEEDED], check=True, env=environment)
    if name in AFTER:
        subprocess.run([*pip, *AFTER[name]], check=True, env=environment)
    return python


def judged(python: Path, target: str, environment: dict[str, str]) -> dict:
    """Its report. The exit status says whether all is right, which is no matter here."""
    features = [f"--feature={feature}" for feature in FEATURES.get(target.partition(":")[0], ())]
    command = [python, "-m", "funcmha", "conform", target, "--json", f"--seconds={SECONDS}", *features]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    begin = done.stdout.find("{\n")
    if begin < 0:
        sys.exit(f"{target}: {done.stdout[-2000:]}{done.stderr[-2000:]}")
    return json.loads(done.stdout[begin:])


def write_down(target: str, report: dict) -> None:
    """In place of the rows of this target that docs/findings.md has"""
    lines = FINDINGS.read_text().splitlines(keepends=True)
    mine = [i for i, line in enumerate(lines) if line.startswith(f"| `{target}`")]
    begin = lines.index(COLUMNS)
    at = mine[0] if mine else next(i for i in range(begin, len(lines)) if not lines[i].startswith("|"))
    kept = [line for i, line in enumerate(lines) if i not in mine]
    FINDINGS.write_text("".join([*kept[:at], *rows(target, report), *kept[at:]]))


def rows(target: str, report: dict) -> list[str]:
    """One for each feature in which something is wrong, and one for the rest"""
    versions = ", ".join(
        f"{name} {re.match(r'[0-9.]*[0-9]', version)[0]}" for name, version in report["versions"].items()
    )
    begin = f"| `{target}` | {versions} |"
    listed = [f"{begin} conventions | | {m['field']} is {m['measured']!r} | |\n" for m in report["mismatches"]]
    wrong: dict[str, list[dict]] = {}
    for dtype in dict.fromkeys(feature["dtype"] for feature in report["features"]):
        of_dtype = [feature for feature in report["features"] if feature["dtype"] == dtype]
        bad = [feature for feature in of_dtype if feature["verdict"] != "ok"]
        if bad and len(bad) == len(of_dtype):
            listed.append(f"{begin} all {len(bad)} features | {dtype} | {_told(bad[0])} |\n")
            continue
        for feature in bad:
            wrong.setdefault(feature["name"], []).append(feature)
    for name, features in wrong.items():
        dtypes = ", ".join(feature["dtype"] for feature in features)
        listed.append(f"{begin} {name} | {dtypes} | {_told(features[-1])} |\n")
    right = [feature for feature in report["features"] if feature["verdict"] == "ok"]
    dtypes = ", ".join(dict.fromkeys(feature["dtype"] for feature in right))
    features = len({feature["name"] for feature in right} - {*wrong})
    empty = f"; an empty row is {report['conventions']['empty_row']}"
    empty += f"; {report['left_out']} cases not run for time" if report["left_out"] else ""
    return [*listed, f"{begin} {features} features | {dtypes} | ok{_worst(right)}{empty} | |\n"]


def _told(feature: dict) -> str:
    """Its worst failure, with the guess at a cause, and the case"""
    worst = max(feature["failures"], key=_badness)
    quantities = ", ".join(dict.fromkeys(failure["quantity"] for failure in feature["failures"]))
    guess = f" ({worst['diagnosis']})" if worst["diagnosis"] else ""
    what = f"{quantities}: {worst['why'][:280]}{guess}".replace("|", "\\|")
    return f"{what} | `{worst['problem']}`, `--case {worst['case']}`"


def _badness(failure: dict) -> tuple[bool, float]:
    return failure["ratio"] is None, failure["ratio"] or 0.0


def _worst(features: list[dict]) -> str:
    worst: dict[str, float] = {}
    for feature in features:
        for name, ratio in feature["worst"].items():
            worst[name] = max(worst.get(name, 0.0), ratio)
    told = ", ".join(f"{name} {ratio:.2f}" for name, ratio in worst.items())
    return f": of the bound {told}" if told else ""


if __name__ == "__main__":
    main(sys.argv[1:])
