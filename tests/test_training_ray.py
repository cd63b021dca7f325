"""Training by Ray Train: the losses of one process, and a lost worker or machine changes nothing."""

import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from test_training_workers import config_of, corpus_of

from m3er_fast.training import ResumeMismatchError, train

pytest.importorskip("ray.train", reason="needs Ray Train: pip install 'm3er-fast[ray]'")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="finds workers in /proc"),
]
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", autouse=True)
def ray_folder():
    """Ray's own folder, whose path is short, since some of its files are sockets; it marks this test's workers."""
    folder = tempfile.mkdtemp(prefix="m3er")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        patch.setenv("RAY_TMPDIR", folder)
        yield folder
    shutil.rmtree(folder, ignore_errors=True)


def workers_of(folder):
    """The processes of Ray Train's workers that were started with this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if folder in (process / "environ").read_text() and "RayTrainWorker" in (process / "cmdline").read_text():
                found.append(int(process.name))
        except (OSError, UnicodeDecodeError):
            continue  # it has ended, or is another user's
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    out, seen = tmp_path_factory.mktemp("whole") / "run", []
    config = config_of("labels", dropout=0.3, epochs=30)
    result = train(corpus_of("labels"), config, out=out, engine="ray", workers=2, progress=seen.append)
    return result, out, seen


def test_two_workers_have_the_losses_of_one_process():
    found = train(corpus_of("balanced"), config_of("balanced"), engine="ray", workers=2)
    wanted = train(corpus_of("balanced"), config_of("balanced"))
    for name in ("train_loss", "valid_loss"):
        np.testing.assert_allclose(found.history[name], wanted.history[name], rtol=1e-5)
    assert not found.model.training


def test_the_driver_is_told_every_epoch_and_no_notes_stay(uninterrupted):
    result, out, seen = uninterrupted
    assert [record.epoch for record in seen] == list(range(1, 31))
    assert [record.valid_loss for record in seen] == result.history["valid_loss"]
    assert {path.name for path in out.iterdir()} >= {"model.safetensors", "history.json"}
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


def test_a_killed_worker_changes_nothing(uninterrupted, ray_folder, tmp_path):
    killed = []

    def kill_one(record):
        if record.epoch >= 3 and not killed:
            killed.extend(workers_of(ray_folder)[:1])
            os.kill(killed[0], signal.SIGKILL)

    config = config_of("labels", dropout=0.3, epochs=30)
    train(corpus_of("labels"), config, out=tmp_path, engine="ray", workers=2, progress=kill_one)
    assert killed
    for name in ("model.safetensors", "history.json"):
        assert (tmp_path / name).read_bytes() == (uninterrupted[1] / name).read_bytes()


def test_another_run_in_the_folder_is_one_error_and_is_not_tried_again(uninterrupted):
    with pytest.raises(ResumeMismatchError, match="holds a training that differs"):
        train(corpus_of("labels"), config_of("labels"), out=uninterrupted[1], engine="ray", workers=2)
