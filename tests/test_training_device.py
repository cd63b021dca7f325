"""Training on any device, in any precision, without making the host wait within an epoch."""

import contextlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from device_waits import counted_waits
from test_training import CORPUS, RESUMED, Killed, assert_same_result, killed_after, settings

from m3er_fast import M3ERFusion
from m3er_fast.training import ResumeMismatchError, train
from m3er_fast.training import loop as loop_module
from m3er_fast.training.data import MemoryData
from m3er_fast.training.device import batches_on, find_device
from m3er_fast.training.state import TrainingState

# --- devices ---


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:1", "mps", "", None])
def test_other_names_of_devices_are_errors(name):
    with pytest.raises(ValueError, match=f"^device must be 'auto', 'cpu', 'cuda' or 'cuda:N', got {name!r}$"):
        train(CORPUS, settings(), device=name)


@pytest.mark.parametrize(("name", "gpus"), [("cuda", 0), ("cuda:0", 0), ("cuda:2", 2)])
def test_a_gpu_that_is_not_there_is_an_error(name, gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(ValueError, match=f"^device is {name!r}, but torch finds {gpus} GPUs here$"):
        find_device(name)


@pytest.mark.parametrize("has_gpu", [True, False])
def test_auto_is_a_gpu_if_there_is_one(has_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert find_device("auto") == torch.device("cuda" if has_gpu else "cpu")


def test_a_named_cpu_and_the_automatic_one_train_the_same(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = settings(epochs=2)
    assert_same_result(train(CORPUS, config, device="cpu"), train(CORPUS, config))


# --- copies and waits ---


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_the_next_batch_is_copied_before_one_is_used_and_each_is_waited_for(count, monkeypatch):
    """With stand-ins for torch's streams; an event is the number of copies that it stands behind."""
    split = MemoryData(CORPUS, seed=0).training
    batches = list(split.in_order(-(-split.rows // max(count, 1))))[:count]
    log, copied, pinned = [], [], []

    class Stream:
        def __init__(self, device):
            assert device.type == "cuda"

        def record_event(self):
            log.append(f"copied {len(copied) // 6}")
            return len(copied) // 6

        def wait_event(self, event):
            log.append(f"wait for {event}")

    def copy_to(x, device, non_blocking):
        assert non_blocking
        assert any(x is one for one in pinned)
        copied.append(x)
        return x

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda x: pinned.append(x) or x)
    monkeypatch.setattr(torch.Tensor, "to", copy_to)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda x, stream: None)
    found = []
    for batch in batches_on(torch.device("cuda"), iter(batches)):
        found.append(batch)
        log.append(f"use {len(found)}")
    for got, wanted in zip(found, batches, strict=True):
        assert torch.equal(got.features["text"], wanted.features["text"])
        assert torch.equal(got.target, wanted.target)
    assert len(copied) == 6 * count  # three modalities, lengths, availability and target
    expected = ["copied 1"] if count else []
    for number in range(1, count + 1):
        expected += [f"copied {number + 1}"] if number < count else []
        expected += [f"wait for {number}", f"use {number}"]
    assert log == expected


@pytest.mark.parametrize("epoch", ["training", "validation"])
def test_training_reads_the_loss_once_an_epoch_and_waits_for_nothing_else(epoch, monkeypatch):
    """The operations' own waits, which are the CPU's, are counted out: their tests hold those of a GPU."""
    data = MemoryData(CORPUS, seed=0)
    model = M3ERFusion(data.input_dims, 3, settings(epochs=1)).train()
    data.fit(model)
    state = TrainingState(model, {})
    steps, within = [], []
    waits = []

    def quiet(function):
        def call(*arguments, **options):
            before = len(waits)
            result = function(*arguments, **options)
            within.extend(waits[before:])
            del waits[before:]
            steps.append(function.__name__)
            return result

        return call

    monkeypatch.setattr(M3ERFusion, "forward", quiet(M3ERFusion.forward))
    monkeypatch.setattr(M3ERFusion, "loss", quiet(M3ERFusion.loss))
    monkeypatch.setattr(torch.Tensor, "backward", quiet(torch.Tensor.backward))
    # AdamW's count of steps is a tensor on the CPU wherever the weights are.
    monkeypatch.setattr(torch.optim.AdamW, "step", quiet(torch.optim.AdamW.step))
    with counted_waits(monkeypatch) as counted:
        waits = counted
        if epoch == "training":
            loop_module.train_epoch(state, data.training)
        else:
            loop_module.mean_loss(model, data.validation)
    assert steps.count("forward") == (-(-data.training.rows // 16) if epoch == "training" else 1)
    assert within  # the counter counts
    assert waits == ["aten::_local_scalar_dense"]


# --- precision ---


def in_bfloat16(**changes):
    return settings(precision="bfloat16", **changes)


def test_in_bfloat16_the_heads_are_rounded_and_nothing_else_is(monkeypatch):
    seen, loss = [], M3ERFusion.loss

    def record(model, output, target):
        value = loss(model, output, target)
        seen.append((output.logits.dtype, output.modality_logits.dtype, output.p_value.dtype, value.dtype))
        return value

    exact = train(CORPUS, settings(full=True, epochs=2))
    monkeypatch.setattr(M3ERFusion, "loss", record)
    rounded = train(CORPUS, in_bfloat16(full=True, epochs=2))
    assert set(seen) == {(torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)}
    ours, theirs = rounded.model.state_dict(), exact.model.state_dict()
    assert [x.dtype for x in ours.values()] == [x.dtype for x in theirs.values()]
    learned = [name for name in ours if name.startswith(("network.", "calibration."))]  # from its answers
    fitted = [name for name in ours if name not in learned]
    assert fitted
    assert all(torch.equal(ours[name], theirs[name]) for name in fitted)
    assert not any(torch.equal(ours[name], theirs[name]) for name in learned)
    # A head's sum is rounded to 8 bits, the loss of one of three classes begins near 4 log 3.
    for name in ("train_loss", "valid_loss"):
        np.testing.assert_allclose(rounded.history[name], exact.history[name], rtol=2**-7)


def test_a_killed_training_in_bfloat16_resumes_to_the_same_bits(tmp_path):
    config = in_bfloat16(full=True, epochs=3, network=replace(RESUMED.network))
    with pytest.raises(Killed):
        train(CORPUS, config, out=tmp_path / "run", progress=killed_after(2))
    with pytest.raises(ResumeMismatchError, match=r"differs: training\.precision = bfloat16, now float32\."):
        train(CORPUS, config.replace(training=replace(config.training, precision="float32")), out=tmp_path / "run")
    assert_same_result(train(CORPUS, config, out=tmp_path / "run"), train(CORPUS, config))


# --- on a GPU ---


@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-3), ("bfloat16", 2**-6)])
def test_the_losses_on_cuda_are_those_of_the_cpu_to_rounding(precision, tolerance, device):
    config = settings(full=True, epochs=3)
    expected = train(CORPUS, config, device="cpu")
    found = train(CORPUS, config.replace(training=replace(config.training, precision=precision)), device=str(device))
    for name in ("train_loss", "valid_loss"):
        np.testing.assert_allclose(found.history[name], expected.history[name], rtol=tolerance)
    assert {x.device.type for x in found.model.state_dict().values()} == {"cpu"}


@pytest.mark.gpu
@pytest.mark.parametrize(("first", "then"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_training_goes_on_on_another_device(first, then, tmp_path, device):
    on = {"cuda": str(device), "cpu": "cpu"}
    config = settings(full=True, epochs=4)
    with pytest.raises(Killed):
        train(CORPUS, config, out=tmp_path, device=on[first], progress=killed_after(2))
    found = train(CORPUS, config, out=tmp_path, device=on[then])
    expected = train(CORPUS, config, device="cpu")
    for name in ("train_loss", "valid_loss"):
        np.testing.assert_allclose(found.history[name], expected.history[name], rtol=1e-3)


@pytest.mark.gpu
def test_an_epoch_on_cuda_makes_the_host_wait_only_for_the_sum_of_its_losses(monkeypatch, device):
    data = MemoryData(CORPUS, seed=0)
    model = M3ERFusion(data.input_dims, 3, settings(epochs=1)).train()
    data.fit(model)
    state = TrainingState(model.to(device), {})
    loop_module.train_epoch(state, data.training)  # compiles the kernels
    mean = loop_module.LossSum.mean

    def read(total):
        torch.cuda.set_sync_debug_mode("default")
        return mean(total)

    monkeypatch.setattr(loop_module.LossSum, "mean", read)
    try:
        for epoch in (
            lambda: loop_module.train_epoch(state, data.training),
            lambda: loop_module.mean_loss(model, data.validation),
        ):
            torch.cuda.set_sync_debug_mode("error")
            assert np.isfinite(epoch())
    finally:
        torch.cuda.set_sync_debug_mode("default")
