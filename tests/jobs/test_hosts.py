"""Two launchers on two hosts, which are network namespaces of this machine: also when the link between them is cut.

They need the right to make namespaces, as root has; without it the tests warn and are skipped.
"""

import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.campaign.runs import Kind, Started, assert_equal, newest_step, undisturbed

pytestmark = pytest.mark.slow

KIND = Kind(2)
PORT = 29517
# How long each waits for the other, and how much longer it may take to end: torchrun leaves its workers 30 s.
TIMEOUT, AND_TO_END = 20, 120


class Hosts:
    """Two of them, with one link."""

    def __init__(self) -> None:
        self.names = [f"repo-fast-{os.getpid()}-{host}" for host in "ab"]
        self.links = ["link-a", "link-b"]

    def make(self) -> None:
        (a, b), (link_a, link_b) = self.names, self.links
        for name in self.names:
            _ip("netns", "add", name)
        _ip("link", "add", link_a, "netns", a, "type", "veth", "peer", "name", link_b, "netns", b)
        for number, (name, link) in enumerate(zip(self.names, self.links, strict=True), 1):
            _ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", link)
            _ip("-n", name, "link", "set", "lo", "up")
        self.connect(True)

    def connect(self, up: bool) -> None:
        for name, link in zip(self.names, self.links, strict=True):
            _ip("-n", name, "link", "set", link, "up" if up else "down")

    def remove(self) -> None:
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)

    def start(self, output_dir: Path, *options: str) -> list[Started]:
        """A launcher on each."""
        words = KIND.words(output_dir, *options)
        ours = words[words.index("--no-python") :]
        started = []
        for number, (name, link) in enumerate(zip(self.names, self.links, strict=True)):
            launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(number)]
            launcher += ["--nproc-per-node", "1", "--master-addr", "10.77.0.1", "--master-port", str(PORT)]
            said = output_dir.parent / f"said-{number}-{time.monotonic_ns()}.txt"
            command = ["ip", "netns", "exec", name, *launcher, *ours]
            started.append(Started(command, output_dir, {"GLOO_SOCKET_IFNAME": link}, said))
        return started


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    made = Hosts()
    try:
        try:
            made.make()
        except (OSError, subprocess.CalledProcessError) as error:
            why = f"network namespaces cannot be made here ({getattr(error, 'stderr', '') or error})".replace("\n", " ")
            warnings.warn(f"not tested: two hosts, for {why}", stacklevel=1)
            pytest.skip(why)
        yield made
    finally:
        made.remove()


def test_two_hosts_train_as_two_ranks_of_one_do(hosts: Hosts, tmp_path: Path) -> None:
    started = hosts.start(tmp_path / "run")
    assert [launcher.end_alone() for launcher in started] == [0, 0], started[0].said + started[1].said
    assert not started[0].processes()
    assert_equal(tmp_path / "run", KIND)


def test_a_link_that_is_cut_in_a_step_ends_both_and_loses_nothing(hosts: Hosts, tmp_path: Path) -> None:
    _, seconds = undisturbed(KIND)
    started = hosts.start(tmp_path / "run", f"--timeout {TIMEOUT}")
    started[0].until_it_writes("checkpoints/step-000003")
    time.sleep(seconds / 20)
    hosts.connect(False)
    cut = time.monotonic()
    try:
        statuses = [launcher.end_alone(TIMEOUT + AND_TO_END) for launcher in started]
    finally:
        hosts.connect(True)
    assert all(statuses) and time.monotonic() - cut < TIMEOUT + AND_TO_END
    assert not started[0].processes()
    for launcher in started:
        assert len([line for line in launcher.said.splitlines() if line.startswith("error: ")]) == 1, launcher.said
    assert newest_step(tmp_path / "run") >= 3
    again = hosts.start(tmp_path / "run", "--resume auto")
    assert [launcher.end_alone() for launcher in again] == [0, 0], again[0].said + again[1].said
    assert_equal(tmp_path / "run", KIND)
