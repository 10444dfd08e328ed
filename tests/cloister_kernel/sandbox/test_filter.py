"""The filter by its numbers: what it answers to every call on both architectures, by a small BPF machine."""

import ctypes
import errno
import re
import struct
from itertools import chain
from pathlib import Path

import pytest

from cloister_data import bpf
from cloister_kernel.sandbox import filter as kernel_filter
from cloister_kernel.sandbox.filter import program
from cloister_kernel.sandbox.layers import LayerError
from cloister_kernel.sandbox.syscalls import ALLOWED, NUMBERS, REFUSED, UNSUPPORTED

MACHINES = sorted(NUMBERS)
BY_ARGUMENT = {
    "clone",
    "socket",
    "socketpair",
    "ioctl",
    "personality",
    "prctl",
    "mknod",
    "mknodat",
    "madvise",
    "preadv2",
}
EPERM, ENOSYS = bpf.ERRNO | errno.EPERM, bpf.ERRNO | errno.ENOSYS


def run(code: bytes, arch: int, number: int, *arguments: int) -> tuple[int, int]:
    """What the kernel would answer, and after how many instructions."""
    data = struct.pack("=IIQ6Q", number, arch, 0, *arguments, *([0] * (6 - len(arguments))))
    at, accumulator, steps = 0, 0, 0
    while True:
        operation, true, false, k = struct.unpack_from("=HBBI", code, at * 8)
        at += 1
        steps += 1
        if operation == bpf.LOAD:
            (accumulator,) = struct.unpack_from("=I", data, k)
        elif operation == bpf.RETURN:
            return k, steps
        elif operation == bpf.JUMP:
            at += k
        else:
            taken = {
                bpf.JUMP_EQUAL: accumulator == k,
                bpf.JUMP_AT_LEAST: accumulator >= k,
                bpf.JUMP_ANY_BIT: bool(accumulator & k),
            }[operation]
            at += true if taken else false


def verdict(machine: str, name: str, *arguments: int) -> int:
    return run(program(machine), bpf.AUDIT_ARCH[machine], NUMBERS[machine][name], *arguments)[0]


@pytest.mark.parametrize("machine", MACHINES)
def test_every_number_gets_the_answer_meant_for_its_name(machine: str) -> None:
    code, names = program(machine), {number: name for name, number in NUMBERS[machine].items()}
    for number in chain(range(1024), (0x3FFFFFFF, 511, 547)):
        name = names.get(number, "")
        answer, steps = run(code, bpf.AUDIT_ARCH[machine], number)
        if name in ALLOWED:
            assert answer == bpf.ALLOW, name
        elif name in REFUSED:
            assert answer == EPERM, name
        elif name in UNSUPPORTED:
            assert answer == bpf.ERRNO | errno.ENOTSUP, name
        elif name not in BY_ARGUMENT:
            assert answer == ENOSYS, name
        assert name == "prctl" or steps <= 20


@pytest.mark.parametrize("machine", MACHINES)
def test_the_program_is_one_that_linux_takes(machine: str) -> None:
    code = program(machine)
    length, rest = divmod(len(code), bpf.INSTRUCTION_BYTES)
    assert rest == 0
    assert length < bpf.MAX_INSTRUCTIONS
    for at in range(length):
        operation, true, false, k = struct.unpack_from("=HBBI", code, at * 8)
        # The furthest target, and every instruction that goes on, stay inside.
        step = k if operation == bpf.JUMP else 0 if operation == bpf.RETURN else max(true, false)
        assert at + step + (operation != bpf.RETURN) < length


def test_far_ranges_are_reached_by_long_jumps() -> None:
    ranges = [(number, bpf.answer(0, 0) * 3 + [bpf.instruction(bpf.RETURN, number + 7)]) for number in range(300)]
    code = b"".join([bpf.instruction(bpf.LOAD, bpf.NUMBER), *kernel_filter._search(ranges)])
    assert any(code[at] == bpf.JUMP for at in range(0, len(code), 8))
    assert [run(code, 0, number)[0] for number in range(1, 300)] == [number + 7 for number in range(1, 300)]


MUST_REFUSE = """
    ptrace process_vm_readv process_vm_writev pidfd_getfd kcmp mount umount2 pivot_root chroot open_tree move_mount
    fsopen fsmount mount_setattr unshare setns bpf perf_event_open add_key request_key keyctl userfaultfd
    io_uring_setup io_uring_enter io_uring_register open_by_handle_at name_to_handle_at init_module finit_module
    delete_module kexec_load reboot swapon acct quotactl syslog clock_settime settimeofday adjtimex clock_adjtime
    move_pages migrate_pages setuid setresuid setgroups capset
"""


