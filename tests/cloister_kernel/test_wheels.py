"""Which wheels the laptop's pip is asked for: those that the kernel's machine takes."""

from __future__ import annotations

from cloister_data.transfers import TransferTerms
from cloister_kernel.wheels import platforms


def terms(glibc: str) -> TransferTerms:
    return TransferTerms(max_bytes=1, python="3.11", machine="aarch64", glibc=glibc)


def test_no_newer_c_library_than_the_kernels() -> None:
    tags = platforms(terms("2.17"))
    assert tags[:2] == ["manylinux_2_17_aarch64", "manylinux_2_16_aarch64"]
    assert "manylinux_2_18_aarch64" not in tags
    assert tags[-4:] == ["manylinux2014_aarch64", "manylinux2010_aarch64", "manylinux1_aarch64", "linux_aarch64"]


def test_another_c_library_takes_no_manylinux() -> None:
    assert platforms(terms("")) == ["linux_aarch64"]
