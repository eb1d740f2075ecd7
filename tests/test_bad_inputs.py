"""The messages in docs/bad_inputs.md are those that the mistakes give."""

import json
import re
import subprocess
import sys

from tests.support import bad_inputs

PLACE = re.compile(r"(override '|[\w./-]+(:\d+)?: |[\w.]+: |out/checkpoints/\S+ is )")


def test_the_page_has_the_messages_and_each_names_a_place():
    """In another process, which also checks that settings are checked before heavy imports."""
    command = [sys.executable, "-m", "tests.support.bad_inputs", "--json"]
    root = bad_inputs.DOCUMENT.parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) >= 40
    assert [message for message in found.values() if not PLACE.match(message)] == []
    page = bad_inputs.DOCUMENT.read_text(encoding="utf-8")
    assert page.splitlines() == bad_inputs.render(found).splitlines()
