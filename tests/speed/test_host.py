"""What is free is what a control group leaves, where there is one that says less than the machine."""

from pathlib import Path

import psutil
import pytest

from repo_fast.speed import host as module
from repo_fast.speed.host import host_memory

GB = 10**9
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of control groups, on a machine of 64 GB of which 50 are free."""
    free = psutil.virtual_memory()._replace(available=50 * GB, total=64 * GB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(module, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(module, "_MEMBERSHIPS", tmp_path / "memberships")
    return tmp_path / "groups"


def limit(folder: Path, names: tuple[str, str, str], most: object, used: int, files: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in zip(names, (most, used, None), strict=True):
        if value is not None:
            (folder / name).write_text(f"{value}\n")
    (folder / "memory.stat").write_text(f"anon {used - files}\n{names[2]} {files}\nactive_file 7\n")


def test_without_control_groups_it_is_the_machine(groups: Path) -> None:
    assert host_memory() == (50 * GB, 64 * GB)


@pytest.mark.parametrize(
    ("member", "root", "names"), [("0::/job/step", "", VERSION_2), ("4:memory:/job/step", "memory", VERSION_1)]
)
def test_the_narrowest_group_counts(groups: Path, member: str, root: str, names: tuple[str, str, str]) -> None:
    module._MEMBERSHIPS.write_text(f"9:cpu:/other\n{member}\n")
    limit(groups / root / "job/step", names, "max" if names is VERSION_2 else 2**63 - 4096, 3 * GB, 0)
    assert host_memory() == (50 * GB, 64 * GB)
    # Of what its processes have, files that were read or written can be let go of.
    limit(groups / root / "job", names, 16 * GB, 10 * GB, 4 * GB)
    assert host_memory() == (10 * GB, 16 * GB)
    (groups / root / "job/memory.stat").unlink()
    assert host_memory() == (6 * GB, 16 * GB)
    limit(groups / root, names, 12 * GB, 13 * GB, 0)
    assert host_memory() == (0, 12 * GB)


def test_a_container_whose_own_group_is_the_root(groups: Path) -> None:
    module._MEMBERSHIPS.write_text("0::/of/the/host\n")
    limit(groups, VERSION_2, 8 * GB, 2 * GB, GB)
    assert host_memory() == (7 * GB, 8 * GB)
