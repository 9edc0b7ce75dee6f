"""A pytest plugin: the fixture `httpbin` is the server that the environment names."""

import os
import socket
import types

import pytest
from pytest_httpbin.plugin import httpbin_ca_bundle, httpbin_secure  # noqa: F401

_getaddrinfo = socket.getaddrinfo


def _local(host, *more, **named):
    # Every name under localhost is this machine (RFC 6761, section 6.3); not every resolver knows.
    if isinstance(host, str) and host.endswith(".localhost"):
        host = "127.0.0.1"
    return _getaddrinfo(host, *more, **named)


socket.getaddrinfo = _local


@pytest.fixture(scope="session")
def httpbin():
    return types.SimpleNamespace(url=os.environ["HTTPBIN"])
