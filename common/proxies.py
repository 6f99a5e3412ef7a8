"""Proxies that the environment names are for the network. What runs on this machine is asked directly."""

from __future__ import annotations

import os

SCHEMES = ("http", "https", "all")
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def bypass_proxies() -> None:
    """For this process and its children: no proxy for loopback, and no proxy variable that our HTTP library refuses.

    httpx, by which Prefect is asked, makes a client for every proxy of the environment before it looks at an address:
    one that is malformed, or SOCKS without its package, would end any call, also to this machine (0.28).
    """
    named = [
        name for scheme in SCHEMES for name in (f"{scheme}_proxy", f"{scheme}_PROXY".upper()) if os.environ.get(name)
    ]
    for name in named:
        if not _is_usable(os.environ[name]):
            del os.environ[name]
    # Without a proxy nothing is set: urllib would then leave out those of a system's own settings.
    if named:
        given = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
        hosts = [host.strip() for host in given.split(",") if host.strip()]
        hosts += [host for host in LOOPBACK if host not in hosts]
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(hosts)


def _is_usable(proxy: str) -> bool:
    import httpx

    try:
        httpx.HTTPTransport(proxy=proxy if "://" in proxy else f"http://{proxy}", verify=False, trust_env=False).close()
    except (httpx.InvalidURL, ValueError, ImportError):
        return False
    return True
