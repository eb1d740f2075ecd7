"""Every row of ``docs/reliability.md`` names an existing test."""

import ast
import re

from tests.support.distributed import ROOT


def test_every_row_names_a_test():
    rows = [
        line
        for line in (ROOT / "docs" / "reliability.md").read_text().splitlines()
        if line.startswith("| ")
    ][1:]
    assert len(rows) >= 20
    for row in rows:
        cells = re.split(r"(?<!\\)\|", row.strip("|"))
        assert len(cells) == 4 and all(cell.strip() for cell in cells), row
        tests = re.findall(r"`(tests/\S+?\.py)::(\w+)`", cells[3])
        assert tests, row
        for file, name in tests:
            names = {
                node.name
                for node in ast.walk(ast.parse((ROOT / file).read_text()))
                if isinstance(node, ast.FunctionDef)
            }
            assert name in names, (file, name)
