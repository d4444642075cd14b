"""The model servers that a stage's options name: by URLs or ports, by a folder in which they register, or its own."""

from __future__ import annotations

from pathlib import Path

from curation.errors import UsageError
from curation.options import logger
from curation.serving.connection import read_key
from curation.serving.own import OwnServers
from curation.serving.pool import LONG, EndpointPool, Waiting, endpoint_urls
from curation.serving.registry import Registry, RegistryWatcher


class NamedServers:
    """The servers of one model.

    Attributes:
        pool: What they are asked by.
    """

    def __init__(
        self,
        model: str,
        *,
        ports: str = "",
        endpoints: str | None = None,
        endpoints_dir: Path | None = None,
        own: OwnServers | None = None,
        api_key_env: str | None = None,
        timeout_s: float,
        load_timeout_s: float,
        needs_tokens: int,
        waiting: Waiting = LONG,
    ) -> None:
        """Find the servers, or start those of the stage.

        Args:
            model: The servers' name for it.
            ports, endpoints: See ``endpoint_urls``.
            endpoints_dir: A ``Registry``, in place of those.
            own: In place of all of them.
            api_key_env: The environment variable with the servers' key, where one is named; see ``read_key``.
            timeout_s, load_timeout_s, needs_tokens, waiting: See ``EndpointPool``.

        Raises:
            InfrastructureError: No server answers, or one does not have the model.
            UsageError: The options make no sense.
        """
        if timeout_s <= 0:
            raise UsageError("--timeout is more than 0 seconds")
        if endpoints and endpoints_dir is not None:
            raise UsageError("--endpoints_dir names the servers: leave --endpoints out")
        found = endpoints_dir is not None or own is not None
        self._watch: RegistryWatcher | None = None
        self.pool = EndpointPool(
            [] if found else endpoint_urls(ports, endpoints=endpoints),
            model,
            timeout_s=timeout_s,
            load_timeout_s=load_timeout_s,
            key=own.key if own else read_key(api_key_env, registered=endpoints_dir is not None),
            needs_tokens=needs_tokens,
            waiting=waiting,
        )
        if own is not None:
            own.start(self.pool)
        elif endpoints_dir is not None:
            self._watch = RegistryWatcher(self.pool, Registry(endpoints_dir)).start()
        else:
            self.pool.open()

    def close(self) -> None:
        """Look for no further servers, and tell the log what each has done.  Answers to come are thrown away."""
        if self._watch is not None:
            self._watch.close()
        for line in self.pool.summary():
            logger.info(line)
