"""Every mistake in docs/bad_inputs.md, made for real: the message is the documented one."""

import json
import re
import subprocess
import sys

import pytest

from tests import bad_inputs

ROWS = {f"{section}: {bad.what}": bad for section, bad in bad_inputs.all_rows()}


@pytest.fixture(scope="module")
def told():
    """In a process of its own, which also holds that settings, rows and model folder are checked before anything heavy loads."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.bad_inputs", "--json"], cwd=bad_inputs.DOCUMENT.parents[1], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("what", ROWS)
def test_the_message_is_the_documented_one(told, what):
    assert bad_inputs.render_row(ROWS[what], told[what]) in bad_inputs.DOCUMENT.read_text(encoding="utf-8").splitlines()


def test_the_page_is_the_one_that_is_written_and_every_message_names_a_place(told):
    assert bad_inputs.DOCUMENT.read_text(encoding="utf-8") == bad_inputs.render(told)
    assert len(told) >= 40
    place = re.compile(r"(override '|[\w./-]+(:\d+)?: |[\w.]+: |out/checkpoints/\S+ is )")
    assert [message for message in told.values() if not place.match(message)] == []
