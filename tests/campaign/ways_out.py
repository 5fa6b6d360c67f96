"""Ways out of a run's folder and of its machine: names, links, paths, ports."""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml

from repo_fast.jobs import checkpoint
from tests.campaign.book import Trial, Unavailable
from tests.campaign.runs import VLLM, vllm_python
from tests.campaign.traps import Place, call, renamed_in_manifest, sealed_again
from tests.job_runs import REPOSITORY, Job, snapshot
from tests.rollout.vllm_architectures import SIZES


def trials() -> Iterator[Trial]:
    """All of them."""
    for how in ("../", "absolute", "engine.json ../", "engine.json absolute"):
        yield Trial(f"a checkpoint: names that lead out of it, {how}", partial(_names_in_checkpoint, how))
    yield Trial("a checkpoint: links to files elsewhere", _linked_files)
    for name in _LINKS:
        yield Trial(f"a run's folder: a link named {name}", partial(_linked_folders, name))
    for launcher in _LAUNCHERS:
        yield Trial(f"ports of {launcher}", partial(_ports, launcher))
    yield Trial("ports of repo-fast where the host's name leads out", partial(_ports, "repo-fast", name_leads_out=True))
    for ranks in (1, 2):
        trial = partial(_ports, "repo-fast", options=(VLLM, f"--rollout.vllm.tensor_parallel {ranks}"))
        yield Trial(f"ports of repo-fast with vLLM, engines of {ranks}", trial)
    for of in _NAMED:
        yield Trial(f"names of {of} that lead out", partial(_names, of))
    yield Trial("paths with NUL and newlines", _odd_paths)


# ------------------------------------------------------------------------------------------------- checkpoints, folders


def _names_in_checkpoint(how: str, folder: Path) -> str:
    """Such a manifest would have files elsewhere read, and their sums and sizes told."""
    place = Place(folder)
    run = place.run()
    newest = checkpoint.checkpoints(run)[-1]
    shutil.rmtree(run / "policy")
    shard = next((newest / "policy").glob("shard-*"))
    outside = folder / "outside.safetensors"
    shutil.move(shard, outside)
    name = str(outside) if how.endswith("absolute") else os.path.relpath(outside, newest)
    if how.startswith("engine.json"):
        shutil.copy(outside, shard)
        # What lies outside is what was there before: read from there, it would go on to the same end.
        engine = json.loads((newest / "policy" / "engine.json").read_text())
        inner = str(outside) if how.endswith("absolute") else os.path.relpath(outside, newest / "policy")
        for pieces in engine["parameters"].values():
            pieces["parts"] = [[inner, *rest] for _, *rest in pieces["parts"]]
        (newest / "policy" / "engine.json").write_text(json.dumps(engine, indent=1))
        sealed_again(newest)
    else:
        renamed_in_manifest(newest, str(shard.relative_to(newest)), name)
    results = {
        "--verify": call("repo_fast.checkpoint", str(run), "--verify"),
        "--export": call("repo_fast.checkpoint", str(run), "--export", "2", str(place.out())),
        "--resume": place.resume(run, str(newest)),
    }
    # Of engine.json the manifest knows the sum, and nothing of what it says.
    expected = (
        {"--verify": 0, "--export": 2, "--resume": 2}
        if how.startswith("engine.json")
        else {"--verify": 3, "--export": 3, "--resume": 2}
    )
    assert {name: status for name, (status, _) in results.items()} == expected, results
    return f"refused: {results['--resume'][1].splitlines()[-1][-160:]}"


def _linked_files(folder: Path) -> str:
    """They are read, as the hub's own cache has them; what they hold is what the manifest says, or they are damaged."""
    place = Place(folder)
    run = place.run()
    newest = checkpoint.checkpoints(run)[-1]
    shard = next((newest / "policy").glob("shard-*"))
    shutil.move(shard, folder / "outside")
    shard.symlink_to(folder / "outside")
    assert call("repo_fast.checkpoint", str(run), "--verify")[0] == 0
    (folder / "outside").write_bytes(b"root:x:0:0")
    status, said = call("repo_fast.checkpoint", str(run), "--verify")
    assert status == 3 and "root" not in said, said
    return "followed; one to anything but what was written is damaged, and nothing of it is shown"


