"""An object store that speaks S3's protocol, in a process of its own: moto's server."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from time import sleep
from types import TracebackType
from typing import Any, Self

SETTINGS = {
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class ObjectStore:
    """A store with a bucket `pairs` on a free port of the loopback, and a client of it.

    Its objects are in memory: after `kill` and `start` it is empty. While it is open, the
    environment leads s3fs and boto3 to it.
    """

    def __init__(self) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.process: subprocess.Popen[bytes] | None = None
        self.before: dict[str, str | None] = {}

    def __enter__(self) -> Self:
        settings = SETTINGS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}"}
        self.before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        import s3fs

        self.kill()
        s3fs.S3FileSystem.clear_instance_cache()
        for name, value in self.before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value

    def start(self) -> None:
        import boto3

        command = [sys.executable, "-m", "moto.server", "-p", str(self.port)]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(300):
            with socket.socket() as connection:
                if connection.connect_ex(("127.0.0.1", self.port)) == 0:
                    break
            sleep(0.1)
        self.client: Any = boto3.client("s3")
        self.client.create_bucket(Bucket="pairs")

    def kill(self) -> None:
        if self.process is not None:
            self.client.close()
            self.process.kill()
            self.process.wait()
            self.process = None

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket="pairs", Key=key, Body=content)

    def put_folder(self, folder: Path, prefix: str) -> None:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                self.put(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())
