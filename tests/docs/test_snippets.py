"""The snippets of the documentation run, each page from top to bottom."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = ("recipes", "strategy")


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_of_a_page_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (DOCS / f"{page}.md").read_text()
    namespace = {"__name__": page}
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert blocks
    for block in blocks:
        line = text.count("\n", 0, block.start(1))
        # Line numbers of errors are those of the page.
        exec(compile("\n" * line + block[1], DOCS / f"{page}.md", "exec"), namespace)


def test_every_field_of_a_recipe_is_on_the_page():
    import dataclasses

    import qcompiler as qc

    text = (DOCS / "recipes.md").read_text()
    for cls in (qc.Recipe, qc.Rule):
        missing = [f.name for f in dataclasses.fields(cls) if f"`{f.name}`" not in text]
        assert not missing