_LINKS = (
    "checkpoints/step-000001",
    "checkpoints/step-000003.partial",
    "checkpoints/step-000002.damaged",
    "policy.partial",
    "policy",
    "rehearsal.partial",
    "config.yaml",
    "metrics.jsonl",
    "samples.jsonl",
    "training_prompts.json",
    "plots/kl_and_entropy.png",
    *("checkpoints", "evaluations", "plots", "profile", "tensorboard"),
)


def _linked_folders(name: str, folder: Path) -> str:
    """Of a run that came from somewhere: what it leads to must be left alone by who goes on with it."""
    place = Place(folder)
    run = place.run("--stop_after 2")
    outside = folder / "outside"
    shutil.rmtree(run / "policy")
    if (run / name).is_dir():
        shutil.move(run / name, outside)
    else:
        outside.mkdir()
        (outside / "precious").write_text("mine")
    if name.endswith(".damaged"):
        (next((run / "checkpoints").glob("step-000002")) / "run.json").write_text("{}")
    if (run / name).is_file():
        # What would be written through it.
        shutil.move(run / name, outside / "precious")
        outside_file = outside / "precious"
    else:
        outside_file = outside
    (run / name).symlink_to(outside_file)
    before = snapshot(outside)
    words = place.job.words(run, "--algorithm.advantage rloo", "--data.ptx null", "--algorithm.ptx_coefficient 0")
    words += ["--checkpoint.every", "1", "--checkpoint.keep", "1", "--total_steps", "2", "--resume", "auto"]
    status, said = call("repo_fast.train", *words)
    assert status in (0, 2), said
    assert snapshot(outside) == before, f"changed: {[*snapshot(outside)]}"
    return f"exit status {status}; what it leads to is as it was"


# ---------------------------------------------------------------------------------------------------------------- ports


_JOB = ("--nproc-per-node", "2", "-m", "repo_fast.train")
_STANDALONE = ("torch.distributed.run", "--standalone", *_JOB)
_LAUNCHERS = {
    "one rank": ("repo_fast", "train", "--gpus", "1"),
    "repo-fast": ("repo_fast", "train", "--gpus", "2"),
    "torchrun": ("torch.distributed.run", "--rdzv-backend", "loopback", *_JOB),
}


def _ports(launcher: str, folder: Path, *, options: Sequence[str] = (), name_leads_out: bool = False) -> str:
    """Of all of a run's processes, from its start to its second step."""
    python, sizes = (vllm_python(), SIZES) if VLLM in options else (sys.executable, {})
    before = [*(_where_the_name_leads_out(folder) if name_leads_out else []), python, "-m"]
    job = Job.make(folder, **sizes)
    after = job.words(folder / "run", *options, "--cost.path tests.campaign.limited:cost_that_waits")
    hosts = _listening([*before, *_LAUNCHERS[launcher], *after], folder / "marks", {})
    assert all(_is_loopback(host) for host in hosts), f"they listen on {sorted(hosts)}"
    if launcher != "one rank":
        # That what is outside would be seen: torchrun's own rendezvous, and the ranks.
        shutil.rmtree(folder / "run")
        variables = {"GLOO_SOCKET_IFNAME": _outer()}
        outside = _listening([*before, *_STANDALONE, *after], folder / "other-marks", variables)
        everywhere = {"::", "0.0.0.0"}
        assert outside & everywhere and [host for host in outside - everywhere if not _is_loopback(host)], outside
    return f"its processes listen on {', '.join(sorted(hosts)) or 'nothing'}"


def _outer() -> str:
    """An interface that others reach."""
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family == socket.AF_INET and not address.address.startswith("127."):
                return name
    raise Unavailable("the machine has no interface but the loopback")


