"""The virtual machine itself: what goes in, what comes out, and that nothing of it stays."""

import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest
from patience import Patience

from netnslab import vm, vm_initrd, vm_kernel, vm_qemu
from netnslab.errors import LabError

pytestmark = pytest.mark.kernel

INSIDE = """\
read -r line
echo "$line from $PWD with $WORD"
echo aside >/dev/stderr
touch "$MARK" && test -e "$MARK" && id -u >&2
ip link add d0 type dummy && modprobe ip_vs && test -e /proc/net/ip_vs && echo ipvs
sleep 300 &
exit 7
"""


@pytest.fixture(autouse=True, scope="module")
def kernel() -> vm_kernel.Kernel:
    """Skip only where no package would help."""
    try:
        vm_qemu.check_host()
        return vm_kernel.fetch()
    except vm_kernel.UnavailableError as error:
        pytest.skip(f"no virtual machine: {error}")


def children(parent: int | str = "self") -> set[int]:
    """Return a process's children, of all its threads."""
    files = Path(f"/proc/{parent}/task").glob("*/children")
    return {int(pid) for file in files for pid in file.read_text().split()}


def test_a_command_has_everything_but_lasting_effects(tmp_path):
    """A command gets input, directory and environment; its two outputs and its exit code come back; what it writes is gone."""
    mark = tmp_path / "mark"
    before = children()
    reading, writing = os.pipe()
    os.write(writing, b"hello\n")
    os.close(writing)
    environment = {"WORD": "a 'quoted'\nword", "MARK": str(mark), "PATH": os.environ["PATH"]}
    heard = []
    result = vm.run(
        ["bash", "-c", INSIDE],
        folder=tmp_path,
        environment=environment,
        stdin=reading,
        timeout=60,
        listener=lambda *said: heard.append(said),
    )
    os.close(reading)
    expected = f"hello from {tmp_path} with a 'quoted'\nword\nipvs\n".encode()
    assert (result.exit_code, result.stdout, result.stderr) == (7, expected, b"aside\n0\n"), result.console
    assert {s: b"".join(d for t, d in heard if t == s) for s in ("stdout", "stderr")} == {
        "stdout": result.stdout,
        "stderr": result.stderr,
    }
    assert not mark.exists()
    assert children() == before


def test_a_machine_that_does_not_come_up_says_why(tmp_path, monkeypatch):
    """If the machine ends before the command does, the error has what its kernel and its first process said."""
    (tmp_path / "init").write_text("#!/bin/busybox sh\necho no root today\n/bin/busybox poweroff -f\n")
    (tmp_path / "inside").touch()
    monkeypatch.setattr(vm_initrd, "SCRIPTS", tmp_path)
    before = children()
    with pytest.raises(LabError, match=r"ended while it had to boot\n(.*\n)*  console: no root today"):
        vm.run(["true"])
    assert children() == before


def test_time_is_bounded(monkeypatch):
    """A machine that takes too long is ended, and the error says for what it had too little time."""
    monkeypatch.setattr(vm, "BOOT_SECONDS", 0.3)
    before = children()
    with pytest.raises(LabError, match=r"took more than 0\.3 s to boot"):
        vm.run(["true"])
    assert children() == before


def test_a_killed_parent_leaves_nothing():
    """When whoever started a machine is killed, qemu and the file server end too."""
    parent = subprocess.Popen([sys.executable, "-m", "netnslab.vm", "sleep", "600"], stdin=subprocess.DEVNULL)
    try:
        waits = [os.pidfd_open(pid) for pid in started_by(parent.pid, {"qemu-system-x86", "virtiofsd"})]
    finally:
        parent.kill()
        parent.wait()
    for waited in waits:
        assert select.select([waited], [], [], 10)[0] == [waited], "still running"
        os.close(waited)


def started_by(parent: int, wanted: set[str]) -> list[int]:
    """Return a process's children by these names, as soon as all of them are there."""
    limit = Patience(30)
    while not limit.over:
        names = {(Path(f"/proc/{pid}/comm").read_text().strip()): pid for pid in children(parent)}
        if wanted <= set(names):
            return [names[name] for name in wanted]
        time.sleep(0.05)  # between two looks; there is nothing to wait on
    raise AssertionError(f"no {wanted} in 30 s")


def test_what_is_missing_is_named(monkeypatch):
    """Without qemu the error says which package to install."""
    monkeypatch.setattr(vm_qemu, "PACKAGES", {"qemu-system-x86": "no-such-qemu", "busybox-static": str(vm_initrd.BUSYBOX)})
    with pytest.raises(LabError, match="the virtual machine needs Debian's qemu-system-x86: apt-get install"):
        vm.run(["true"])


COUNTED = """\
for round in 1 2 3 4; do
    before=${EPOCHREALTIME/[.,]/}
    for ((i = 0; i < 20000; i++)); do :; done
    echo $((${EPOCHREALTIME/[.,]/} - before))
done
"""


def test_instructions_are_counted():
    """With icount the same loop takes the same time, give or take an interrupt: the clock counts instructions."""
    _, *microseconds = map(int, vm.run(["bash", "-c", COUNTED], icount=True).stdout.split())  # the first one warms caches up
    assert max(microseconds) < 1.02 * min(microseconds), microseconds
