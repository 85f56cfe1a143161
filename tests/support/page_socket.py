"""A page of the dashboard without a browser: Streamlit's websocket, spoken directly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg
from streamlit.proto.WidgetStates_pb2 import WidgetState
from streamlit.web.server.starlette.starlette_server_config import XSRF_COOKIE_NAME
from websockets.sync.client import connect

from dashboard.server import cookie_name

#: Seconds that a run of the script may take on a busy machine.
PATIENCE = 60.0
#: A script that ends with a wish to run again does so by itself.
AGAIN = ForwardMsg.FINISHED_EARLY_FOR_RERUN


@dataclass
class Drawn:
    """What one run of the script sent."""

    texts: list[str] = field(default_factory=list)
    buttons: dict[str, str] = field(default_factory=dict)  # label -> widget id
    submits: dict[str, str] = field(default_factory=dict)  # those of forms
    inputs: dict[str, str] = field(default_factory=dict)
    fragments: dict[str, str] = field(default_factory=dict)  # widget id -> its fragment
    downloads: dict[str, str] = field(default_factory=dict)  # label -> the path of its file
    by_key: dict[str, str] = field(default_factory=dict)  # a widget's key -> its id
    sent: bytearray = field(default_factory=bytearray)  # all of it, tables too
    kinds: set[str] = field(default_factory=set)
    redirect: str = ""  # where the browser is sent

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def take(self, message: ForwardMsg) -> None:
        self.sent += message.SerializeToString()
        self.redirect = message.auth_redirect.url or self.redirect
        if message.WhichOneof("type") != "delta" or (
            message.delta.WhichOneof("type") != "new_element"
        ):
            return
        element = message.delta.new_element
        kind = str(element.WhichOneof("type"))
        one = getattr(element, kind)
        self.kinds.add(kind)
        self.texts += strings_of(one)
        if kind == "download_button":
            self.downloads[one.label] = one.url
        widgets = {
            "button": self.buttons, "text_input": self.inputs, "text_area": self.inputs,
        }.get(kind)  # fmt: skip
        if kind == "button" and one.is_form_submitter:
            widgets = self.submits
        if widgets is not None:
            widgets[one.label] = one.id
            self.by_key[one.id.rpartition("-")[2]] = one.id
            self.fragments[one.id] = message.delta.fragment_id


def strings_of(message: Any) -> Iterator[str]:
    for descriptor, value in message.ListFields():
        for one in value if _is_many(value) else [value]:
            if isinstance(one, str):
                yield one
            elif descriptor.message_type is not None and hasattr(one, "ListFields"):
                yield from strings_of(one)


def _is_many(value: Any) -> bool:
    return not isinstance(value, str | bytes) and isinstance(value, Iterable)


class PageSocket:
    """One connection, as ``token``'s owner or with a browser's cookies, of which Streamlit believes
    its own where the page sends one of them along. Raises ``InvalidStatus`` when it is refused."""

    def __init__(
        self, url: str, token: str = "", *, origin: str | None = None,
        cookies: Mapping[str, str] | None = None, **headers: str,
    ) -> None:  # fmt: skip
        cookies = dict(cookies or {})
        if token:
            cookies[cookie_name(int(url.split("/")[2].rpartition(":")[2]))] = token
        if cookies:
            headers["Cookie"] = "; ".join(f"{name}={value}" for name, value in cookies.items())
        proof = [cookies[XSRF_COOKIE_NAME]] if XSRF_COOKIE_NAME in cookies else []
        self._socket = connect(
            f"{url.replace('http', 'ws', 1)}/_stcore/stream",
            origin=origin,  # type: ignore[arg-type]
            subprotocols=["streamlit", *proof],  # type: ignore[list-item]
            additional_headers={name.replace("_", "-"): value for name, value in headers.items()},
            open_timeout=PATIENCE,
            max_size=None,
        )

    def __enter__(self) -> PageSocket:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._socket.close()

    def show(
        self, page: str = "", *, press: str = "", typed: dict[str, str] | None = None,
        fragment: str = "", query: str = "",
    ) -> Drawn:  # fmt: skip
        """Draw a page, as if the widget of the id ``press`` had been pressed and texts were typed
        into others."""
        self.send(page, press=press, typed=typed, fragment=fragment, query=query)
        drawn = Drawn()
        while True:
            data = self._socket.recv(PATIENCE)
            assert isinstance(data, bytes)
            forward = ForwardMsg.FromString(data)
            drawn.take(forward)
            if forward.WhichOneof("type") == "script_finished":
                if forward.script_finished != AGAIN:
                    return drawn
                drawn = Drawn()

    def send(
        self, page: str = "", *, press: str = "", typed: dict[str, str] | None = None,
        fragment: str = "", query: str = "",
    ) -> None:  # fmt: skip
        """The message of ``show``; of a fragment that this page never drew nothing comes back."""
        message = BackMsg()
        asked = message.rerun_script
        asked.page_name, asked.query_string, asked.fragment_id = page, query, fragment
        asked.context_info.timezone = "Europe/Zurich"
        states = [WidgetState(id=id, string_value=text) for id, text in (typed or {}).items()]
        if press:
            states.append(WidgetState(id=press, trigger_value=True))
        asked.widget_states.widgets.extend(states)
        self._socket.send(message.SerializeToString())
