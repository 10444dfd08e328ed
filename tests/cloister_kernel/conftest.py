"""One relay with its kernel service for all tests of a module, and Jupyter's managers over it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import KernelManager

import cloister.session
from cloister_kernel.kernelspec import install_kernelspec
from tests.fakes.kernel_client import Kernel, Make
from tests.fakes.kernel_relay import KernelRelay, running_relay


@pytest.fixture(scope="module")
def relay() -> Iterator[KernelRelay]:
    with running_relay("--lease", "3600") as relay, pytest.MonkeyPatch.context() as patch:
        patch.setattr(cloister.session, "open", relay.session)
        yield relay


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> KernelSpecManager:
    """A Jupyter that knows one kernel, `cloister-demo`."""
    data = tmp_path_factory.mktemp("jupyter")
    install_kernelspec("demo", directory=data)
    return KernelSpecManager(kernel_dirs=[str(data / "kernels")], ensure_native_kernel=False)


@pytest.fixture(scope="module")
def kernel(relay: KernelRelay, specs: KernelSpecManager) -> Make:
    """Starts a kernel as Jupyter does: `with kernel() as (manager, client)`."""

    @contextlib.contextmanager
    def make(**options: object) -> Iterator[Kernel]:
        manager = KernelManager(kernel_name="cloister-demo", kernel_spec_manager=specs, **options)
        manager.start_kernel()
        client = manager.client()
        try:
            client.start_channels()
            client.wait_for_ready(timeout=30)
            yield manager, client
        finally:
            client.stop_channels()
            if manager.has_kernel:
                manager.shutdown_kernel(now=True)
            manager.context.destroy(linger=0)

    return make


@pytest.fixture(scope="module")
def shared(kernel: Make) -> Iterator[Kernel]:
    """One kernel for the tests that leave it alive."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_SECRET_ACCESS_KEY", "leaked-if-seen")
        patch.setenv("COLUMNS", "77")
        with kernel() as started:
            yield started
