"""Train on two ranks from a bucket and from a web server that fail, and compare with the disk.

nginx serves the shards themselves, or stands before moto's server, which speaks S3's protocol. It
is killed for a while in the middle of a run, slow, or answers a tenth of all requests with 503; the
cache holds half the data in all runs but one. One JSON object goes to stdout; the exit status is 1
unless every bundle has the bytes of the local run. Needs `nginx`.
"""

import argparse
import getpass
import gzip
import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from setting import describe_setting

ROOT = Path(__file__).resolve().parents[1]
NGINX = """
user {user}; daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
  log_format brief "$request_method $uri $status"; access_log {folder}/access.log brief;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy;
  fastcgi_temp_path {folder}/fastcgi; uwsgi_temp_path {folder}/uwsgi;
  scgi_temp_path {folder}/scgi;
  split_clients "$request_id" $busy {{ {busy} * 0; }}
  server {{
    listen 127.0.0.1:{port};
    location / {{ if ($busy) {{ return 503; }} limit_rate {rate}; {what} }}
  }}
}}
"""
AWS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
}


def free_port() -> int:
    """Return a port of the loopback that nothing listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_for(port: int) -> None:
    """Wait until something listens to a port."""
    for _ in range(600):
        with socket.socket() as connection:
            if connection.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise RuntimeError(f"nothing listens to port {port}")


def write_shards(folder: Path, samples_per_shard: int) -> int:
    """Write the emoji of the training split as plain tars with a manifest; return their bytes."""
    from vlm.data.config import SourceConfig
    from vlm.data.indexing import index_folder
    from vlm.data.shards import write_shards
    from vlm.data.source import open_source

    samples = open_source(SourceConfig(path=str(ROOT / "data/emoji")))
    folder.mkdir()
    write_shards(samples, folder, split="train", samples_per_shard=samples_per_shard)
    for path in folder.glob("*.gz"):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    index_folder(folder)
    return sum(path.stat().st_size for path in folder.glob("*.tar"))


@contextmanager
def bucket(folder: Path) -> Iterator[int]:
    """Run an object store with the files of a folder under `s3://pairs/emoji`; give its port."""
    import boto3

    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(port)
        os.environ.update(AWS)
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}")
        client.create_bucket(Bucket="pairs")
        for path in filter(Path.is_file, folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            client.put_object(Bucket="pairs", Key=f"emoji/{name}", Body=path.read_bytes())
        yield port
    finally:
        server.kill()
        server.wait()


class Nginx:
    """A server of `what`, on a port that stays when it is killed and started again."""

    def __init__(self, folder: Path, what: str, *, busy: int = 0, rate: str = "0") -> None:
        folder.mkdir()
        self.log, self.port = folder / "access.log", free_port()
        share = f"{busy}% 1;" if busy else ""
        text = NGINX.format(
            folder=folder, port=self.port, what=what, busy=share, rate=rate,
            user=getpass.getuser(),  # another one may not read a temporary folder
        )  # fmt: skip
        (folder / "nginx.conf").write_text(text)
        self.command = ["nginx", "-e", f"{folder}/error.log", "-c", f"{folder}/nginx.conf"]
        self.start()

    def start(self) -> None:
        """Start, and wait until it answers."""
        self.process = subprocess.Popen(self.command, start_new_session=True)
        wait_for(self.port)

    def kill(self) -> None:
        """Kill all of its processes at once."""
        os.killpg(self.process.pid, 9)
        self.process.wait()

    def requests(self) -> list[list[str]]:
        """Return method, path and status of every request."""
        return [line.split() for line in self.log.read_text().splitlines()]


def train(data: str, run: Path, options: argparse.Namespace, settings: Mapping[str, str]) -> Any:
    """Start a run on two ranks."""
    launcher = ["accelerate.commands.launch", "--config_file", "configs/accelerate/2-cpus.yaml"]
    words = {
        "config": "configs/train/emoji.yaml", "run_folder": run, "data.folder": data,
        "data.batch_size": 64, "data.workers": options.workers, "data.keep_decoded": "false",
        "schedule.steps": options.steps, "schedule.warmup_steps": 4, "evaluation.every_steps": 0,
        "checkpoint.every_steps": 0, "report_every": 1, **settings,
    }  # fmt: skip
    flags = [str(part) for name, value in words.items() for part in (f"--{name}", value)]
    port = ["--main_process_port", str(free_port())]
    return subprocess.Popen(
        [sys.executable, "-m", *launcher, *port, "-m", "vlm", "train", *flags],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "VLM_CACHE": str(run / "cache")},
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def steps_of(run: Path) -> int:
    """Return how many steps a run has reported."""
    path = run / "metrics.jsonl"
    return path.read_text().count('"loss"') if path.exists() else 0


def result_of(process: Any, run: Path, before: float) -> dict[str, Any]:
    """Wait for a run; return its bundle's hash and how long it took."""
    errors = process.communicate()[1]
    if process.returncode:
        said = [line for line in errors.splitlines() if line.startswith("vlm: ")]
        return {"failed": said or errors[-2000:]}
    weights = (run / "bundle/open_clip_model.safetensors").read_bytes()
    return {
        "sha256": hashlib.sha256(weights).hexdigest(),
        "seconds": time.monotonic() - before,
        "skipped_samples": (run / "skipped.jsonl").exists(),
    }


