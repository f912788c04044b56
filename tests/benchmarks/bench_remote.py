"""First scan of images in S3 on this machine: one request after another, and read ahead.

python tests/benchmarks/bench_remote.py --images 500 --delay 0.02
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import boto3
import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

from simpletuner.helpers.configuration.schema.datasets import DatasetConfig
from simpletuner.helpers.data.index import ImageIndex
from simpletuner.helpers.data.sources.opening import scan_entry
from tests.storage_servers import BUCKET, KEY, SECRET

SERVER = """
import logging, sys, time
from moto.server import ThreadedMotoServer
logging.getLogger("werkzeug").setLevel(logging.ERROR)
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
time.sleep(3600)
"""


@contextmanager
def s3() -> Iterator[int]:
    """A server in a process of its own; its port."""
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield int(process.stdout.readline())
    finally:
        process.kill()


def delayed(port: int, delay_s: float) -> int:
    """The port of a proxy that passes each request on after a delay."""

    async def pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, wait_s: float) -> None:
        while data := await reader.read(1 << 16):
            await asyncio.sleep(wait_s)
            writer.write(data)
            await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pipe(reader, back, delay_s), pipe(there, writer, 0), return_exceptions=True)

    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    server = asyncio.run_coroutine_threadsafe(asyncio.start_server(serve, "127.0.0.1", 0), loop).result()
    return int(server.sockets[0].getsockname()[1])


def scan(address: str, *, ahead: bool) -> tuple[float, float]:
    """Seconds and CPU seconds of a first scan."""
    entry = DatasetConfig.model_validate(
        {
            "id": "photos",
            "instance_data_dir": f"s3://{BUCKET}",
            "aws_endpoint_url": address,
            "aws_access_key_id": KEY,
            "aws_secret_access_key": SECRET,
        }
    )
    with tempfile.TemporaryDirectory() as folder:
        started_s, cpu_s = time.perf_counter(), time.process_time()
        index, images = ImageIndex(Path(folder) / "index.json"), scan_entry(entry).images
        if ahead:
            index.expect(images)
        assert all(index.info(image).problem is None for image in images)
        return time.perf_counter() - started_s, time.process_time() - cpu_s


def main() -> None:
    """Print the medians of both, in turn."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--delay", type=float, default=0.02, help="seconds that each request takes longer")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with s3() as port:
        client = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name="us-east-1",
        )
        client.create_bucket(Bucket=BUCKET)
        with tempfile.TemporaryDirectory() as folder:
            for number in range(given.images):
                pixels = np.random.default_rng(number).integers(0, 255, (128, 128, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(f"{folder}/image.png")
                body = Path(f"{folder}/image.png").read_bytes()
                client.put_object(Bucket=BUCKET, Key=f"{number:05}.png", Body=body)
        address = f"http://127.0.0.1:{delayed(port, given.delay)}"
        found: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for _ in range(given.rounds):
            for ahead in found:
                found[ahead].append(scan(address, ahead=ahead))
        for ahead, times in found.items():
            name = "read ahead" if ahead else "one after another"
            wall_s, cpu_s = (median(column) for column in zip(*times, strict=True))
            print(f"{name:18} {wall_s:.2f} s, CPU {cpu_s:.2f} s")


if __name__ == "__main__":
    main()
