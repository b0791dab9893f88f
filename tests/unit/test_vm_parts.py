"""What a virtual machine is made of, without one: the archive it starts from, the modules in it, the command's script."""

import shutil
import stat
import subprocess

import pytest

from netnslab import vm_initrd
from netnslab.errors import LabError
from netnslab.vm_kernel import Kernel, cached


def test_another_cpio_reads_the_archive(tmp_path):
    """Busybox's cpio unpacks what we pack: names, modes and bytes, at every remainder of four."""
    files = {"a": b"", "bc": b"1", "def": b"12", "ghij": b"123", "folder/klmno": bytes(range(256)) + b"4"}
    parts = [vm_initrd.entry("folder", stat.S_IFDIR | 0o755)]
    parts += [vm_initrd.entry(name, stat.S_IFREG | 0o750, data) for name, data in files.items()]
    archive = b"".join([*parts, vm_initrd.entry("TRAILER!!!", 0)])
    busybox = shutil.which(vm_initrd.BUSYBOX)
    assert busybox, "Debian's busybox-static is among packages.txt"
    subprocess.run([busybox, "cpio", "-i"], input=archive, cwd=tmp_path, check=True, capture_output=True)
    assert {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == files
    assert {stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*") if p.is_file()} == {0o750}


def test_modules_come_after_what_they_need(tmp_path):
    """The order of loading has dependencies first and each module once; a module that is not there is named."""
    kernel = Kernel("6.1", tmp_path)
    kernel.modules.mkdir(parents=True)
    lines = [
        "fs/virtiofs.ko: fs/fuse.ko virtio.ko ring.ko",
        "fs/fuse.ko:",
        "virtio-pci.ko: virtio.ko ring.ko",
        "virtio.ko: ring.ko",
        "ring.ko:",
    ]
    (kernel.modules / "modules.dep").write_text("\n".join(lines))
    files = kernel.module_files(["virtio_pci", "virtiofs"])
    assert [str(f.relative_to(kernel.modules)) for f in files] == [
        "ring.ko",
        "virtio.ko",
        "virtio-pci.ko",
        "fs/fuse.ko",
        "fs/virtiofs.ko",
    ]
    with pytest.raises(LabError, match=r"kernel 6\.1 has no module ip_vs"):
        kernel.module_files(["ip_vs"])


def test_a_half_fetched_kernel_is_none(tmp_path):
    """Only a folder with an image counts: what a killed download leaves behind does not."""
    assert cached(tmp_path / "nothing") is None
    (tmp_path / ".fetch-1/kernel").mkdir(parents=True)
    (tmp_path / ".fetch-1/kernel/vmlinuz").touch()
    assert cached(tmp_path) is None
    (tmp_path / "6.1").mkdir()
    (tmp_path / "6.1/vmlinuz").touch()
    assert cached(tmp_path) == Kernel("6.1", tmp_path / "6.1")


def test_the_script_passes_everything_literally(tmp_path):
    """Spaces, quotes, dollars and line ends in arguments, variables and directories arrive as they are, and nothing else does."""
    folder = tmp_path / "a 'folder' $HOME"
    folder.mkdir()
    wild = 'it\'s "$HOME"\n`x` \\'
    command = ["/bin/sh", "-c", 'printf "%s|" "$PWD" "$1" "$WORD" "${HOME-unset}"', "sh", wild]
    script = vm_initrd.command_script(command, folder, {"WORD": wild})
    told = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert told.stdout == f"{folder}|{wild}|{wild}|unset|"
