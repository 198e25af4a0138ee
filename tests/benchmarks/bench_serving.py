"""A served sampler and a served scorer: latency and throughput with 1 and with 8 clients, and the server's memory.

``mlflow models serve`` on this machine's loopback, one worker, with the detector at 64×64 pixels and fresh weights: a
sample is one image of a seed, a score a projection of 20 steps with maps and overlays. A server answers one request at
a time: with 8 clients the others wait, and what 8 clients gain is the reading and writing of requests meanwhile.
"""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from medgen.data.phantom import make_thorax
from medgen.networks import StyleGAN2Generator
from medgen.serving import save_model

sys.path.insert(0, str(Path(__file__).parents[1]))
from mlflow_servers import Server

BUNDLE = Path(__file__).parents[2] / "bundles" / "stylegan2_anomaly"
CLIENTS = (1, 8)
SAMPLES, SCORES = 64, 16  # requests of a measurement
STEPS = 20
EARLY, LATE = 20, 500  # requests after which the memory is read
MEGABYTE = 2**20


def stage_model(stage: Path) -> Path:
    """The small detector with fresh weights as an MLflow model."""
    bundle = stage / "bundle"
    shutil.copytree(BUNDLE / "configs", bundle / "configs")
    path = bundle / "configs" / "serve.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"preset": "small_64"}))
    (bundle / "models").mkdir()
    torch.manual_seed(0)
    torch.save(StyleGAN2Generator.from_preset("small_64").state_dict(), bundle / "models" / "model.pt")
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    save_model(stage, metadata, {}, ["torch"]).save(stage / "model" / "MLmodel")
    return stage / "model"


@contextmanager
def serving(model: Path) -> Iterator[tuple[str, int]]:
    """Address of a server, and the id of its process."""
    command = ["mlflow", "models", "serve", "-m", str(model), "--env-manager", "local"]
    with Server([*command, "-h", "127.0.0.1", "-p", "{port}"], model.parent) as server:
        # MLflow's command waits for the server that it started
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children").read_text().split()
        yield f"{server.uri}/invocations", int(children[0])


def resident(process: int) -> int:
    """Bytes of a process that lie in memory."""
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def latency(url: str, body: dict[str, Any]) -> float:
    """Seconds of one request."""
    data = json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    start = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as answer:
        answer.read()
    return time.perf_counter() - start


def load(url: str, bodies: list[dict[str, Any]], clients: int) -> tuple[list[float], float]:
    """Latencies of requests in seconds, and requests per second of all clients together."""
    start = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        latencies = list(pool.map(lambda body: latency(url, body), bodies))
    return latencies, len(bodies) / (time.perf_counter() - start)


def run() -> list[tuple[str, float, str]]:
    """Measure.

    Returns:
        (name, ratio, detail): requests per second of 8 clients over those of one, and memory late over early.
    """
    os.environ["MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"] = "false"
    file = io.BytesIO()
    radiograph = make_thorax(np.random.default_rng(0), 512).image
    Image.fromarray(np.rint(radiograph * 255).astype(np.uint8)).save(file, format="PNG")
    image = base64.b64encode(file.getvalue()).decode()
    samples = [{"inputs": [], "params": {"task": "sample", "seed": seed}} for seed in range(SAMPLES)]
    scores = [{"inputs": [image], "params": {"steps": STEPS}}] * SCORES
    results = []
    with tempfile.TemporaryDirectory() as folder, serving(stage_model(Path(folder))) as (url, server):
        mixed = [samples[n % SAMPLES] if n % 5 else {**scores[0], "params": {"steps": 1}} for n in range(LATE)]
        load(url, mixed[:EARLY], 8)
        early = resident(server)
        for name, bodies in (("sample, 64×64", samples), (f"score, 64×64 in {STEPS} steps, of 512×512", scores)):
            rates, details = {}, []
            for clients in CLIENTS:
                times, rates[clients] = load(url, bodies, clients)
                slowest = sorted(times)[int(0.95 * len(times))]
                details.append(
                    f"{clients} client{'s' if clients > 1 else ''}: median {1000 * statistics.median(times):.0f} ms, "
                    f"95 % below {1000 * slowest:.0f} ms, {rates[clients]:.1f} requests/s"
                )
            results.append((f"{name}, 8 clients / 1", rates[8] / rates[1], "; ".join(details)))
        load(url, mixed[EARLY:], 8)
        late = resident(server)
        detail = f"{late / MEGABYTE:.0f} MiB against {early / MEGABYTE:.0f} MiB, the above in between"
        results.append((f"memory of the server after {LATE} requests / after {EARLY}", late / early, detail))
    return results


if __name__ == "__main__":
    for name, ratio, detail in run():
        print(f"{name}: {ratio:.2f}, {detail} ({torch.get_num_threads()} threads)")
