"""Proxies of the environment are not asked for what runs on this machine, and one that is unusable ends nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
from http_answers import answering

PROXIES = [
    {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
    {"HTTP_PROXY": "127.0.0.1:9", "HTTPS_PROXY": "127.0.0.1:9", "NO_PROXY": "example.com"},
    {"ALL_PROXY": "socks5://127.0.0.1:9"},
    {"all_proxy": "nonsense", "http_proxy": "http://x:port"},
    {"all_proxy": "nonsense://x"},
]

# By each library that one of ours asks a server with: urllib (ours), requests (MLflow), httpx (Prefect).
ASK = """
import os, sys, urllib.request
import twinloop.{package}
import httpx, requests
url = sys.argv[1]
print(urllib.request.urlopen(url).read(), requests.get(url).content, httpx.get(url).content)
print(os.environ.get("NO_PROXY", "none"))
"""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with answering(200, b"ok") as here:
        yield here


def ask(address: str, package: str, proxies: dict[str, str]) -> list[str]:
    plain = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    command = [sys.executable, "-c", ASK.format(package=package), address]
    done = subprocess.run(command, env=plain | proxies, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("proxies", PROXIES, ids=str)
@pytest.mark.parametrize("package", ["flows", "registry"])
def test_this_machine_is_asked_directly(package: str, proxies: dict[str, str], address: str) -> None:
    answers, _ = ask(address, package, proxies)
    assert answers == "b'ok' b'ok' b'ok'"


def test_what_the_user_exempted_stays_exempt(address: str) -> None:
    _, exempt = ask(address, "flows", {"http_proxy": "http://127.0.0.1:9", "no_proxy": "example.com, localhost"})
    assert exempt == "example.com,localhost,127.0.0.1,::1"


def test_without_a_proxy_nothing_is_set(address: str) -> None:
    _, exempt = ask(address, "flows", {})
    assert exempt == "none"
