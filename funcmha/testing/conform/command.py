"""`python -m funcmha conform`: what it loads, runs and prints, and its exit status."""

import importlib
import importlib.util
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

from . import golden
from .cases import FEATURES, LARGE, Case, cases, slug
from .checking import EXIT, Report, check
from .html import as_html
from .implementation import DeclarationError, Implementation
from .ready import READY, ready
from .reproduction import reproduction
from .shrink import shrink
from .text import as_json, as_junit, nearer, told
from .verdicts import WRONG

Progress = Callable[[str], None]


def run(args: Namespace, progress: Progress) -> int:
    """The exit status: 0 all right, 1 wrong, 2 not as declared, 3 nothing could be run"""
    if args.target[0] == "diff" and len(args.target) == 3:
        given = [name for name in ("json", "junit", "html", "golden", "answers") if getattr(args, name)]
        if given:
            raise DeclarationError(f"diff prints one table: leave out --{given[0]}, or judge each target by itself")
        reports = [judged(load(target), args, progress) for target in args.target[1:]]
        progress("")
        print(nearer(*reports))
        return max((EXIT[report.status] for report in reports), default=0)
    if len(args.target) > 1:
        raise DeclarationError(f"one TARGET is judged at a time, or two after diff, got {' '.join(args.target)}")
    impl = load(args.target[0])
    if args.golden:
        print(f"{args.golden}: {golden.write(impl, args.golden, seed=args.seed, select=_selected(impl, args))} cases")
        return 0
    if args.answers:
        report = golden.judge(impl, args.answers, seed=args.seed, select=_selected(impl, args))
    else:
        report = judged(impl, args, progress)
    small = "" if args.json or args.answers else _smallest(report, args, progress)
    progress("")
    if args.junit:
        Path(args.junit).write_text(as_junit(report), encoding="utf-8")
    if args.html:
        progress("a picture of each failure")
        page = as_html(report, args.target[0], again=not args.answers)
        Path(args.html).write_text(page, encoding="utf-8")
        progress("")
    print(as_json(report) if args.json else told(report, small))
    return EXIT[report.status]


def _smallest(report: Report, args: Namespace, progress: Progress) -> str:
    """The first that is wrong, made small, as a script"""
    wrong = [row for f in report.features if f.verdict == WRONG for row in f.failures if row.verdict == WRONG]
    if not wrong:
        return ""
    row = next((row for row in wrong if row.quantity != "call"), wrong[0])
    progress(f"a small case of {row.case.feature}, {row.quantity}")
    return reproduction(report.implementation, shrink(report.implementation, row), args.target[0])


def judged(impl: Implementation, args: Namespace, progress: Progress) -> Report:
    """The report under what the command line says"""
    undeclared = [name for name in args.dtype or () if name not in impl.dtypes]
    if undeclared:
        raise DeclarationError(f"dtype {undeclared[0]} is not declared, but {', '.join(impl.dtypes)} are")
    changes: dict[str, Any] = {"dtypes": tuple(args.dtype)} if args.dtype else {}
    changes |= {"arithmetic": args.arithmetic} if args.arithmetic else {}
    impl = replace(impl, **changes) if changes else impl
    options = {"seed": args.seed, "large": _large(args), "strict": args.strict, "seconds": float(args.seconds)}
    return check(impl, select=_selected(impl, args), progress=progress, **options)


def _large(args: Namespace) -> bool:
    return args.sizes == "large" or "large" in (args.feature or ())


def _selected(impl: Implementation, args: Namespace) -> Callable[[Case], bool]:
    """What --feature and --case name; DeclarationError for a name that nothing has, with those that there are"""
    known = {slug(name) for name in FEATURES | LARGE}
    unknown = [name for name in args.feature or () if slug(name) not in known]
    if unknown:
        raise DeclarationError(f"there is no feature {unknown[0]!r}: there are {', '.join(FEATURES | LARGE)}")
    listed = [case.name for case, _ in cases(impl, seed=args.seed, large=_large(args))] if args.case else []
    for name in args.case or ():
        if name not in listed:
            feature = name.partition("/")[0]
            near = [other for other in listed if other.partition("/")[0] == feature] or listed
            raise DeclarationError(f"there is no case {name!r} with --seed {args.seed}: there are {', '.join(near)}")

    def select(case: Case) -> bool:
        named = not args.case or case.name in args.case
        return named and (not args.feature or slug(case.feature) in map(slug, args.feature))

    return select


def load(target: str) -> Implementation:
    """The implementation of FILE.py:name, module:name or a ready-made name; DeclarationError where there is none"""
    if target in READY:
        made: Implementation = _made(target, lambda: ready(target))
        return made
    place, _, name = target.rpartition(":")
    if not place or not name.isidentifier():
        known = ", ".join(READY)
        raise DeclarationError(f"TARGET must be FILE.py:name, module:name, or one of {known}, got {target!r}")
    module = _made(target, lambda: _module(place))
    found = getattr(module, name, None)
    if isinstance(found, Implementation):
        return found
    if found is None and ":" not in place and not place.endswith(".py") and importlib.util.find_spec(place) is None:
        raise DeclarationError(f"there is no ready-made {target!r}: there are {', '.join(READY)}")
    there = ", ".join(n for n, value in vars(module).items() if isinstance(value, Implementation))
    got = f"got {type(found).__name__}" if hasattr(module, name) else f"and {place} has no {name!r}"
    raise DeclarationError(f"{target} must be an Implementation, {got}; there {f'are {there}' if there else 'is none'}")


def _made(target: str, make: Callable[[], Any]) -> Any:
    """What it makes, or a DeclarationError that says why it cannot"""
    try:
        return make()
    except DeclarationError:
        raise
    except Exception as error:  # of a file of the user, or a library that is not installed
        raise DeclarationError(f"{target} cannot be loaded: {type(error).__name__}: {error}") from error


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place)
    if not path.exists():
        raise DeclarationError(f"there is no file {place}")
    module = sys.modules[path.stem] = ModuleType(path.stem)
    module.__file__ = str(path)
    sys.path.insert(0, str(path.parent))
    SourceFileLoader(path.stem, str(path)).exec_module(module)
    return module
