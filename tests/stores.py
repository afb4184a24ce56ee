"""A real S3 server on loopback for tests: moto's, in a process of its own; and a proxy before it that slows, refuses and breaks off."""

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BUCKET = "bucket"


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def environment(port, cache):
    """The variables by which obstore finds the server."""
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_REGION": "us-east-1",
        "WHEREFROM_CACHE": str(cache),
    }


@contextmanager
def s3_server():
    """Give the port of a server with an empty bucket."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as server:
        try:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                try:
                    put_bucket(port)
                    break
                except OSError:
                    time.sleep(0.2)
            yield port
        finally:
            server.kill()


def put_bucket(port):
    import boto3

    client = boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{port}", aws_access_key_id="key", aws_secret_access_key="secret", region_name="us-east-1"
    )
    try:
        client.create_bucket(Bucket=BUCKET)
    except Exception as error:
        raise OSError(str(error)) from error


class Proxy:
    """A proxy before the server. `trouble(method, path, count)` says what happens to a request: None, "slow", "refuse", "break"."""

    def __init__(self, port):
        self.trouble = lambda method, path, count: None
        self.requests = []
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def pass_on(self):
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                proxy.requests.append((self.command, self.path))
                what = proxy.trouble(self.command, self.path, len(proxy.requests))
                if what == "refuse":
                    self.send_response(503)
                    self.send_header("content-length", "0")
                    self.end_headers()
                    return
                if what == "slow":
                    time.sleep(0.2)
                connection = http.client.HTTPConnection("127.0.0.1", port)
                headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
                connection.request(self.command, self.path, body, {**headers, "Host": f"127.0.0.1:{port}"})
                response = connection.getresponse()
                content = response.read()
                self.send_response(response.status)
                for name, value in response.getheaders():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                size = int(response.getheader("content-length") or len(content)) if self.command == "HEAD" else len(content)
                self.send_header("content-length", str(size))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content[: len(content) // 2] if what == "break" else content)
                if what == "break":
                    self.close_connection = True
                connection.close()

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = pass_on  # noqa: N815

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self):
        self._server.shutdown()