@pytest.mark.parametrize("machine", MACHINES)
def test_what_every_kernel_must_be_refused_is_named(machine: str) -> None:
    """Spelled out here once more, so that a slip in the tables shows."""
    for name in MUST_REFUSE.split():
        assert verdict(machine, name) == EPERM, name
    for name in ("clone3", "io_setup", "memfd_secret", "cachestat", "remap_file_pages", "lookup_dcookie"):
        assert verdict(machine, name) == ENOSYS, name
    groups = [ALLOWED, REFUSED, UNSUPPORTED, BY_ARGUMENT]
    assert len(set().union(*groups)) == sum(map(len, groups))
    # A name that no architecture knows would be a slip that allows or refuses nothing.
    assert set().union(*NUMBERS.values()) >= set().union(*groups)


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("garbage", [0, 1 << 32, 0xFFFFFFFF << 32])
def test_arguments_decide_by_their_low_half(machine: str, garbage: int) -> None:
    def answer(name: str, *arguments: int) -> int:
        return verdict(machine, name, *(argument | garbage for argument in arguments))

    allow, fork = bpf.ALLOW, 0x01200011
    assert answer("clone", fork) == allow
    # What pthread_create asks for.
    assert answer("clone", 0x003D0F00) == allow
    for new in (0x00020000, 0x02000000, 0x04000000, 0x08000000, 0x10000000, 0x20000000, 0x40000000):
        assert answer("clone", fork | new) == EPERM
    for make in ("socket", "socketpair"):
        assert answer(make, 1, 2) == allow
        assert answer(make, 16, 3) == bpf.ERRNO | errno.EOPNOTSUPP
        for family in [*range(2, 16), 0, *range(17, 64), 0xFFFFFFFF, 0x80000001, 257]:
            assert answer(make, family, 1) == bpf.ERRNO | errno.EAFNOSUPPORT
    for request in (0x5412, 0x541C, 0x5423, 0x8910, 0x8933, 0x8982, 0x89FF, 0x8B00, 0x8BFF):
        assert answer("ioctl", 0, request) == EPERM
    for request in (0x5401, 0x5413, 0x5414, 0x541B, 0x5421, 0x5451, 0x8905, 0x890F, 0x8C00, 0x80045430):
        assert answer("ioctl", 0, request) == allow
    assert answer("personality", 0) == answer("personality", 0xFFFFFFFF) == allow
    for persona in (0x0040000, 0x0400000, 8, 0x7FFFFFFF):
        assert answer("personality", persona) == EPERM
    for option in (1, 4, 15, 22, 38, 0x53564D41):
        assert answer("prctl", option) == allow
    for option in (9, 10, 24, 28, 35, 47, 59, 62, 67, 0x59616D61, 0xFFFFFFFF):
        assert answer("prctl", option) == bpf.ERRNO | errno.EINVAL
    for device in (0x2000, 0x6000, 0x21B6):
        assert answer("mknodat", 3, 0, device) == EPERM
        # umode_t has 16 bits.
        assert answer("mknodat", 3, 0, device | 0x7FFF0000) == EPERM
    for plain in (0o644, 0x1000, 0x8000, 0xC1A4):
        assert answer("mknodat", 3, 0, plain) == allow
    assert answer("madvise", 0, 4096, 4) == allow
    assert answer("madvise", 0, 4096, 12) == bpf.ERRNO | errno.EINVAL
    assert answer("preadv2", 3, 0, 1, 0, 0, 0x1) == allow
    assert answer("preadv2", 3, 0, 1, 0, 0, 0x9) == bpf.ERRNO | errno.EOPNOTSUPP


def test_mknod_has_its_mode_in_another_place() -> None:
    assert verdict("x86_64", "mknod", 0, 0x21B6) == EPERM
    assert verdict("x86_64", "mknod", 0, 0x1000, 0x2000) == bpf.ALLOW


@pytest.mark.parametrize("machine", MACHINES)
def test_other_abis_are_killed(machine: str) -> None:
    code = program(machine)
    others = {0x40000003, 0x40000028, 0x80000015, *bpf.AUDIT_ARCH.values()} - {bpf.AUDIT_ARCH[machine]}
    for arch in others:
        assert {run(code, arch, number)[0] for number in range(500)} == {bpf.KILL_PROCESS}
    for number in (0x40000000, 0x40000000 | 39, 0x40000000 | 512, 0xFFFFFFFF, 0x80000000):
        assert run(code, bpf.AUDIT_ARCH[machine], number)[0] == bpf.KILL_PROCESS


@pytest.mark.parametrize(
    ("path", "machine", "prefix"),
    [
        ("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", "x86_64", "__NR_"),
        ("/usr/include/asm-generic/unistd.h", "aarch64", "__NR3264_|__NR_"),
    ],
)
def test_the_numbers_are_the_kernels(path: str, machine: str, prefix: str) -> None:
    header = Path(path)
    if not header.exists():
        pytest.skip(f"{path} isn't installed: the numbers aren't compared with the kernel's")
    known: dict[str, int] = {}
    for name, number in re.findall(rf"#define (?:{prefix})(\w+)\s+(\d+)", header.read_text(encoding="utf-8")):
        known.setdefault({"fstatat": "newfstatat"}.get(name, name), int(number))
    shared = set(NUMBERS[machine]) & set(known)
    assert len(shared) > 280
    assert {name: NUMBERS[machine][name] for name in shared} == {name: known[name] for name in shared}
    # x86-64 and AArch64 have no other names for a number of these headers that a rule could have missed.
    missed = {name for name in known if name not in shared and name in ALLOWED | REFUSED | UNSUPPORTED}
    assert missed == set()


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(LayerError, match="riscv64") as caught:
        program("riscv64")
    assert caught.value.layer == "system-call filter"
    assert "x86-64 or AArch64" in caught.value.mend
    assert str(caught.value).startswith("The notebook kernel can't be confined: system-call filter. ")


def test_without_no_new_privileges_nothing_is_set() -> None:
    if ctypes.CDLL(None).prctl(39, 0, 0, 0, 0) == 1:
        pytest.skip("the tests' own process has it already")
    with pytest.raises(LayerError, match="no_new_privs"):
        kernel_filter.install()
