"""The process: a socket, the application on it, signals, and an exit code."""

import asyncio
import contextlib
import errno
import os
import signal
import socket
from collections.abc import Iterator

import uvicorn

from svlm_jax.errors import UserError
from svlm_jax.serving.app import make_app
from svlm_jax.serving.service import Service
from svlm_jax.serving.sessions import log

LAST_WORDS = 5.0  # seconds for listeners to take what they were sent, at the end
LAST_ROUND = 10.0  # seconds for the round, or the compilation, that the device is at
CONNECTIONS = 1000


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. UserError where the address is taken or is not this machine's."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise UserError(f"{host} is no address of this machine ({error.strerror or error}): give another --host") from None
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
        bound.listen(512)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"port {port} is in use: give another --port, or 0 for any free one") from None
        raise UserError(f"{host}:{port} cannot be listened on ({error.strerror or error}): give another --host or --port") from None
    return bound


class Server(uvicorn.Server):
    """Stops in order: a signal first ends the streams, which ends their connections, and then the server."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service, self._draining = service, False

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop, number)
        self._service.start(lambda: loop.call_soon_threadsafe(self._failed))
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _stop(self, number: int) -> None:
        if self._draining:  # asked twice: at once
            os._exit(128 + number)
        self._draining = True
        log("server.draining", signal=signal.Signals(number).name)
        self._task = asyncio.get_running_loop().create_task(self._drain())

    async def _drain(self) -> None:
        await asyncio.to_thread(self._service.drain)
        await asyncio.sleep(0.1)  # for the last events to be on their way
        self.should_exit = True

    def _failed(self) -> None:
        if not self._draining:
            self.should_exit = True


def serve(service: Service, bound: socket.socket, host: str) -> int:
    """Runs until a signal; the exit code is 0 after a stop in order. UserError where the model could not be loaded, or the device failed."""
    settings = uvicorn.Config(
        make_app(service, host=host),
        log_level="critical",
        access_log=False,
        lifespan="on",
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(LAST_WORDS),
        ws_max_size=2 * service.limits.frame_bytes,
        ws_max_queue=8,
        ws_ping_interval=20.0,
        ws_ping_timeout=20.0,
        h11_max_incomplete_event_size=64 * 1024,
    )
    name = f"[{host}]" if ":" in host else host
    log("server.listening", url=f"http://{name}:{bound.getsockname()[1]}/", model=service.name)
    asyncio.run(Server(settings, service).serve(sockets=[bound]))
    if service.failure:
        raise UserError(service.failure)
    quiet = service.rests(LAST_ROUND)
    log("server.stopped")
    if not quiet:  # Python cannot end a thread inside XLA, and aborts when it comes back from there to an interpreter that is gone
        os._exit(0)
    return 0
