"""The life of a service process: configuration, logging, metrics, start, signals, stop."""

import argparse
import asyncio
import errno
import faulthandler
import logging
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol, TypeVar

import msgspec
import uvloop
from prometheus_client import start_http_server

from emberfs.proto.errors import EmberfsError
from emberfs.runtime.config import load_config
from emberfs.runtime.env import Env
from emberfs.runtime.real import RealEnv

log = logging.getLogger("emberfs.runtime.service")

C = TypeVar("C", bound=msgspec.Struct)


class Service(Protocol):
    """What a process runs."""

    async def start(self) -> None:
        """Come up; EmberfsError or OSError is a start-up failure."""
        ...

    async def stop(self) -> None:
        """Finish what was begun and release everything."""
        ...


def run_service(
    name: str, config_type: type[C], build: Callable[[C, Env], Awaitable[Service]]
) -> None:
    """Run a service until SIGTERM or SIGINT; the whole of every `main()`.

    Exit codes: 0 after a clean stop, 1 when it could not start, 2 for a bad command or config. A
    failure is one line on stderr with cause and remedy.
    """
    if not __debug__:
        _fail(name, "refuses to run under python -O: its assertions protect data", 2)
    parser = argparse.ArgumentParser(prog=name)
    parser.add_argument("--config", required=True, type=Path, help="TOML file of this service")
    arguments = parser.parse_args()
    try:
        config = load_config(arguments.config, config_type)
    except EmberfsError as problem:
        _fail(name, problem.message, 2)
    set_up_logging(getattr(config, "log_level", "INFO"))
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    sys.exit(uvloop.run(_live(name, config, build)))


def set_up_logging(level: str) -> None:
    """Log to stderr, one line per record, with the process's own clock."""
    logging.basicConfig(
        level=level.upper(),
        format="%(asctime)s.%(msecs)03d %(levelname).1s %(name)s: %(message)s",
        datefmt="%H:%M:%S",
        stream=sys.stderr,
        force=True,
    )


def _fail(name: str, message: str, status: int) -> None:
    print(f"{name}: {message}", file=sys.stderr)
    sys.exit(status)


async def _live(name: str, config: C, build: Callable[[C, Env], Awaitable[Service]]) -> int:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping.set)
    try:
        service = await _start(config, build, stopping)
    except (EmberfsError, OSError) as problem:
        print(f"{name}: {explain(problem)}", file=sys.stderr)
        return 1
    if service is None:
        return 0
    log.info("%s is up", name)
    await stopping.wait()
    log.info("%s stops", name)
    await service.stop()
    return 0


async def _start(
    config: C, build: Callable[[C, Env], Awaitable[Service]], stopping: asyncio.Event
) -> Service | None:
    """Build and start, giving up at once when a signal arrives meanwhile."""
    _serve_metrics(getattr(config, "metrics_port", 0))
    service = await build(config, RealEnv())
    starting = asyncio.ensure_future(service.start())
    stopped = asyncio.ensure_future(stopping.wait())
    await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if starting.done():
        try:
            starting.result()
        except BaseException:
            await service.stop()
            raise
        return service
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    await service.stop()
    return None


def _serve_metrics(port: int) -> None:
    if not port:
        return
    try:
        start_http_server(port, addr="127.0.0.1")
    except OSError as problem:
        raise OSError(
            problem.errno, f"metrics port {port}: {problem.strerror}; set another metrics_port"
        ) from None


def explain(problem: EmberfsError | OSError) -> str:
    """One line for people: cause and remedy."""
    if isinstance(problem, EmberfsError):
        return problem.message
    if problem.errno == errno.EADDRINUSE:
        return f"{problem.strerror or problem}: stop the other process or choose another port"
    return str(problem)