def _where_the_name_leads_out(folder: Path) -> list[str]:
    """The words before a command."""
    address = next(a.address for a in psutil.net_if_addrs()[_outer()] if a.family == socket.AF_INET)
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} {socket.gethostname()}\n")
    words = ["unshare", "--mount", "sh", "-c", f'mount --bind {folder / "hosts"} /etc/hosts && exec "$@"', "sh"]
    if subprocess.run([*words, "true"], capture_output=True).returncode:
        raise Unavailable("no right to mount")
    return words


def _listening(words: list[str], marks: Path, variables: dict[str, str]) -> set[str]:
    """Hosts that a run's processes listen on; it goes on to its end."""
    marks.mkdir()
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "TEST_MARKS": str(marks)}
    found: set[str] = set()
    with subprocess.Popen(
        words,
        cwd=REPOSITORY,
        env=environment | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as child:
        try:
            ends = time.monotonic() + 300
            while not (waiting := [*marks.glob("waiting-*")]):
                assert child.poll() is None and time.monotonic() < ends, child.communicate()[0][-2000:]
                found |= _of_all(child.pid)
                time.sleep(0.02)
            found |= _of_all(child.pid)
        finally:
            (marks / "go").touch()
            out = child.communicate()[0]
    assert child.returncode == 0 and waiting, out[-2000:]
    return found


def _of_all(pid: int) -> set[str]:
    """What a process and those that it has started listen on now."""
    found = set()
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            found |= _sockets(process.pid)
    return found


def _sockets(pid: int) -> set[str]:
    """What a process listens on, by the inodes of its sockets."""
    inodes = set()
    # A process that has ended, or a file that was closed, since it was listed.
    with contextlib.suppress(OSError):
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                inodes.add(os.readlink(link))
    found = set()
    for table, family, words in (("tcp", socket.AF_INET, 1), ("tcp6", socket.AF_INET6, 4)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            columns = line.split()
            if columns[3] == "0A" and f"socket:[{columns[9]}]" in inodes:
                address = columns[1].partition(":")[0]
                parts = [bytes.fromhex(address[8 * i : 8 * i + 8])[::-1] for i in range(words)]
                found.add(socket.inet_ntop(family, b"".join(parts)))
    return found


def _is_loopback(host: str) -> bool:
    return host.startswith(("127.", "::ffff:127.")) or host == "::1"


# ------------------------------------------------------------------------------------------------------ names and paths

_BAD_NAMES = ("../../x", "/etc/x", "a/b", "..", ".", "a\0b", "a\nb", "", "~", "-x", "a\x1b[31mb", "x" * 5000)
_NAMED = ("constraints", "heads", "policies", "claims", "fields", "suites", "checkpoint.keep_best")


def _names(of: str, folder: Path) -> str:
    place, seen = Place(folder), {}
    cost = {"path": "tests.scorers:cost"}
    for name in _BAD_NAMES:
        out = place.out()
        file = folder / "names.yaml"
        policies = {"a": str(place.folder / "policy")}
        scores = {"reward": {"path": "tests.scorers:reward"}, "resamples": 20, "samples_per_prompt": 2}
        scores |= {"prompts": place.prompts(), "sampling": {"max_new_tokens": 4}}
        module = "repo_fast.evaluate"
        if of == "policies":
            options: dict[str, Any] = {"policies": {name: policies["a"]}, "cost": cost, **scores}
        elif of == "claims":
            claim = {"statement": "unsafe_prompts", "limit": 0.5}
            options = {"policies": policies, "cost": cost, "certify": {"claims": {name: claim}}, **scores}
        elif of == "suites":
            scores.pop("prompts")
            options = {"policies": policies, "cost": cost, "suites": {"sources": {name: None}}, **scores}
        elif of == "heads":
            module, options = "repo_fast.score", yaml.safe_load((place.folder / "cost.yaml").read_text())
            options |= {"heads": {name: {}, "other": {}}}
        else:
            module, options = "repo_fast.train", yaml.safe_load((place.folder / "job.yaml").read_text())
            options["total_steps"] = 1
            if of == "constraints":
                del options["cost"]
                options["constraints"] = {name: cost, "other": cost}
            elif of == "fields":
                options["data"]["fields"] = {name: "ignore"}
            else:
                options["checkpoint"]["keep_best"] = name
                options["data"]["eval_prompts"] = place.prompts()
                options["evaluation"] = {"every": 1}
        file.write_text(yaml.safe_dump(options))
        before = _everything(folder, out)
        status, said = call(module, "--config", str(file), "--output_dir", str(out))
        # Those of a claim are verdicts.
        assert status in ((0, 2, 3, 4) if of == "claims" else (0, 2)), (name[:20], status, said[-500:])
        if status == 2:
            assert len(re.findall("^error: ", said, re.MULTILINE)) == 1 and said.endswith("\n"), (name, said)
            assert "\x1b" not in said and len(said) < 20_000, (name[:20], said[:200])
        assert (new := _everything(folder, out) - before) == set(), (name[:20], new)
        seen[name[:20]] = status
    taken = [name for name, status in seen.items() if status != 2]
    return f"{len(seen) - len(taken)} refused; taken: {taken}; nothing is written outside"


def _everything(folder: Path, but: Path) -> set[Path]:
    """What there is in a trial's folder beside a run's own, and, of such names, in places that others use too."""
    places = [folder.parent, Path("/etc"), Path("/"), REPOSITORY, Path.cwd(), Path.home()]
    tails = {name.rpartition("/")[2][:40] for name in _BAD_NAMES} - {"", ".", ".."}
    near = {path for place in places for path in place.iterdir() if path.name.partition(".")[0][:40] in tails}
    inside = {path for path in folder.rglob("*") if but not in (path, *path.parents) and path != but.parent}
    # The card of a certified policy belongs into its folder, and the looks at prompts are counted beside these.
    return near | {path for path in inside if path.name not in ("README.md", ".repo_fast_looks.jsonl")}


def _odd_paths(folder: Path) -> str:
    """Each option that is a path, in YAML, which can hold what a command line cannot."""
    place, count = Place(folder), 0
    train = ("policy.path", "reward.path", "cost.path", "data.prompts", "data.ptx", "data.eval_prompts", "resume")
    jobs = {
        "train": ("job", (*train, "output_dir", "evaluation.second_reward.path")),
        "sft": ("sft", ("model.path", "data.train", "data.eval", "output_dir", "resume")),
        "score": ("reward", ("model.path", "data.train", "data.eval", "output_dir", "resume")),
        "evaluate": (None, ("policies.a", "prompts", "reward.path", "cost.path", "output_dir", "cache_dir")),
    }
    for job, (source, options) in jobs.items():
        for option in options:
            for bad in (
                "a\0b",
                f"{folder}/a\0b",
                "a\nb",
                "guard:a\0b",
                "a\ud800",
            ):
                if source is None:
                    content: dict[str, Any] = {
                        "policies": {"a": str(place.folder / "policy")},
                        "cost": {"path": "tests.scorers:cost"},
                        "reward": {"path": "tests.scorers:reward"},
                        "prompts": place.prompts(),
                    }
                else:
                    content = yaml.safe_load((place.folder / f"{source}.yaml").read_text())
                inner, (*sections, last) = content, option.split(".")
                for section in sections:
                    inner = inner.setdefault(section, {})
                inner[last] = bad
                if option != "output_dir":
                    content["output_dir"] = str(place.out())
                file = folder / "odd.yaml"
                file.write_text(yaml.safe_dump(content))
                if option in ("output_dir", "cache_dir") and "\0" not in bad:
                    # A name like others, where it would be written to.
                    continue
                try:
                    status, said = call(f"repo_fast.{job}", "--config", str(file))
                except Exception as error:
                    raise AssertionError(f"{job} {option} {bad!r}: {type(error).__name__}: {error}") from error
                assert status == 2, (job, option, bad, status, said[-300:])
                lines = said[said.index("error: ") :]
                assert lines.count("\n") == 1, (job, option, bad, lines)
                count += 1
    return f"{count} refused in one line each"
