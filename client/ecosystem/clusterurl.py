"""Which cluster an `emberfs://` URL is on, and where in it."""

import os
from typing import Any
from urllib.parse import urlsplit

SCHEME = "emberfs"
MGMTD_VARIABLE, CLUSTER_VARIABLE = "EMBERFS_MGMTD", "EMBERFS_CLUSTER"
CLUSTER_DEFAULT = "local"


def path_of(url: str) -> str:
    """The absolute path of "emberfs://host:port/a/b", "emberfs:///a/b", "/a/b" or "a/b"."""
    if url.startswith(f"{SCHEME}://"):
        url = "/" + url[len(SCHEME) + 3 :].partition("/")[2]
    return "/" + url.strip("/")


def options_of(url: str) -> dict[str, Any]:
    """What a URL says about the cluster: {"mgmtd": "host:port"}, or nothing."""
    if not url.startswith(f"{SCHEME}://"):
        return {}
    address = urlsplit(url).netloc
    return {"mgmtd": address} if address else {}


def address(mgmtd: str | None) -> list[str]:
    """The addresses of the management service. ValueError if none is known."""
    found = mgmtd or os.environ.get(MGMTD_VARIABLE, "")
    addresses = [one.strip() for one in found.split(",") if one.strip()]
    if not addresses:
        raise ValueError(
            "no cluster: write emberfs://HOST:PORT/path, pass mgmtd='HOST:PORT', or set "
            f"{MGMTD_VARIABLE} (`emberfs status` shows the address of mgmtd)"
        )
    return addresses


def cluster_name(name: str | None) -> str:
    """The cluster's name; that of `emberfs up` if nothing else is said."""
    return name or os.environ.get(CLUSTER_VARIABLE, CLUSTER_DEFAULT)
