"""A cluster of three hosts, each with a network address of its own: one is cut off in the middle of a job."""

import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest
from network_hosts import INTERFACE, Hosts, why_not
from score_folder import contents
from scoring_problems import fitted_model, make_corpus
from test_training_workers import config_of, corpus_of

from m3er_fast.corpus import write_parquet
from m3er_fast.scoring import score
from m3er_fast.training import train

pytest.importorskip("ray.train", reason="needs Ray Train: pip install 'm3er-fast[ray]'")

PATIENCE = 400  # seconds
PORT = 6379  # on a host whose network nothing else uses
ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


class Cluster:
    """A Ray head and two more hosts with room for one worker each."""

    def __init__(self, hosts, folder):
        self.hosts, self.folder, self.address = hosts, folder, f"{hosts.addresses[0]}:{PORT}"
        quick = {"RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "2000"}
        self.environment = {
            **quick,
            "RAY_health_check_failure_threshold": "3",
            "GLOO_SOCKET_IFNAME": INTERFACE,  # the hosts' names do not lead to their addresses
            "RAY_AUTH_MODE": "disabled",  # nothing else reaches these hosts
            "RAY_TMPDIR": str(folder / "ray"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
        }
        (folder / "ray").mkdir()
        for host, ip in enumerate(hosts.addresses):
            role = (
                ["--head", f"--port={PORT}", "--include-dashboard=false"]
                if host == 0
                else [f"--address={self.address}"]
            )
            common = ["--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats"]
            ray = [sys.executable, "-c", "from ray.scripts.scripts import main; main()"]
            begun = self.start(host, *ray, "start", *role, f"--node-ip-address={ip}", *common)
            assert begun.wait(timeout=PATIENCE) == 0, self.log()

    def start(self, host, *words):
        return self.hosts.start(host, *words, log=self.folder / f"host{host}.log", **self.environment)

    def run(self, until, cut, *words):
        """Run a command line on the head, and cut the host off that ``cut`` names, once ``until`` holds."""
        driver = self.start(
            0, sys.executable, "-m", "m3er_fast.cli", *words, "--engine", "ray", "--address", self.address
        )
        deadline = time.monotonic() + PATIENCE
        while not until():
            assert driver.poll() is None, self.log()
            assert time.monotonic() < deadline, self.log()
            time.sleep(0.02)
        self.hosts.cut_off(cut())
        assert driver.wait(timeout=PATIENCE) == 0, self.log()

    def log(self):
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in sorted(self.folder.glob("host*.log")))


@pytest.fixture
def cluster():
    reason = why_not()
    if reason is not None:
        pytest.skip(f"network namespaces are not allowed here: {reason}")
    folder = Path(tempfile.mkdtemp(prefix="m3er"))  # short, since some of Ray's files there are sockets
    try:
        with Hosts(3) as hosts:
            yield Cluster(hosts, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_scores_are_the_same_bytes_when_a_host_is_cut_off(cluster, tmp_path):
    corpus = make_corpus(6000)
    write_parquet(corpus, tmp_path / "corpus", rows_per_shard=20)
    model = fitted_model(corpus.select(slice(0, 200)))
    model.save_pretrained(tmp_path / "model")
    score(tmp_path / "corpus", model, tmp_path / "wanted")
    out = tmp_path / "scores"
    cluster.run(
        lambda: len(list(out.glob("part-*.parquet"))) >= 10,
        lambda: 2,
        *("score", tmp_path / "corpus", "--model", tmp_path / "model", "--out", out, "--workers", 3),
    )
    assert contents(out) == contents(tmp_path / "wanted")


def test_weights_are_the_same_bytes_when_a_host_is_cut_off(cluster, tmp_path):
    corpus, config = corpus_of("labels"), config_of("labels", dropout=0.3, epochs=100)
    write_parquet(corpus, tmp_path / "corpus")
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    train(corpus, config, out=tmp_path / "wanted", engine="ray", workers=2)
    out = tmp_path / "run"
    cluster.run(
        lambda: (out / "checkpoint.pt").exists(),
        lambda: next(host for host in (1, 2) if cluster.hosts.runs(host, "RayTrainWorker")),
        *("train", tmp_path / "corpus", "--out", out, "--config", tmp_path / "config.json", "--workers", 2),
    )
    for name in ("model.safetensors", "history.json"):
        assert (out / name).read_bytes() == (tmp_path / "wanted" / name).read_bytes()
