"""The benchmark of the passes on a tiny BERT."""

import json

from benchmarks import passes


def test_every_pass_has_its_seconds(tmp_path, capsys):
    path = tmp_path / "figures.json"
    assert passes.main(["--depth", "1", "--width", "64", "--tokens", "8", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert figures["islands"] == 0 and {"partition", "fuse", "lower"} <= figures["passes"].keys()
    assert "0 islands" in capsys.readouterr().out
