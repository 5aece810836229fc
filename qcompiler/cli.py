"""The command line: `digits` trains and compares a small model, `show` prints a program, `primitives` the rules, and
`recommend` a recipe."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence

from qcompiler import recipe
from qcompiler.errors import QuantizationError, SerializationError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="qcompiler", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    digits = commands.add_parser(
        "digits", help="train a small ResNet on scikit-learn's digits and compile it to integers"
    )
    digits.add_argument("--recipe", default="default", choices=sorted(recipe.NAMED))
    digits.add_argument("--epochs", type=int, default=20)
    digits.add_argument("--seed", type=int, default=0)
    digits.add_argument("--batch", type=int, default=64, help="images per call when timing")
    digits.add_argument("--dump", default="dumps/digits", help="folder for the program after every pass")
    show = commands.add_parser("show", help="print a saved program, such as a reproducer")
    show.add_argument("program")
    commands.add_parser("primitives", help="print how each primitive becomes integers: docs/primitives.md")
    recommend = commands.add_parser("recommend", help="advise a recipe for a saved program, as it was traced")
    recommend.add_argument("program", help="file of qcompiler.ir.serialize.save(qc.trace(...).program, FILE)")
    recommend.add_argument("--latency", action="store_true", help="speed goes before accuracy")
    recommend.add_argument("--accuracy", nargs="?", type=float, const=True, default=False, metavar="PERCENT")
    recommend.add_argument("--size", nargs="?", type=int, const=True, default=False, metavar="BYTES")
    recommend.add_argument("--save", metavar="FILE", help="write the recipe as JSON")
    options = parser.parse_args(arguments)
    if options.command == "primitives":
        from qcompiler.debug import primitives

        print(primitives.document(), end="")
        return 0
    if options.command == "show":
        return _show(options.program)
    return _recommend(options) if options.command == "recommend" else _digits(options)


def _recommend(options: argparse.Namespace) -> int:
    from qcompiler import strategy
    from qcompiler.ir import serialize

    try:
        program = serialize.load(options.program)
        if program.stage != "trace":
            raise QuantizationError(f"{options.program} is a program after {program.stage}; a traced one is needed")
        constraints = strategy.Constraints(options.latency, options.accuracy, options.size)
        found = strategy.advise(program, constraints)
        if options.save:
            found.recipe.save(options.save)
    except (QuantizationError, OSError) as error:
        print(f"qcompiler: {error}", file=sys.stderr)
        return 1
    print(found)
    return 0


def _show(path: str) -> int:
    from qcompiler import ops  # noqa: F401 - registers the primitives that a file may hold
    from qcompiler.ir import serialize

    try:
        print(serialize.load(path).text(), end="")
    except (SerializationError, OSError) as error:
        print(f"qcompiler: {error}", file=sys.stderr)
        return 1
    return 0


def _digits(options: argparse.Namespace) -> int:
    import jax
    import numpy as np

    import qcompiler as qc
    from qcompiler.debug import timing
    from qcompiler.models.digits import train_digits_resnet

    print(f"jax {jax.__version__} on {jax.default_backend()}, {jax.device_count()} device(s)")
    start = time.perf_counter()
    model, data = train_digits_resnet(options.seed, epochs=options.epochs)
    print(f"trained a ResNet on {len(data.train.images)} digits in {time.perf_counter() - start:.0f} s")
    start = time.perf_counter()
    qmodel = qc.quantize(model, [data.calibration.images], recipe=options.recipe, dump=options.dump)
    print(f"quantized with {len(data.calibration.images)} calibration images in {time.perf_counter() - start:.0f} s\n")

    images, labels = data.test.images, np.asarray(data.test.labels)
    correct = {
        name: int(np.sum(np.argmax(np.asarray(predict(images)), -1) == labels))
        for name, predict in (("float32", qmodel.float), ("int8", qmodel))
    }
    batch = jax.numpy.asarray(images[: options.batch])
    times = timing.interleaved({"float32": lambda: qmodel.float(batch), "int8": lambda: qmodel(batch)})
    report = qmodel.report
    rows = [
        ("test images right", *(f"{correct[n]} of {len(labels)}" for n in correct)),
        ("accuracy", *(f"{correct[n] / len(labels):.2%}" for n in correct)),
        (f"ms per {len(batch)} images", *(f"{1e3 * statistics.median(times[n]):.2f}" for n in times)),
        ("weight bytes", f"{report.float_weight_bytes:,}", f"{report.weight_bytes:,}"),
    ]
    print(f"{'':<22}{'float32, jax.jit':>20}{'int8':>20}")
    for name, left, right in rows:
        print(f"{name:<22}{left:>20}{right:>20}")
    ratio = timing.speedup(times["float32"], times["int8"])
    print(f"\nint8 is {ratio:.2f} times as fast (median of {len(times['int8'])} interleaved runs)\n")
    print(report)
    return 0 if correct["float32"] - correct["int8"] <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
