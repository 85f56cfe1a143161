"""Where the dashboard is reached: what it listens on, and how a proxy before it shows it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from aurora_sgl.config import Settings
from aurora_sgl.errors import AuroraError

LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")
_NAME = re.compile(r"(\*\.)?[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?")
_SEGMENT = re.compile(r"[A-Za-z0-9._~-]*[A-Za-z0-9_~-]")  # neither "." nor ".."


@dataclass(frozen=True)
class Site:
    host: str
    port: int
    names: tuple[str, ...] = ()  # under which others reach it, beside loopback's
    base: str = ""  # "" or a path such as /aurora
    proxies: str = ""  # whose X-Forwarded-* are believed, with commas

    @property
    def address(self) -> str:
        return f"http://{shown(self.host)}:{self.port}{self.base}"

    @property
    def public(self) -> str:
        """For people: through the proxy, where one was named."""
        names = [name for name in self.names if not name.startswith("*")]
        return f"https://{names[0]}{self.base}" if names else self.address

    @property
    def allowed_hosts(self) -> list[str]:
        """Names in the header Host that are answered; none: any, as on an address of a network
        whose names nobody told us."""
        if not is_loopback(self.host) and not self.names:
            return []
        own = () if self.host in ("", "0.0.0.0", "::") else (shown(self.host),)
        return list(dict.fromkeys((*LOOPBACK_NAMES, *own, *self.names)))


def read(
    host: str,
    port: int,
    settings: Settings,
    *,
    names: list[str] | None = None,
    base: str | None = None,
    proxies: list[str] | None = None,
) -> Site:
    """From flags, and from the settings where one was not given.

    Raises ``AuroraError`` for what is no name, no path or no address.
    """
    return Site(
        host,
        port,
        read_names(",".join(names) if names else settings.dashboard_host_names),
        read_base(settings.dashboard_base_path if base is None else base),
        read_proxies(",".join(proxies) if proxies else settings.dashboard_trusted_proxies),
    )


def read_names(text: str) -> tuple[str, ...]:
    names = tuple(_listed(text.lower()))
    for name in names:
        if not _NAME.fullmatch(name):
            raise AuroraError(
                f"{name!r} is not a host name; give one such as aurora.example.org, without "
                "https:// and port (--host-name, AURORA_DASHBOARD_HOST_NAMES)"
            )
    return names


def read_base(text: str) -> str:
    path = text.strip().strip("/")
    if not path:
        return ""
    if not all(_SEGMENT.fullmatch(part) for part in path.split("/")):
        raise AuroraError(
            f"{text!r} is not a path; give one such as /aurora (--base-path, "
            "AURORA_DASHBOARD_BASE_PATH)"
        )
    return f"/{path}"


def read_proxies(text: str) -> str:
    addresses = _listed(text)
    for address in addresses:
        try:
            ip_network(address)
        except ValueError:
            raise AuroraError(
                f"{address!r} is neither an address nor a network; give one such as 10.0.0.7 or "
                "10.0.0.0/24 (--trusted-proxy, AURORA_DASHBOARD_TRUSTED_PROXIES)"
            ) from None
    return ",".join(addresses)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def shown(host: str) -> str:
    return "127.0.0.1" if host in ("", "0.0.0.0") else f"[{host}]" if ":" in host else host
