"""`python -m qcompiler.debug.fuzz`."""

import json

import pytest

from qcompiler.debug import fuzz
from qcompiler.debug.fuzz import command
from qcompiler.errors import SerializationError


@pytest.fixture
def checked(monkeypatch):
    """The programs that were checked; every one passes."""
    seen = []

    def run(case):
        seen.append(case)
        return fuzz.Findings([], regions=2, elements=10, off_by_one=1)

    monkeypatch.setattr(command, "run_case", run)
    return seen


def test_counts(capsys, tmp_path):
    arguments = ["--count", "2", "--seed", "3", "--steps", "2", "--thorough-every", "0", "--save", str(tmp_path)]
    assert fuzz.main(arguments) == 0
    printed = capsys.readouterr()
    assert "2 programs (0 of them thoroughly), 0 failed" in printed.out
    # No progress bar in a log.
    assert printed.err == ""
    assert not list(tmp_path.iterdir())


def test_some_programs_are_checked_thoroughly(checked, capsys):
    fuzz.main(["--count", "7", "--seed", "18", "--thorough-every", "3", "--steps", "1"])
    assert [case.thorough for case in checked] == [True, False, False, True, False, False, True]
    assert "7 programs (3 of them thoroughly)" in capsys.readouterr().out


def test_an_interrupted_run_goes_on(checked, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "CHUNK", 3)
    state = tmp_path / "state.json"
    arguments = ["--count", "8", "--steps", "1", "--resume", str(state)]
    once = command.run_case

    def interrupted(case):
        if len(checked) == 5:
            raise KeyboardInterrupt
        return once(case)

    monkeypatch.setattr(command, "run_case", interrupted)
    with pytest.raises(KeyboardInterrupt):
        fuzz.main(arguments)
    assert json.loads(state.read_text())["chunks"].keys() == {"0"}
    monkeypatch.setattr(command, "run_case", once)
    checked.clear()
    fuzz.main(arguments)
    assert len(checked) == 5
    out = capsys.readouterr().out
    assert "8 programs" in out and "16 regions, 80 elements, 8 of them" in out
    checked.clear()
    fuzz.main([*arguments[:1], "10", *arguments[2:]])
    # The last chunk was of two programs; now of three, and one more.
    assert len(checked) == 4
    assert "10 programs" in capsys.readouterr().out


def test_other_settings_do_not_resume(checked, tmp_path):
    state = tmp_path / "state.json"
    fuzz.main(["--count", "1", "--steps", "1", "--resume", str(state)])
    with pytest.raises(SerializationError, match="repeat these settings"):
        fuzz.main(["--count", "1", "--steps", "2", "--resume", str(state)])
    state.write_text("{}")
    with pytest.raises(SerializationError, match="is no state of the fuzzer"):
        fuzz.main(["--count", "1", "--resume", str(state)])


def test_failures_are_printed_and_saved(monkeypatch, tmp_path, capsys):
    def broken(case):
        raise fuzz.CheckFailed("a promise", "one bit off")

    monkeypatch.setattr(command, "run_case", broken)
    arguments = ["--count", "2", "--seed", "5", "--steps", "1", "--save", str(tmp_path), "--shrink-tries", "0"]
    assert fuzz.main(arguments) == 2
    printed = capsys.readouterr()
    assert "2 failed" in printed.out
    assert "a promise: one bit off" in printed.err
    assert "python -m qcompiler.debug.fuzz --count 1 --seed 5 --steps 1 (recipe" in printed.err
    path = tmp_path / "seed-5.json"
    assert f"--replay {path}" in printed.err
    assert fuzz.load(path)[1] == "a promise"
    assert fuzz.main(["--replay", str(path)]) == 1
