"""benchmarks/study.py: what it copies, and how it ends; `compare` is a script here."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STUDY = Path(__file__).parents[2] / "benchmarks" / "study.py"


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The script with another root; its command is a script that writes `compare.json`, or fails."""
    spec = importlib.util.spec_from_file_location("study", STUDY)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path / "root")
    monkeypatch.setattr(sys, "argv", ["study.py", "ezpoints", "--folder", str(tmp_path)])
    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    yield module
    for number, handler in before:
        signal.signal(number, handler)


def test_only_what_this_call_wrote_is_copied(study, tmp_path, monkeypatch):
    fake, out = tmp_path / "python", tmp_path / "ezpoints"
    fake.write_text(f"#!/bin/sh\necho new > {out}/compare.json\nexit $CODE\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake))
    out.mkdir()
    for name in ("compare.json", "report.html"):
        (out / name).write_text("old\n")
        os.utime(out / name, (0, 0))
    monkeypatch.setenv("CODE", "1")
    assert study.main() == 1
    copied = [path for path in (tmp_path / "root").rglob("*") if path.is_file()]
    assert [path.name for path in copied] == ["ezpoints.json"]
    assert copied[0].read_text() == "new\n"
    copied[0].unlink()
    fake.write_text("#!/bin/sh\nexit 2\n")
    assert study.main() == 2
    assert not copied[0].exists()


CHILD = """
import signal, sys, time
def end(number, frame):
    time.sleep(0.6)  # longer than subprocess.run waits
    print("ended in order after", signal.Signals(number).name, flush=True)
    sys.exit(130)
signal.signal(signal.SIGINT, end)
signal.signal(signal.SIGTERM, end)
print("ready", flush=True)
time.sleep(30)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_handed_on_and_waited_for(number):
    code = f"import sys; sys.path.insert(0, {str(STUDY.parent)!r}); import study; "
    code += f"sys.exit(study.run([sys.executable, '-c', {CHILD!r}]))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.2)
        process.send_signal(number)
        said = process.communicate(timeout=20)[0]
    finally:
        process.kill()
    assert (said, process.returncode) == (f"ended in order after {number.name}\n", 130)
