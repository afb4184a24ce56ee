"""A build and a server as on a cluster: two Ray nodes without a shared folder, corpus and index in an S3 server; one node is killed.

    python examples/cluster.py --model MODEL_DIR --data corpus.jsonl

Everything runs on this machine and ends with the script: the S3 server (moto's; AWS_ENDPOINT_URL names another), and `ray start` twice,
each node with a folder of its own for what it reads. In the middle of the build, one node is killed and another one is started. Then two
actors, one on each node, search parts of the index, and the answer is compared with that of this process alone.

Needs the extras server and object-stores, and moto, flask, flask-cors and boto3.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

_BUCKET = "wherefrom-example"
_RAY = Path(sys.executable).with_name("ray")
_CLI = [sys.executable, "-c", "from wherefrom.cli import main; main()"]


def free_port():
    """A port that nobody listens on."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def wait_for(what, ready, process=None, seconds=120):
    """Wait until a function returns something true, and return that."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            result = ready()
            if result:
                return result
        if process is not None and process.poll() is not None:
            raise SystemExit(f"{what} ended with {process.returncode}")
        time.sleep(0.3)
    raise SystemExit(f"{what} did not start within {seconds} s")


class Processes:
    """Programs that end with the script, each with all that it started."""

    def __init__(self, folder):
        self.folder = folder
        self.running = []

    def start(self, name, command, **variables):
        """Start a program; what it prints goes to a file of its name."""
        environment = {**os.environ, **{name: str(value) for name, value in variables.items()}}
        with open(self.folder / f"{name}.log", "wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True)
        self.running.append(process)
        return process

    def kill(self, process):
        """Kill a program and all that it started, as a power failure does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def close(self):
        """Kill all."""
        for process in reversed(self.running):
            self.kill(process)


def start_store(processes):
    """Start an S3 server with a bucket, unless the environment names one."""
    if "AWS_ENDPOINT_URL" not in os.environ:
        port = free_port()
        os.environ |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "example",
            "AWS_SECRET_ACCESS_KEY": "example",
            "AWS_REGION": "us-east-1",
        }
        server = processes.start("s3", [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)])
        wait_for("the S3 server", lambda: socket.create_connection(("127.0.0.1", port), 1), server)
    import boto3

    boto3.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).create_bucket(Bucket=_BUCKET)


def start_node(processes, name, address, *options):
    """Start a Ray node with one CPU and a folder of its own."""
    cache = processes.folder / f"{name}-disk"
    where = ["--head", f"--port={address.rpartition(':')[2]}", "--include-dashboard=false"] if name == "head" else [f"--address={address}"]
    command = [str(_RAY), "start", *where, "--block", "--num-cpus=1", "--disable-usage-stats", *options]
    # A dead node is noticed within some seconds, where Ray's defaults take more than ten.
    health = {"initial_delay_ms": 1000, "period_ms": 500, "failure_threshold": 5}
    variables = {f"RAY_health_check_{name}": value for name, value in health.items()}
    return processes.start(name, command, WHEREFROM_CACHE=cache, RAY_AUTH_MODE="disabled", **variables)


def nodes(address):
    """The number of live nodes of the cluster, as a new process sees it."""
    code = (
        "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, logging_level=40); "
        "print('alive', sum(node['Alive'] for node in ray.nodes()))"
    )
    done = subprocess.run([sys.executable, "-c", code, address], check=False, capture_output=True, text=True)
    counts = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("alive ")]  # Ray may print, too
    return counts[0] if counts else 0


def main():
    """Run all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, type=Path)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--row", type=int, default=3)
    args = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    with tempfile.TemporaryDirectory(prefix="wherefrom-cluster-") as place:
        folder = Path(place)
        processes = Processes(folder)
        try:
            run(args, folder, processes)
        except BaseException:
            for log in sorted(folder.glob("*.log")):
                sys.stderr.write(f"--- {log.name}\n{log.read_text(errors='replace')[-2000:]}\n")
            raise
        finally:
            processes.close()


def run(args, folder, processes):
    """Build, kill a node, serve, ask."""
    from wherefrom import Client, Query, RemoteClient
    from wherefrom.store.objects import local_or_store

    start_store(processes)
    os.environ["WHEREFROM_CACHE"] = str(folder / "driver-disk")
    corpus = f"s3://{_BUCKET}/corpus"
    index = f"s3://{_BUCKET}/example.wherefrom"
    local_or_store(corpus).place[0].put(args.data.name, args.data)
    address = f"127.0.0.1:{free_port()}"
    start_node(processes, "head", address)
    wait_for("the head node", lambda: nodes(address) == 1)
    second = start_node(processes, "second", address)
    wait_for("the second node", lambda: nodes(address) == 2, second)

    options = ["--workers", "2", "-o", f"address={address}", "-o", "shard_rows=16", "-o", "group_rows=32"]
    build = processes.start("build", [*_CLI, "build", "--model", str(args.model), "--data", corpus, "--out", index, *options])
    rows = local_or_store(index) / "rows"
    wait_for("the build's first rows", lambda: len(rows.place[0].listing("rows")) >= 1, build, 300)
    processes.kill(second)
    sys.stdout.write(f"a node was killed when {len(rows.place[0].listing('rows'))} shards were built\n")
    third = start_node(processes, "third", address)
    if build.wait(600):
        raise SystemExit("the build failed")
    wait_for("the third node", lambda: nodes(address) == 2, third)

    port = free_port()
    serving = [*_CLI, "serve", index, "--ray", "--address", address, "--parts", "2", "--port", str(port)]
    server = processes.start("serve", serving)
    url = f"http://127.0.0.1:{port}"
    ready = json.loads(wait_for("the server", lambda: urllib.request.urlopen(f"{url}/readyz", timeout=5).read(), server))
    answer = RemoteClient(url).query(row=args.row, k=5)
    alone = Client(index).query(Query(row=args.row), k=5)
    same = [(a.row, a.score, a.text) for a in answer.proponents] == [(a.row, a.score, a.text) for a in alone.proponents]
    sys.stdout.write(f"{len(Client(index).index):,} rows, searched in parts {ready['parts']}; the answer is that of one process: {same}\n")
    for proponent in answer.proponents:
        sys.stdout.write(f"{proponent.rank:3d} {proponent.score:12.4g}  {proponent.text[:80]!r}\n")
    if not same:
        raise SystemExit("the answers differ")


if __name__ == "__main__":
    main()