def away(server: Nginx, run: Path, options: argparse.Namespace) -> None:
    """Kill a server in the middle of a run, and start it again after a while."""
    while steps_of(run) < options.steps // 2:
        time.sleep(0.05)
    server.kill()
    time.sleep(options.away)
    server.start()


def measure(
    name: str, url: str, server: Nginx, run: Path, options: argparse.Namespace, size: int
) -> dict[str, Any]:
    """Train once from a place."""
    share, before = 2.0 if name == "roomy" else 0.5, time.monotonic()
    largest, stop = 0, threading.Event()
    process = train(url, run, options, {"data.cache_gib": str(share * size / 2**30)})
    helpers = [threading.Thread(target=away, args=(server, run, options), daemon=True)]
    for helper in helpers if name == "away" else []:
        helper.start()

    def watch() -> None:
        nonlocal largest
        while not stop.wait(0.1):
            found = (run / "cache/shards").glob("*")
            largest = max(largest, sum(path.stat().st_size for path in found if path.exists()))

    watcher = threading.Thread(target=watch)
    watcher.start()
    found = result_of(process, run, before)
    stop.set()
    watcher.join()
    fetched = Counter(path for method, path, _ in server.requests() if method == "GET")
    tars = [count for path, count in fetched.items() if path.endswith(".tar")]
    return found | {
        "cache_bytes": int(share * size),
        "largest_cache_bytes": largest,
        "requests": len(server.requests()),
        "answers_503": sum(status == "503" for *_, status in server.requests()),
        "shards_fetched": len(tars),
        "fetches_of_shards": sum(tars),
    }


def main() -> int:
    """Run every case, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--away", type=float, default=20.0, help="seconds")
    parser.add_argument("--rate", default="1m", help="bytes a second of a slow connection")
    parser.add_argument("--samples", type=int, default=400, help="in each shard")
    options = parser.parse_args()
    cases: dict[str, dict[str, Any]] = {
        "roomy": {}, "half": {}, "away": {}, "busy": {"busy": 10}, "slow": {"rate": options.rate},
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        size = write_shards(folder / "emoji", options.samples)
        before = time.monotonic()
        local = train(str(folder / "emoji"), folder / "local", options, {})
        expected = result_of(local, folder / "local", before)
        result: dict[str, Any] = {
            "setting": describe_setting("benchmarks/remote.py", threads=1),
            "data_bytes": size,
            "shards": len(list((folder / "emoji").glob("*.tar"))),
            "local": expected,
        }
        with bucket(folder / "emoji") as store:
            served = {
                "s3": (
                    f"proxy_pass http://127.0.0.1:{store}; proxy_set_header Host $http_host;",
                    lambda port: "s3://pairs/emoji",
                ),
                "http": (f"root {folder};", lambda port: f"http://127.0.0.1:{port}/emoji"),
            }
            for kind, (what, url) in served.items():
                for case, settings in cases.items():
                    server = Nginx(
                        folder / f"nginx {kind} {case}".replace(" ", "-"), what, **settings
                    )
                    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.port}"
                    run = folder / f"{kind}-{case}"
                    found = measure(case, url(server.port), server, run, options, size)
                    server.kill()
                    found["same_bytes"] = found.get("sha256") == expected["sha256"]
                    result[f"{kind} {case}"] = found
                    print(kind, case, found, file=sys.stderr)
    print(json.dumps(result, indent=1))
    return not all(found["same_bytes"] for name, found in result.items() if " " in name)


if __name__ == "__main__":
    sys.exit(main())
