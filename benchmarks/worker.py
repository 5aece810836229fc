"""A peer in a process of its own: its threads, its libraries and its crashes are not JAX's.

    parent                      worker (python -m benchmarks.worker NAME FOLDER)
    Worker(name, folder)   ->   builds the peer, saves its float result on the first calibration image
                           <-   ready | failed MESSAGE
    give(x)                     (x waits in the folder)
    result n               ->   runs on the batch of n, saves the logits;  <- done
    time n                 ->   runs once;                                 <- seconds

One line a message, arrays as .npy in the folder. A time is taken in the worker around the call alone.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks import peers_onnx


class WorkerFailed(Exception):
    """The worker could not build its model, or died; the message holds its last words."""


class Worker:
    """The parent's end.

    Args:
      name: a key of `peers_onnx.BUILDERS`.
      folder: as the builders want it; also where arrays are exchanged.

    Raises:
      WorkerFailed: the peer could not be built.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self._name, self._folder = name, folder
        self._log = folder / f"{name}.log"
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", name, str(folder)],
                cwd=Path(__file__).resolve().parent.parent,
                # A benchmark reports to nobody: NNCF and OpenVINO send usage data otherwise.
                env={**os.environ, "NNCF_CI": "1", "CI": "true"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
            )
        self._answer()

    def _answer(self) -> str:
        line = self._process.stdout.readline().strip()
        if not line or line.startswith("failed"):
            self.close()
            last = [t for t in self._log.read_text().splitlines() if t.strip()][-1:]
            raise WorkerFailed(line.partition(" ")[2] or f"its worker died: {' '.join(last)}")
        return line

    def _ask(self, question: str) -> str:
        # A worker that died is noticed by the answer that does not come.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{question}\n")
        return self._answer()

    def float_result(self) -> np.ndarray:
        """Logits of the float model, before any quantization, for the first calibration image."""
        return np.load(self._folder / f"{self._name}-check.npy")

    def give(self, x: np.ndarray) -> None:
        """Leaves a batch where the worker finds it."""
        np.save(self._folder / f"x{len(x)}.npy", x)

    def result(self, batch: int) -> np.ndarray:
        """Logits of the batch of this size."""
        self._ask(f"result {batch}")
        return np.load(self._folder / f"{self._name}-result.npy")

    def seconds(self, batch: int) -> float:
        """Time of one call on the batch of this size."""
        return float(self._ask(f"time {batch}"))

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


def serve(name: str, folder: Path) -> None:
    """The worker's end: answers on what was standard output, which is free for what libraries print."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    make_float, make = peers_onnx.BUILDERS[name]
    try:
        first = np.load(folder / "calibration.npy")[:1]
        np.save(folder / f"{name}-check.npy", make_float(folder)(first))
        run = make(folder)
    except Exception as error:
        print(f"failed {type(error).__name__}: {' '.join(str(error).split())[:300]}", file=answers)
        raise
    print("ready", file=answers)
    batches: dict[str, np.ndarray] = {}
    for line in sys.stdin:
        question, batch = line.split()
        if batch not in batches:
            batches[batch] = np.load(folder / f"x{batch}.npy")
        if question == "result":
            np.save(folder / f"{name}-result.npy", run(batches[batch]))
            print("done", file=answers)
        else:
            start = time.perf_counter()
            run(batches[batch])
            print(time.perf_counter() - start, file=answers)


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]))
