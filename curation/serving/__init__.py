"""Model servers that speak HTTP.

A **server API** is the form of a server's requests and replies (Ollama's or OpenAI's); a **pool** shares requests among
servers and gives each as many at once as it sustains; a **registry** is a folder in which servers on other nodes
register while they live.
"""

from curation.serving.pool import EndpointPool, NoEndpoint, endpoint_urls
from curation.serving.registry import Registry, RegistryWatcher
from curation.serving.wire import Request

__all__ = ["EndpointPool", "NoEndpoint", "Registry", "RegistryWatcher", "Request", "endpoint_urls"]
