"""FlashInfer's modules of a model: loaded where they are compiled; else compiled in a process of its own, at lowest priority.

    modules = Modules(wanted, "9.0a");  modules.start()   …   modules.wait();  modules.compile()   …   modules.ready(module)

No request waits for a compiler: until a module is ready another backend does its passes. What was compiled stays in
FlashInfer's cache folder, for later starts.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from typing import TYPE_CHECKING, Any

from . import toolkit
from .modules import Module, from_json, import_flashinfer, is_compiled, to_json

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

JOBS = "2"
"""Compilers at once (`MAX_JOBS`); one of FlashAttention 3's sources takes some GiB."""


class Modules:
    """What one model needs, the most wanted first."""

    def __init__(self, wanted: Sequence[Module], architecture: str) -> None:
        self.wanted = tuple(wanted)
        self.trouble: str | None = None
        """Why what is missing will not come."""
        self._architecture = architecture
        self._loaded: frozenset[Module] = frozenset()
        self._settled = threading.Event()
        self._missing: list[Module] = []
        self._started = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Load what was compiled earlier, in the background: importing FlashInfer alone takes seconds."""
        with self._lock:
            if not self._started:
                self._started = True
                threading.Thread(target=self._load_all, name="fluent-flashinfer", daemon=True).start()

    def wait(self) -> None:
        """Until that is done."""
        self.start()
        self._settled.wait()

    def compile(self) -> None:
        """What is missing, in the background; after `wait`, once."""
        with self._lock:
            missing, self._missing = self._missing, []
        if not missing:
            return
        if toolkit.find_compiler() is None:
            self.trouble = "there is no CUDA compiler (nvcc) and ninja to compile its kernels with"
            log.warning("%d FlashInfer modules stay out of use: %s", len(missing), self.trouble)
            return
        log.info("compiling %d FlashInfer modules in the background; until then other kernels do their work", len(missing))
        threading.Thread(target=self._compile, args=(missing,), name="fluent-flashinfer", daemon=True).start()

    def ready(self, module: Module) -> bool:
        return module in self._loaded

    def _load_all(self) -> None:
        try:
            import_flashinfer(self._architecture)
            self._missing = [module for module in self.wanted if not (is_compiled(module) and self._load(module))]
        except Exception as error:
            self.trouble = f"{type(error).__name__}: {error}"
            log.warning("FlashInfer cannot be used: %s", self.trouble)
            log.debug("", exc_info=True)
        finally:
            self._settled.set()

    def _load(self, module: Module) -> bool:
        try:
            module.load()
        except Exception as error:  # written by another toolkit, or cut off; the compiler writes it anew
            log.warning("FlashInfer's %s cannot be loaded: %s: %s", module, type(error).__name__, error)
            return False
        self._loaded |= {module}
        return True

    def _compile(self, missing: list[Module]) -> None:
        environment = {
            **os.environ,
            **toolkit.environment(),
            "FLASHINFER_CUDA_ARCH_LIST": self._architecture,
            "CUDA_VISIBLE_DEVICES": "",  # compilers need no GPU, and a context costs memory
            "MAX_JOBS": os.environ.get("MAX_JOBS", JOBS),
        }
        child = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            text=True,
            start_new_session=True,
        )
        atexit.register(_end, child)
        assert child.stdin is not None
        assert child.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            child.stdin.write(json.dumps([to_json(module) for module in missing]))
            child.stdin.close()
        for line in child.stdout:
            self._heard(json.loads(line))
        if child.wait() != 0:
            self.trouble = self.trouble or f"the process that compiles ended with {child.returncode}"
            log.warning("FlashInfer modules were not compiled: %s", self.trouble)
        atexit.unregister(_end)

    def _heard(self, news: dict[str, Any]) -> None:
        module = from_json(news["module"])
        if news["error"] is not None:
            self.trouble = news["error"].strip().splitlines()[-1]
            log.warning("FlashInfer's %s does not compile: %s", module, self.trouble)
            log.debug("%s", news["error"])
        elif self._load(module):
            log.info("compiled FlashInfer's %s in %.0f s", module, news["seconds"])


def build(module: Module) -> None:
    """Compile it now, into FlashInfer's cache folder. Raises what FlashInfer raises, with the compiler's words."""
    module.spec().build(verbose=False)


def main() -> None:
    """Modules as JSON on standard input; a line for each on standard output, when it is done."""
    os.nice(19)
    wanted = json.load(sys.stdin)
    # Whatever else prints must not come between the lines.
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for data in wanted:
            started, error = time.perf_counter(), None
            try:
                build(from_json(data))
            except Exception as failure:
                error = f"{type(failure).__name__}: {failure}"
            news = {"module": data, "seconds": time.perf_counter() - started, "error": error}
            answers.write(json.dumps(news) + "\n")
            answers.flush()


def _end(child: subprocess.Popen[str]) -> None:
    """And the compilers that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGTERM)


if __name__ == "__main__":
    main()
