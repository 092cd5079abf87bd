"""The public socket: every way to fail names the setting and what to type instead."""

from __future__ import annotations

import os
import socket

import pytest

from fluentllm.core.errors import ConfigError
from fluentllm.core.settings import ServerSettings
from fluentllm.processes.listen import bind, listen, url_of


def test_a_free_port_is_found_and_shown():
    settings = ServerSettings(host="0.0.0.0", port=0)
    with bind(settings) as public:
        listen(public, settings)
        port = public.getsockname()[1]
        assert url_of(public) == f"http://127.0.0.1:{port}"
        socket.create_connection(("127.0.0.1", port)).close()


def test_an_empty_host_is_not_every_network():
    with pytest.raises(ConfigError, match=r"server\.host is empty") as caught:
        bind(ServerSettings(host=""))
    assert "0.0.0.0" in str(caught.value)


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_an_ipv6_address_is_bracketed_in_the_url():
    try:
        public = bind(ServerSettings(host="::1", port=0))
    except ConfigError:
        pytest.skip("this machine has no IPv6 address")
    with public:
        assert url_of(public) == f"http://[::1]:{public.getsockname()[1]}"


def test_a_port_in_use_is_named_with_another_to_use():
    settings = ServerSettings(port=0)
    with bind(settings) as first:
        listen(first, settings)
        taken = ServerSettings(port=first.getsockname()[1])
        with pytest.raises(ConfigError, match=rf"server.port is {taken.port}.*--port {taken.port + 1}"):
            bind(taken)


def test_two_that_bind_at_once_cannot_both_listen():
    settings = ServerSettings(port=0)
    with bind(settings) as first:
        same = ServerSettings(port=first.getsockname()[1])
        with bind(same) as second:
            listen(first, settings)
            with pytest.raises(ConfigError, match=r"another program listens"):
                listen(second, same)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.1", "x" * 300])
def test_an_address_that_is_not_ours_names_the_setting(host):
    with pytest.raises(ConfigError, match=r"server.host is .* no address of this machine"):
        bind(ServerSettings(host=host, port=0))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may listen on every port")
def test_a_privileged_port_says_so():
    with pytest.raises(ConfigError, match=r"may not listen.*1024"):
        bind(ServerSettings(port=80))
