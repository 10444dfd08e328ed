"""The jupyter_client provisioner: JupyterLab, nbclient and papermill start a cloister's kernel as if it were local."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jupyter_client.connect import LocalPortCache
from jupyter_client.provisioning.provisioner_base import KernelProvisionerBase
from traitlets import Unicode

from cloister_data.errors import CloisterError, ConfigurationError, NotFoundError
from cloister_kernel.bridge import LOST_KERNEL, Bridge, LocalAddress
from cloister_kernel.courier import Courier
from cloister_kernel.remote import RemoteKernel

POLL_SECONDS = 0.05
NOT_CONFINED = "Cloister: this kernel is not confined (--unsafe-no-sandbox): for trying out only, never for real data."
KILLED = -9
PORTS = ("shell_port", "iopub_port", "stdin_port", "hb_port", "control_port")


class CloisterProvisioner(KernelProvisionerBase):
    """Starts a kernel in the cloister of `profile` and bridges its channels to the addresses that Jupyter chose.

    Jupyter's KernelManager calls: `pre_launch`, `launch_kernel`, `poll` every few seconds, `send_signal` to interrupt,
    and at the end `wait`, `terminate`, `kill`, `cleanup`. While the network is down `poll` still says "alive".
    """

    profile = Unicode(config=True, help="The name of the profile that `cloister connect` made.")

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._remote: RemoteKernel | None = None
        self._bridge: Bridge | None = None
        self._exit_code: int | None = None
        self._launched = False
        self._directory: Path | None = None  # the notebook's, as far as Jupyter says

    @property
    def has_process(self) -> bool:
        return self._launched

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        """Let Jupyter choose addresses and key. Neither the command nor the local environment goes anywhere."""
        manager = self.parent
        if manager is None:
            raise ConfigurationError("A Cloister kernel is started by a Jupyter kernel manager.")
        for name in ("extra_arguments", "transport_encryption"):
            kwargs.pop(name, None)
        if manager.cache_ports and not self.connection_info:
            self._choose_ports()
        manager.write_connection_file()
        self.connection_info = manager.get_connection_info()
        return await super().pre_launch(cmd=[], **kwargs)

    def _choose_ports(self) -> None:
        cache = LocalPortCache.instance()
        for name in PORTS:
            setattr(self.parent, name, cache.find_available_port(getattr(self.parent, "ip", "127.0.0.1")))

    def _return_ports(self) -> None:
        cache = LocalPortCache.instance()
        info: Mapping[str, Any] = self.connection_info
        for name in PORTS:
            cache.return_port(info[name])

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> Any:
        """Verify the cloister, start a kernel there, serve it locally. Raises CloisterError; then nothing remains."""
        if not self.profile:
            raise ConfigurationError(
                "The kernelspec names no profile.", next_step="Make it again: cloister connect URL --trust FILE."
            )
        address = LocalAddress.from_connection_info(self.connection_info)
        remote = RemoteKernel(self.profile)
        self._directory = Path(os.path.join(os.getcwd(), kwargs.get("cwd") or ""))
        bridge = Bridge(address, remote.connect, self.log, Courier(remote, self._directory).carry_out)
        try:
            await asyncio.to_thread(remote.start, kwargs.get("env"))
            await asyncio.to_thread(bridge.start)
        except BaseException:
            await asyncio.to_thread(_give_up, remote, bridge)
            raise
        if remote.view is not None and remote.view.sandbox != "confined":
            self.log.warning(NOT_CONFINED)
        self._remote, self._bridge, self._exit_code, self._launched = remote, bridge, None, True
        return self.connection_info

    async def poll(self) -> int | None:
        """None while the kernel lives or can't be reached; its exit code once it has ended."""
        if self._bridge is None:
            return self._exit_code if self._exit_code is not None else 0
        return self._bridge.exit_code

    async def wait(self) -> int | None:
        while (code := await self.poll()) is None:  # noqa: ASYNC110 - the bridge lives in another thread
            await asyncio.sleep(POLL_SECONDS)
        self._exit_code = code
        self._launched = False
        return code

    async def send_signal(self, signum: int) -> None:
        """SIGINT interrupts the running cell, SIGKILL and SIGTERM end the kernel; other signals don't travel."""
        if signum == signal.SIGINT:
            if self._remote is not None and self._bridge is not None and await self.poll() is None:
                try:
                    if await asyncio.to_thread(self._bridge.cancel_errand):
                        return
                    await asyncio.to_thread(self._remote.interrupt)
                except NotFoundError:
                    pass
                except CloisterError as error:
                    # Jupyter interrupts before it shuts down, and wouldn't go on after an error.
                    self.log.warning("The kernel couldn't be interrupted. %s", error)
        elif signum in (signal.SIGTERM, getattr(signal, "SIGKILL", signal.SIGTERM)):
            await self.kill()

    async def kill(self, restart: bool = False) -> None:
        await self._end()

    async def terminate(self, restart: bool = False) -> None:
        # Called when a polite shutdown_request brought nothing.
        await self._end()

    async def _end(self) -> None:
        if self._remote is None or self._bridge is None or self._bridge.exit_code is not None:
            return
        self._bridge.asked_to_end = True
        code = KILLED
        try:
            view = await asyncio.to_thread(self._remote.end)
            code = view.exit_code if view.exit_code is not None else KILLED
        except NotFoundError:
            code = LOST_KERNEL
        except CloisterError as error:
            self.log.warning("The kernel couldn't be ended now; the cloister ends it when its lease is over. %s", error)
        self._bridge.set_exit_code(code)

    async def cleanup(self, restart: bool = False) -> None:
        await self._end()
        if self._bridge is not None:
            self._exit_code = self._bridge.exit_code
            await asyncio.to_thread(self._bridge.stop)
            self._bridge = None
        if self._remote is not None:
            await asyncio.to_thread(self._remote.close)
            self._remote = None
        if not restart and self.connection_info and getattr(self.parent, "cache_ports", False):
            self._return_ports()
            self.connection_info = {}

    async def get_provisioner_info(self) -> dict[str, Any]:
        info = await super().get_provisioner_info()
        if self._remote is not None and self._remote.view is not None:
            info["cloister_kernel"] = self._remote.identifier
            info["cloister_profile"] = self.profile
            info["cloister_directory"] = str(self._directory) if self._directory else None
        return info

    async def load_provisioner_info(self, provisioner_info: dict[str, Any]) -> None:
        """Attach to a kernel that an earlier local server started. Raises NotFoundError where it has ended."""
        await super().load_provisioner_info(provisioner_info)
        identifier = provisioner_info.get("cloister_kernel")
        if identifier is None:
            return
        self.profile = provisioner_info["cloister_profile"]
        remote = RemoteKernel(self.profile)
        directory = provisioner_info.get("cloister_directory")
        self._directory = Path(directory) if directory else None
        address = LocalAddress.from_connection_info(self.connection_info)
        carry_out = Courier(remote, self._directory).carry_out
        bridge = Bridge(address, remote.connect, self.log, carry_out, adopting=True)
        try:
            await asyncio.to_thread(remote.adopt, str(identifier))
            await asyncio.to_thread(bridge.start)
        except BaseException:
            await asyncio.to_thread(bridge.stop)
            await asyncio.to_thread(remote.close)
            raise
        self._remote, self._bridge, self._exit_code, self._launched = remote, bridge, None, True

    def get_shutdown_wait_time(self, recommended: float = 5.0) -> float:
        return max(recommended, 5.0)


def _give_up(remote: RemoteKernel, bridge: Bridge) -> None:
    bridge.stop()
    if remote.view is not None:
        with contextlib.suppress(CloisterError):
            remote.end()
    remote.close()
