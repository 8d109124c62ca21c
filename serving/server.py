"""vLLM's OpenAI-compatible API server, run in a separate process."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

START_SECONDS = 400


class ServerError(RuntimeError):
    """The server did not start; the message ends with the end of its log."""


@dataclass
class Server:
    url: str
    port: int
    process: subprocess.Popen
    log: Path

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read().decode()

    def metric(self, name: str) -> float:
        """Return the value of a Prometheus metric that has exactly one line."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(name + "{")]
        assert len(lines) == 1, (name, lines)
        return float(lines[0].rsplit(" ", 1)[1])

    def wait_until_idle(self, seconds: float = 60) -> None:
        """Wait until no request is running or waiting and no KV cache block is in use; fail after `seconds`."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        end = time.monotonic() + seconds
        while any(left := [self.metric(name) for name in names]):
            assert time.monotonic() < end, dict(zip(names, left, strict=True))
            time.sleep(0.2)

    def is_healthy(self) -> bool:
        try:
            self.get("/health")
        except (urllib.error.URLError, OSError):
            return False
        return True


def free_port() -> int:
    """Find a port below those that Linux gives out: another process could get such a one while vLLM is imported."""
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise ServerError("no free port between 20000 and 32000")


@contextmanager
def serve(model: Path, folder: Path, *arguments: str, name: str = "plt", show: bool = False, **environment: str):
    """Start a server for `model` on a free port, yield it once it is healthy, and stop it on exit.

    Args:
        folder: folder for the server's log.
        show: print the command.
        environment: environment variables in addition to this process's.

    Raises:
        ServerError: the server does not start.
    """
    port = free_port()
    for variable in ("no_proxy", "NO_PROXY"):  # for this server's clients: a proxy does not reach this machine's ports
        hosts = [*filter(None, os.environ.get(variable, "").split(",")), "127.0.0.1"]
        os.environ[variable] = ",".join(dict.fromkeys(hosts))
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--port", str(port)]
    command += ["--host", "127.0.0.1", "--served-model-name", name, *arguments]
    log = folder / "server.log"
    if show:
        print("$", " ".join(command), f"> {log}", flush=True)
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO", **environment}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    server = Server(f"http://127.0.0.1:{port}", port, process, log)
    try:
        end = time.monotonic() + START_SECONDS
        while not server.is_healthy():
            if process.poll() is not None or time.monotonic() > end:
                ended = "it ended" if process.poll() is not None else f"no answer after {START_SECONDS} s"
                raise ServerError(f"the server did not start ({ended}):\n{log.read_text()[-4000:]}")
            time.sleep(0.5)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            pass
        finally:
            _end_group(process)


def _end_group(process: subprocess.Popen) -> None:
    """Kill the rest of the server's process group: a server that exits during startup leaves its engine running."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
