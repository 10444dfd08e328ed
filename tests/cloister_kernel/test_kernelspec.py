"""The kernelspec that `cloister connect` leaves for Jupyter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.provisioning import KernelProvisionerFactory

from cloister_data.errors import InvalidRequestError, StorageError
from cloister_kernel.kernelspec import install_kernelspec


def test_jupyter_finds_it_and_its_provisioner(tmp_path: Path) -> None:
    where = install_kernelspec("hospital-a", "Cloister: hospital-a", tmp_path)
    assert where == tmp_path / "kernels" / "cloister-hospital-a"
    spec = KernelSpecManager(kernel_dirs=[str(tmp_path / "kernels")]).get_kernel_spec("cloister-hospital-a")
    assert spec.display_name == "Cloister: hospital-a"
    assert spec.argv[:3] == [sys.executable, "-m", "cloister_kernel.proxy"]
    assert KernelProvisionerFactory.instance().is_provisioner_available(spec)
    install_kernelspec("hospital-a", "Another name", tmp_path)
    assert json.loads((where / "kernel.json").read_text())["display_name"] == "Another name"
    assert [entry.name for entry in where.iterdir()] == ["kernel.json"]


def test_each_cloister_has_its_own_entry_in_the_launcher(tmp_path: Path) -> None:
    for profile in ("hospital-a", "hospital-b"):
        install_kernelspec(profile, directory=tmp_path)
    command = [sys.executable, "-m", "jupyter", "kernelspec", "list", "--json"]
    environment = os.environ | {"JUPYTER_PATH": str(tmp_path), "JUPYTER_PLATFORM_DIRS": "1"}
    listed = json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)
    names = {name: entry["spec"]["display_name"] for name, entry in listed["kernelspecs"].items()}
    assert names["cloister-hospital-a"] == "Cloister: hospital-a"
    assert names["cloister-hospital-b"] == "Cloister: hospital-b"


@pytest.mark.parametrize("name", ["", "../x", "A", "a/b", "x" * 64, "a b"])
def test_names_that_are_none_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="profile"):
        install_kernelspec(name, directory=tmp_path)


def test_a_directory_that_cant_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "kernels").write_text("a file")
    with pytest.raises(StorageError, match="kernelspec"):
        install_kernelspec("a", directory=tmp_path)
