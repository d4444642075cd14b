"""Model servers that speak HTTP.

A **server API** is the form of a server's requests and replies (Ollama's or OpenAI's); a **pool** shares requests among
servers and gives each as many at once as it sustains; a **registry** is a folder in which servers on other nodes
register while they live.  **Own servers** are those that a stage starts and ends itself.
"""

from curation.serving.connection import read_key
from curation.serving.named import NamedServers
from curation.serving.own import OwnServers, ServedOptions
from curation.serving.pool import EndpointPool, NoEndpoint, Waiting, endpoint_urls
from curation.serving.registry import Registry, RegistryWatcher
from curation.serving.wire import Request

__all__ = [
    "EndpointPool",
    "NamedServers",
    "NoEndpoint",
    "OwnServers",
    "Registry",
    "RegistryWatcher",
    "Reply",
    "Request",
    "ServedOptions",
    "Waiting",
    "endpoint_urls",
    "read_key",
]
