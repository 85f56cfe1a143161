"""What a server learnt of its trees outlives it in the store."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import msgspec
import pytest
from sqlalchemy import Engine

from aurora_sgl import store, wire
from aurora_sgl.sidecar.servers import Registration
from aurora_sgl.sidecar.tree_keeper import TreeKeeper
from aurora_sgl.store import queries
from aurora_sgl.store.link import StoreLink
from tests.support import store_samples as samples

STATE = {"whole": [3, 4, 8], "groups": {"1": {"rate": [1.5, 2.0, 3.0]}}}


@dataclass
class House:
    """One server's boots in turn, and what their sidecars send."""

    engine: Engine
    sent: list[wire.Command] = field(default_factory=list)
    reaches: bool = True

    def __post_init__(self) -> None:
        with store.session(self.engine) as s:
            group = queries.groups.ensure_group(s, "default", "target", "", "Eagle3")
            self.registration = Registration(1, group.id, 7)

    def keeper(self) -> TreeKeeper:
        url = self.engine.url.render_as_string(hide_password=False)
        return TreeKeeper(StoreLink(url), self.send)

    def send(self, command: wire.Command) -> bool:
        if self.reaches:
            self.sent.append(wire.decode_command(wire.encode(command)))
        return self.reaches


@pytest.fixture
def house(engine: Engine) -> House:
    return House(engine)


def hello(boot_id: int = 1, **change: object) -> wire.Hello:
    given = samples.hello()
    one = wire.Hello(boot_id, 1, {**given.server, "name": "here"}, 0, 0, 0, {"trees": 1.0})
    return msgspec.structs.replace(one, **change)


def test_the_next_boot_is_told_what_the_last_one_learnt(house: House) -> None:
    keeper = house.keeper()
    keeper.tick(house.registration, hello())
    assert not house.sent, "there is nothing yet"
    keeper.tick(house.registration, hello(trees=STATE))
    after = house.keeper()
    house.reaches = False
    after.tick(house.registration, hello(2))
    house.reaches = True
    for _ in range(3):
        after.tick(house.registration, hello(2))
    assert house.sent == [wire.Trees(STATE, same_drafter=True)]


def test_a_boot_with_another_drafter_is_told_so(house: House) -> None:
    for trees in ({}, STATE):
        house.keeper().tick(house.registration, hello(trees=trees))
    keeper = house.keeper()
    keeper.tick(house.registration, hello())
    keeper.tick(house.registration, hello(trees=STATE))
    house.keeper().tick(replace(house.registration, boot_version_id=8), hello(3))
    assert house.sent[-1] == wire.Trees(STATE, same_drafter=False)


def test_servers_of_other_names_and_those_without_trees_are_left_alone(house: House) -> None:
    keeper = house.keeper()
    keeper.tick(house.registration, hello())
    keeper.tick(house.registration, hello(trees=STATE))
    other = hello(4, server={**hello().server, "name": "there"})
    house.keeper().tick(house.registration, other)
    house.keeper().tick(house.registration, hello(5, counters={}))
    assert not house.sent


def test_what_no_database_takes_is_kept_without_it(house: House) -> None:
    keeper = house.keeper()
    keeper.tick(house.registration, hello())
    keeper.tick(house.registration, hello(trees={"rate": float("nan"), "a\x00": 1}))
    house.keeper().tick(house.registration, hello(6))
    assert house.sent == [wire.Trees({"rate": None, "a": 1}, same_drafter=True)]
