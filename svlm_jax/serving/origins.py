"""Which files and addresses a client may have the server open: none but the bundled clip, unless the operator lists them."""

import dataclasses
import fnmatch
import ipaddress
import os
import socket
import urllib.parse
from pathlib import Path

from svlm_jax.serving.limits import Refused

SCHEMES = {"http": 80, "https": 443, "rtsp": 554, "rtsps": 322}
LIVE_SCHEMES = ("rtsp", "rtsps")


@dataclasses.dataclass(frozen=True)
class Allowed:
    """What `--allow-files` and `--allow-host` list."""

    folders: tuple[Path, ...] = ()
    hosts: tuple[str, ...] = ()  # names, *.names or addresses, each with or without a port

    def file(self, name: str) -> str:
        """The real path of a file below a listed folder, links followed. Refused where it is not, in words that tell nothing about the disk."""
        refused = Refused("files on the server can be named only below a folder that it was started with (--allow-files)", status=403)
        if "\0" in name or not self.folders:
            raise refused
        for folder in self.folders:
            root = os.path.realpath(folder)
            path = os.path.realpath(os.path.join(root, name))
            if os.path.commonpath([root, path]) == root:
                if os.path.isfile(path):
                    return path
                raise Refused(f"{name}: there is no such file", status=404)
        raise refused

    def url(self, url: str) -> str:
        """The URL, where its host is listed. Blocks while the name is looked up.

        A name that leads to an address of this machine or a private network is refused all the same: list the address itself for a
        camera at home. A listed host is trusted with what its play lists lead to; it cannot redirect to another.
        """
        try:
            parts = urllib.parse.urlsplit(url)
            host, port = (parts.hostname or "").lower().rstrip("."), parts.port or SCHEMES.get(parts.scheme, 0)
        except ValueError:
            raise Refused(f"{url[:80]} is not an address") from None
        if parts.scheme not in SCHEMES:
            raise Refused(f"addresses begin with one of {', '.join(f'{scheme}://' for scheme in SCHEMES)}", status=403)
        if any(ord(c) < 33 for c in url):
            raise Refused("an address holds no blanks")
        named = [pattern for pattern in self.hosts if _matches(pattern, host, port)]
        if not named:
            raise Refused(f"{host[:80]} is not among the hosts that this server may open (--allow-host)", status=403)
        literal = _address(host)
        if literal is not None:  # listed as itself, or by a pattern, which is for names
            if not any("*" not in pattern for pattern in named):
                raise Refused(f"{host} has to be listed by its full address (--allow-host)", status=403)
            return url
        try:
            found = {item[4][0] for item in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
        except OSError:
            raise Refused(f"{host} cannot be found", status=502) from None
        inside = [text for text in found if not _is_public(str(text))]
        if inside:
            raise Refused(f"{host} leads to an address that is not public: list that address itself (--allow-host)", status=403)
        return url


def is_url(source: str) -> bool:
    return "://" in source


def is_live(url: str) -> bool:
    """Whether an address is of a broadcast rather than a file."""
    parts = urllib.parse.urlsplit(url)
    return parts.scheme in LIVE_SCHEMES or parts.path.endswith(".m3u8")


def shown(source: str) -> str:
    """A source as it may be told to clients and logs: without a password."""
    if not is_url(source):
        return os.path.basename(source)
    parts = urllib.parse.urlsplit(source)
    return urllib.parse.urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def _matches(pattern: str, host: str, port: int) -> bool:
    name, colon, number = pattern.lower().rpartition(":")
    if colon and number.isdigit() and (name.count(":") == 0 or name.endswith("]")):
        return int(number) == port and fnmatch.fnmatchcase(host, name.strip("[]"))
    return fnmatch.fnmatchcase(host, pattern.lower().strip("[]"))


def _address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Of any spelling that a resolver would take: 127.1 and 0x7f.1 too."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    try:
        return ipaddress.ip_address(socket.inet_ntoa(socket.inet_aton(host)))
    except (OSError, ValueError):
        return None


def _is_public(text: str) -> bool:
    address = ipaddress.ip_address(text.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_global and not address.is_multicast
