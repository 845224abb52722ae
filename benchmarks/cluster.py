"""The cost and robustness of a Ray cluster: a node killed during work, the cost of a case, 1,000 nodes by arithmetic.

Run with `python benchmarks/cluster.py DATA/Task04_Hippocampus OUT`, segkit[ray] installed; six minutes on two cores.
All on one machine, the first two parts with the hippocampus weights that are in this repository:

1. Two Ray nodes of one core do 20 cases. When a quarter is done, one of them is killed with its workers (SIGKILL). All
   masks must be there, equal to those of `--engine local` in voxels and headers, with one manifest and exit code 0.
2. The same 100 cases by the local engine, by one actor and by two: seconds a case once the first one is done, and the
   seconds before it, which are start-up.
3. What the machine that drives does for each case, measured with tasks that are nothing and with the records of the
   manifest, and from it how many nodes it can keep busy.
4. `segkit inpaint` on phantoms by both engines, with anomaly maps and a bank: all images must be equal in voxels and
   headers, and those that are filled equal to the scans wherever nothing was missing.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import nibabel as nib
import numpy as np

from segkit.batch.manifest import CaseRecord, Manifest
from segkit.runtime import variables_with

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "weights/hippocampus-revmbunet"
KILLED_CASES, TIMED_CASES = 20, 100
COHORTS = (1_000, 10_000, 100_000)
IN_FLIGHT = (10, 100, 1_000)
NODES = (10, 100, 1_000)
SECONDS_A_CASE = (1, 10, 60)
FILLED_CASES, FILLED_SIZE = 6, 48


def main() -> None:
    """The four parts."""
    if len(sys.argv) != 3:
        raise SystemExit("usage: python benchmarks/cluster.py DATA/Task04_Hippocampus OUT")
    source, out = Path(sys.argv[1]), Path(sys.argv[2])
    shutil.rmtree(out, ignore_errors=True)
    kill_a_node(source, out)
    overhead(source, out)
    project()
    fill_holes(out)


def kill_a_node(source: Path, out: Path) -> None:
    """Part 1."""
    cases = list_of_cases(source, out, KILLED_CASES)
    infer(source, out / "expected", cases, "--threads", "1").check()
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    with two_nodes(variables) as (address, second):
        options = ("--threads", "1", "--engine", "ray", "--ray-address", address)
        run = infer(source, out / "killed", cases, *options, **variables)
        while (done := len(list((out / "killed").glob("[!.]*.nii.gz")))) < KILLED_CASES // 4:
            assert run.process.poll() is None, "it ended before a node could be killed"
            time.sleep(0.01)
        killed = kill_with_descendants(second.pid)
        began = time.monotonic()
        code = run.process.wait()
        seconds = time.monotonic() - began
    manifests = list((out / "killed").glob("*manifest*"))
    records = json.loads((out / "killed/manifest.json").read_text())["cases"]
    equal = sum(is_same_image(path, out / "killed" / path.name) for path in (out / "expected").glob("[!.]*.nii.gz"))
    print(f"{killed} processes of one of two nodes killed after {done} masks; {seconds:.0f} s later: exit code {code},")
    print(f"{[record['status'] for record in records].count('done')} cases done, {equal} masks equal to the local")
    print(f"engine's, manifests: {', '.join(path.name for path in manifests)}\n")


def overhead(source: Path, out: Path) -> None:
    """Part 2."""
    cases = list_of_cases(source, out, TIMED_CASES)
    ray = ("--engine", "ray", "--ray-address", "local", "--threads", "1")
    engines = {
        "local, no overlap": ("--threads", "1", "--workers", "0"),
        "local": ("--threads", "1"),
        "ray, 1 actor": (*ray, "--workers", "1"),
        "ray, 2 actors": (*ray, "--workers", "2"),
        "ray, 2 actors, masks sent back": (*ray, "--workers", "2", "--results", "store"),
    }
    print(f"{'engine':32} start-up s   ms a case   of them in stages")
    for name, options in engines.items():
        folder = out / name.replace(" ", "-").replace(",", "")
        began = time.time()
        infer(source, folder, cases, *options).check()
        times = sorted(path.stat().st_mtime for path in folder.glob("[!.]*.nii.gz"))
        records = json.loads((folder / "manifest.json").read_text())["cases"]
        stages = 1000 * np.median([sum(record["seconds"].values()) for record in records])
        each = 1000 * (times[-1] - times[0]) / (len(times) - 1)
        print(f"{name:32} {times[0] - began:10.1f} {each:11.0f} {stages:15.0f}")
    print()


def project() -> None:
    """Part 3."""
    print("cases in the folder   manifest, ms a record   the file written once, ms")
    manifest_ms = 0.0
    for count in COHORTS:
        manifest_ms, whole_ms = manifest_cost(count)
        print(f"{count:19,} {manifest_ms:23.2f} {whole_ms:27.0f}")
    print("\ntasks in flight   driver, ms a task")
    driver_ms = 0.0
    for count in IN_FLIGHT:
        driver_ms = driver_cost(count)
        print(f"{count:15,} {driver_ms:19.2f}")
    busy_ms = manifest_ms + driver_ms
    print(f"\nThe driver takes {busy_ms:.2f} ms a case: {1000 / busy_ms:,.0f} cases a second at most.")
    print("seconds a case   actors it keeps busy   " + "   ".join(f"100,000 cases on {n:,} actors" for n in NODES))
    for seconds in SECONDS_A_CASE:
        actors = 1000 * seconds / busy_ms
        hours = [100_000 * max(seconds / nodes, busy_ms / 1000) / 3600 for nodes in NODES]
        print(f"{seconds:14} {actors:22,.0f}   " + "   ".join(f"{one:24.2f} h" for one in hours))


def fill_holes(out: Path) -> None:
    """Part 4."""
    scans, model, out = out / "phantoms", out / "inpainter", out / "filled-by"
    segkit("phantom", scans, "--cases", FILLED_CASES, "--size", FILLED_SIZE, "--inpainting").check()
    segkit("pretrain", scans, "-o", model, "--method", "inpainting", "--preset", "tiny", "-d", "cpu", "-q").check()
    for engine in ("local", "ray"):
        where = ("--engine", engine, *(("--ray-address", "local", "--workers", 2) if engine == "ray" else ()))
        written = ("-o", out / engine / "scans", "--anomaly", "--bank", out / engine / "bank")
        segkit("inpaint", "-m", model, "-i", scans, *written, "-d", "cpu", "--threads", 1, "-q", *where).check()
    names = sorted(path.relative_to(out / "local") for path in (out / "local").rglob("[!.]*.nii.gz"))
    equal = sum(is_same_image(out / "local" / name, out / "ray" / name) for name in names)
    has_same_bank = len({(out / engine / "bank/bank.json").read_bytes() for engine in ("local", "ray")}) == 1
    made_up = others = 0
    for scan in scans.rglob("*-t1n.nii.gz"):
        case = scan.parent.name
        differs = voxels(out / "ray/scans" / f"{case}-t1n-inference.nii.gz") != voxels(scan)
        is_missing = voxels(scan.with_name(f"{case}-mask.nii.gz")) != 0
        made_up += np.count_nonzero(differs & is_missing)
        others += np.count_nonzero(differs & ~is_missing)
    print(f"\n{FILLED_CASES} phantoms: {equal} of {len(names)} images of segkit inpaint are equal with both engines,")
    print(f"bank.json is the same: {has_same_bank}; {made_up:,} voxels were filled, {others} others changed")


def manifest_cost(count: int) -> tuple[float, float]:
    """Milliseconds for a record of a manifest of `count` cases, on average over all, and for writing it once."""
    ids = [f"case_{number:06d}" for number in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        manifest = Manifest(Path(folder), ids, {"model": {}}, "model")
        began = time.perf_counter()
        manifest.add()
        for case_id in ids:
            manifest.add(CaseRecord(case_id, "done", label_scheme="scheme", model="0123456789abcdef", window=(64,) * 3))
        manifest.close()
        ended = time.perf_counter()
        manifest.write()
        return 1000 * (ended - began) / count, 1000 * (time.perf_counter() - ended)


def driver_cost(in_flight: int, tasks: int = 2_000) -> float:
    """Milliseconds of the driver's own CPU for a task while so many are under way, with an actor that does nothing.

    Its threads stand for as many actors: the driver sends, waits and receives in the same way.
    """
    import ray

    @ray.remote(num_cpus=0, max_concurrency=in_flight)
    class Idle:
        def run(self, task: bytes) -> bytes:
            time.sleep(0.002)
            return task

    ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        actor = Idle.remote()
        task = bytes(2_000)
        ray.get(actor.run.remote(task))
        pending = {actor.run.remote(task) for _ in range(in_flight)}
        began, ended = time.process_time(), 0
        while ended < tasks:
            ready, _ = ray.wait(list(pending), num_returns=1)
            ready, _ = ray.wait(list(pending), num_returns=len(pending), timeout=0)
            for reference in ready:
                ray.get(reference)
                pending.remove(reference)
                pending.add(actor.run.remote(task))
                ended += 1
        return 1000 * (time.process_time() - began) / ended
    finally:
        ray.shutdown()


class Run:
    """A verb under way."""

    def __init__(self, command: list[str], variables: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(command, env=variables_with(PYTHONPATH=str(ROOT), **variables))

    def check(self) -> None:
        """Wait until it is done; it must have been."""
        if self.process.wait():
            raise SystemExit("segkit failed")


def segkit(*arguments: object, **variables: str) -> Run:
    """Start a verb."""
    return Run([sys.executable, "-m", "segkit", *map(str, arguments)], variables)


def infer(source: Path, out: Path, cases: Path, *options: str, **variables: str) -> Run:
    """Start one over the cases listed."""
    listed = ("--cases", cases, "-d", "cpu", "-q")
    return segkit("infer", "-m", MODEL, "-i", source, "-o", out, *listed, *options, **variables)


def list_of_cases(source: Path, out: Path, count: int) -> Path:
    """A file with the first `count` cases of the Decathlon's folder."""
    names = [path.name.removesuffix(".nii.gz") for path in sorted((source / "imagesTr").glob("hippo*.nii.gz"))]
    path = out / f"first_{count}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(names[:count]))
    return path


