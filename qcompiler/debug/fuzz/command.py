"""`python -m qcompiler.debug.fuzz`: many programs, one after the other or in processes, and saved programs again."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from qcompiler.debug.fuzz.cases import RECIPES, Case
from qcompiler.debug.fuzz.checks import CheckFailed
from qcompiler.debug.fuzz.generator import random_case
from qcompiler.debug.fuzz.reproducer import load, save
from qcompiler.debug.fuzz.running import run_case
from qcompiler.debug.fuzz.shrinking import shrink
from qcompiler.debug.progress import ProgressBar
from qcompiler.errors import SerializationError

#: Programs that a process checks before it reports and the state is written.
CHUNK = 20
#: Chunks after which a process is replaced: compiled programs stay in memory.
CHUNKS_PER_PROCESS = 6


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the outcome of a run; a run resumes only with the same."""

    seed: int
    steps: int | None
    recipe: str | None
    thorough_every: int
    shrink_tries: int
    save: str


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the number of programs that failed."""
    arguments = _parser().parse_args(argv)
    if arguments.replay:
        return sum(_replay(path) for path in arguments.replay)
    settings = Settings(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(Settings)})
    state = State(arguments.resume, settings)
    todo = [first for first in range(0, arguments.count, CHUNK) if not state.has(first, arguments.count)]
    start, bar = time.perf_counter(), ProgressBar("programs", arguments.count)
    for first, counts in _run(settings, arguments.count, todo, arguments.jobs):
        state.add(first, counts)
        total = state.total
        bar.update(total["programs"], f"{total['failed']} failed")
    bar.close()
    total = state.total
    print(
        f"{total['programs']} programs ({total['thorough']} of them thoroughly), {total['failed']} failed, "
        f"{total['refused']} refused for overflow; {total['regions']} regions, {total['elements']} elements, "
        f"{total['off_by_one']} of them one step from the simulation; {time.perf_counter() - start:.0f} s"
    )
    return total["failed"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m qcompiler.debug.fuzz",
        description="Random programs through the whole compiler, their integers checked against the reference.",
    )
    parser.add_argument("--count", type=int, default=100, help="number of programs (default 100)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first; the others follow")
    parser.add_argument("--steps", type=int, help="steps of a program (default: 1 to 12, by the seed)")
    parser.add_argument("--recipe", choices=list(RECIPES), help="default: all in turn")
    parser.add_argument(
        "--thorough-every",
        type=int,
        default=20,
        metavar="K",
        help="every K-th seed is checked thoroughly: full optimization, and the simulation by JAX too (default 20; "
        "0: none)",
    )
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1: this one)")
    parser.add_argument("--resume", metavar="FILE", help="keep the counts there, and go on where they end")
    parser.add_argument("--save", default="fuzz-failures", metavar="DIR", help="where failing programs are saved")
    parser.add_argument("--shrink-tries", type=int, default=200, help="per failing program; 0: not shrunk")
    parser.add_argument("--replay", nargs="+", metavar="FILE", help="run saved programs instead")
    return parser


def _run(
    settings: Settings, count: int, todo: Sequence[int], jobs: int
) -> Iterator[tuple[int, collections.Counter[str]]]:
    """(first program, counts) of every chunk, as they come."""
    arguments = [(settings, first, min(count, first + CHUNK)) for first in todo]
    if jobs == 1:
        for argument in arguments:
            yield argument[1], _run_chunk(*argument)
        return
    # Not forked: JAX has threads.
    context = multiprocessing.get_context("spawn")
    # A ProcessPoolExecutor of CPython 3.11 hangs when it replaces a process that has done its share.
    with context.Pool(jobs, maxtasksperchild=CHUNKS_PER_PROCESS) as pool:
        yield from pool.imap_unordered(_run_numbered, arguments)


def _run_numbered(argument: tuple[Settings, int, int]) -> tuple[int, collections.Counter[str]]:
    return argument[1], _run_chunk(*argument)


def _run_chunk(settings: Settings, first: int, end: int) -> collections.Counter[str]:
    """Checks the programs number `first` to `end - 1`; failures are printed and saved here."""
    counts: collections.Counter[str] = collections.Counter()
    for seed in range(settings.seed + first, settings.seed + end):
        thorough = settings.thorough_every > 0 and seed % settings.thorough_every == 0
        case = random_case(seed, settings.steps, settings.recipe, thorough=thorough)
        counts.update(programs=1, thorough=int(thorough))
        try:
            found = run_case(case)
        except CheckFailed as failure:
            counts["failed"] += 1
            _report(case, failure, settings, f"seed-{seed}")
            continue
        if found is None:
            counts["refused"] += 1
        else:
            counts.update(regions=found.regions, elements=found.elements, off_by_one=found.off_by_one)
    return counts


def _report(case: Case, failure: CheckFailed, settings: Settings, name: str) -> None:
    case, failure = shrink(case, failure, settings.shrink_tries)
    path = save(case, Path(settings.save) / name, failure.promise)
    print(f"FAILED {failure}\n{case}\npython -m qcompiler.debug.fuzz --replay {path}\n", file=sys.stderr, flush=True)


def _replay(path: str) -> int:
    """Runs a saved program; 1 if it fails."""
    case, promise = load(path)
    print(case)
    try:
        found = run_case(case)
    except CheckFailed as failure:
        same = "as it was saved" if failure.promise == promise else f"otherwise than it was saved: {promise}"
        print(f"FAILED {failure} ({same})", file=sys.stderr)
        return 1
    print("refused for overflow" if found is None else f"passed; it was saved for: {promise}")
    return 0


class State:
    """The counts of every chunk that is done, in a file if there is one."""

    def __init__(self, path: str | None, settings: Settings) -> None:
        self._path = Path(path) if path else None
        self._settings = dataclasses.asdict(settings)
        self.chunks: dict[str, dict[str, int]] = {}
        if self._path and self._path.exists():
            try:
                held = json.loads(self._path.read_text())
                known, self.chunks = held["settings"], held["chunks"]
            except (ValueError, KeyError, TypeError) as error:
                raise SerializationError(f"{path} is no state of the fuzzer: {error}; remove it to begin") from error
            if known != self._settings:
                raise SerializationError(f"{path} is of a run with {known}; repeat these settings, or remove it")

    def has(self, first: int, count: int) -> bool:
        """Whether the chunk that begins with a program is done, as far as it goes among `count`."""
        return self.chunks.get(str(first), {}).get("programs", 0) >= min(CHUNK, count - first)

    def add(self, first: int, counts: collections.Counter[str]) -> None:
        """Writes a new file and puts it in the place of the old one, so that an interruption leaves one of the two."""
        self.chunks[str(first)] = dict(counts)
        if self._path:
            new = self._path.with_suffix(".new")
            new.write_text(json.dumps({"settings": self._settings, "chunks": self.chunks}))
            os.replace(new, self._path)

    @property
    def total(self) -> collections.Counter[str]:
        """Of all chunks together."""
        return sum(map(collections.Counter, self.chunks.values()), collections.Counter())
