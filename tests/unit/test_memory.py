"""The KV pool of a server on CPU: what its requests can use, and room for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aurora_sgl import memory
from aurora_sgl.engine import pool

GIB = 1024**3
TARGET = {
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "hidden_size": 576,
    "max_position_embeddings": 8192,
}
DRAFTER = {**TARGET, "num_hidden_layers": 1, "head_dim": 64}
A_TOKEN = 31 * 3 * 64 * 2 * 2  # bytes in bfloat16


def choose(*args: str, available: int = 64 * GIB, **target: Any) -> pool.Pool | None:
    configs = [{**TARGET, **target}, DRAFTER]
    return pool.choose(configs, list(args), available, dtype="bfloat16")


def test_a_pool_holds_what_all_requests_can_use_and_no_more() -> None:
    found = choose()
    assert found is not None
    assert found.token_bytes == A_TOKEN
    assert 48 * 8192 <= found.tokens <= 48 * 8192 * 1.02
    few = choose("--max-running-requests", "4", "--context-length=1024")
    assert few is not None and 4 * 1024 <= few.tokens <= 4 * 1024 * 1.1


@pytest.mark.parametrize("available", [GIB, 3 * GIB, 13 * GIB])
@pytest.mark.parametrize(
    "args", [(), ("--max-running-requests=4096",), ("--kv-cache-dtype", "fp8_e5m2"), ("--dp", "2")]
)
def test_a_pool_leaves_two_thirds_of_the_memory(available: int, args: tuple[str, ...]) -> None:
    found = choose(*args, available=available)
    assert found is not None
    replicas = 2 if "--dp" in args else 1
    assert 0.99 * available / 3 - A_TOKEN <= replicas * found.bytes <= available / 3


@pytest.mark.parametrize(
    "args", [("--max-total-tokens", "4096"), ("--mem-fraction-static=0.5",)], ids=str
)
def test_what_the_user_says_of_the_pool_stands(args: tuple[str, ...]) -> None:
    assert choose(*args) is None


def test_where_a_config_does_not_say_enough_sglang_decides() -> None:
    assert choose(max_position_embeddings=None) is None
    assert pool.choose([{"kv_lora_rank": 512}, DRAFTER], [], GIB, dtype="bfloat16") is None


def test_bytes_of_a_token_follow_the_cache_and_the_model() -> None:
    sizes = [pool.choose([TARGET, DRAFTER], [], GIB, dtype=name) for name in ("float32", "float16")]
    assert [one.token_bytes for one in sizes if one] == [2 * A_TOKEN, A_TOKEN]
    half, tied = choose("--kv-cache-dtype=fp8_e4m3"), choose(num_key_value_heads=None)
    assert half is not None and half.token_bytes == A_TOKEN // 2
    assert tied is not None and tied.token_bytes == (30 * 9 + 3) * 64 * 2 * 2


def test_a_scaled_rope_has_the_scaled_length() -> None:
    linear = choose(rope_scaling={"rope_type": "linear", "factor": 4.0}, available=1 << 50)
    llama3 = {"factor": 8.0, "original_max_position_embeddings": 1024}
    same = choose(rope_scaling=llama3, available=1 << 50)
    assert linear is not None and same is not None
    assert linear.tokens > 3.9 * same.tokens


def group(folder: Path, names: tuple[str, str], limit: object, used: int, stat: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(stat)


def test_a_cgroup_counts_where_it_allows_less(tmp_path: Path) -> None:
    proc, root = tmp_path / "cgroup", tmp_path / "fs"
    assert list(memory.cgroup_rooms(proc, root)) == []
    v2 = ("memory.max", "memory.current")
    group(root / "pods" / "one", v2, 4 * GIB, 3 * GIB, f"anon 5\ninactive_file {GIB}\n")
    group(root / "pods", v2, "max", 9 * GIB, "")
    proc.write_text("0::/pods/one\n")
    assert list(memory.cgroup_rooms(proc, root)) == [2 * GIB]
    group(root / "pods", v2, 10 * GIB, 9 * GIB, "")
    assert sorted(memory.cgroup_rooms(proc, root)) == [GIB, 2 * GIB]


@pytest.mark.parametrize("path", ["/", "/docker/of-the-host"])
def test_a_container_finds_its_own_limit_at_the_mount(tmp_path: Path, path: str) -> None:
    proc, root = tmp_path / "cgroup", tmp_path / "fs"
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    group(root / "memory", v1, 6 * GIB, 7 * GIB, f"total_inactive_file {GIB // 2}\n")
    proc.write_text(f"9:name=systemd:/\n4:cpu,memory:{path}\n")
    assert list(memory.cgroup_rooms(proc, root)) == [0]


def test_what_is_available_is_less_than_the_machine_has() -> None:
    import psutil

    assert 0 < memory.available() <= psutil.virtual_memory().total