@contextlib.contextmanager
def two_nodes(variables: Mapping[str, str]) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The address of a cluster of two nodes of one core each on this machine, and the process of the second."""
    port, temporary = free_port(), tempfile.mkdtemp(prefix="ray")
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus", "1", "--disable-usage-stats"]
    store = ["--object-store-memory", str(100 * 2**20)]
    head = ["--head", "--port", str(port), "--include-dashboard=false", "--temp-dir", temporary]
    client = ["--ray-client-server-port", str(free_port())]
    environment = variables_with(PYTHONPATH=str(ROOT), **variables)
    quiet = {"env": environment, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    first = subprocess.Popen([*ray, *store, *head, *client], **quiet)
    second = None
    try:
        wait_for_port(port)
        second = subprocess.Popen([*ray, *store, "--address", f"127.0.0.1:{port}"], **quiet)
        joined = f"import ray, time; ray.init('127.0.0.1:{port}')\nwhile len(ray.nodes()) < 2: time.sleep(0.2)"
        subprocess.run([sys.executable, "-c", joined], check=True, timeout=60, **quiet)
        yield f"127.0.0.1:{port}", second
    finally:
        for process in (second, first):
            if process is not None:
                kill_with_descendants(process.pid)
                process.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def wait_for_port(port: int) -> None:
    """Until something listens there."""
    for _ in range(300):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.2)
    raise SystemExit("Ray did not start")


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as one:
        one.bind(("", 0))
        return int(one.getsockname()[1])


def kill_with_descendants(process: int) -> int:
    """SIGKILL for a process and all that it has started, children first frozen; how many there were."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()
            parents[int(stat.parent.name)] = int(fields[1])
    family = {process}
    while more := {child for child, parent in parents.items() if parent in family} - family:
        family |= more
    for one in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)
    return len(family)


def voxels(path: Path) -> np.ndarray:
    """What an image holds."""
    return np.asarray(nib.load(path).dataobj)


def is_same_image(one: Path, other: Path) -> bool:
    """Whether two images have the same header, byte by byte, and the same voxels."""
    if not other.exists():
        return False
    same_header = nib.load(one).header.binaryblock == nib.load(other).header.binaryblock
    return same_header and voxels(one).tobytes() == voxels(other).tobytes()


if __name__ == "__main__":
    main()
