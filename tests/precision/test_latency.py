"""Layers timed alone on this machine. How long they take is not said here, only that it is a time, and kept."""

import numpy as np
from mixed import BATCHES, LAYERS, STEM, Q, V, small

import qcompiler as qc
from qcompiler import candidates
from qcompiler.passes import observe
from qcompiler.precision import decide, latency, layers

ALL = candidates.named(("int4", "int8", "int16", "float32"))


def _layers():
    return layers.layers_of(observe.without_observers(small().program))


def test_a_layer_alone_is_integers_in_and_out():
    stem = _layers()[0]
    program = latency.alone(stem, ALL["int8"], qc.Recipe())
    assert [a.dtype for a in program.input_avals] == [np.int8]
    codes = np.zeros((8, 6, 6, 2), np.int8)
    (y,) = program(codes)
    assert y.dtype == np.int8 and y.shape == (8, 6, 6, 8)
    (real,) = latency.alone(stem, ALL["float32"], qc.Recipe())(BATCHES[0])
    assert real.dtype == np.float32


def test_times_are_kept_by_shape(monkeypatch):
    timed = []
    seconds = iter(np.linspace(1e-3, 2e-3, 100))

    def interleaved(contenders, rounds):
        timed.extend(contenders)
        return {name: [next(seconds)] * rounds if name else [1e-4] * rounds for name in contenders}

    monkeypatch.setattr(latency.timing, "interleaved", interleaved)
    monkeypatch.setattr(latency, "_known", {})
    found = latency.measure(_layers(), ALL, qc.Recipe(), rounds=3)
    assert found.table.keys() == set(LAYERS) and found.noise == 0.0
    # q and v are of one shape, in every candidate.
    assert found.table[Q] == found.table[V] != found.table[STEM]
    first, timed[:] = list(timed), []
    again = latency.measure(_layers(), ALL, qc.Recipe(), rounds=3)
    assert first.count("int8") < len(LAYERS) and again.table == found.table
    assert "int8" not in timed


def test_a_latency_budget_is_kept_to():
    """By the times that were measured, whatever they are: half way between the least and what all floats take."""
    program = observe.without_observers(small().program)
    times = latency.measure(_layers(), ALL, qc.Recipe(), rounds=3)
    assert all(t >= 0 for row in times.table.values() for t in row.values()) and 0 <= times.noise
    sensitivity = small().sensitivity(candidates=tuple(ALL), metric="nsr")
    free = decide.problem_of(program, qc.Precision(tuple(ALL), latency_ms=1e9), sensitivity.table(), times)
    least, most = free.minimum("latency_ms"), free.cost(dict.fromkeys(LAYERS, "float32"), "latency_ms")
    budget = max((least + most) / 2, 1.01 * least)
    found = decide.decide(program, qc.Precision(tuple(ALL), latency_ms=budget, repair_steps=2), sensitivity, times)
    assert found.totals["latency_ms"] <= budget and found.noise == times.noise
    assert "each measured to" in str(found) or times.noise == 0
