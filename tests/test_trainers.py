"""The model in the training loops of other libraries: it learns, and what they save answers as it did."""

import pytest
import torch
from test_ecosystem import CLASSES, DIMS, sequences, small

from m3er_fast.fitted_module import size_learned

pytestmark = pytest.mark.slow

ROWS, EPOCHS = 64, 20


@pytest.fixture(scope="module")
def rows():
    """Utterances as a list of dicts, with labels that the audio's first feature gives."""
    features = sequences(ROWS)
    labels = (features["audio"][:, :, 0].mean(dim=1) > 0).long()
    return [{**{name: x[row] for name, x in features.items()}, "labels": labels[row]} for row in range(ROWS)]


@pytest.fixture(scope="module")
def held_out():
    """A batch that lacks a modality: check and proxies have a say."""
    return {"text": sequences(6, seed=1)["text"]}


class Wrapped(torch.nn.Module):
    """A module of the kind that Trainer calls: keywords in, loss and logits out."""

    def __init__(self, fusion):
        super().__init__()
        self.fusion = fusion

    def forward(self, text, audio, labels=None):
        output = self.fusion({"text": text, "audio": audio})
        loss = None if labels is None else self.fusion.loss(output, labels)
        return {"loss": loss, "logits": output.logits}


def fitted(rows):
    return small().fit({name: torch.stack([row[name] for row in rows]) for name in DIMS})


def accuracy(model, rows):
    model.eval()
    with torch.no_grad():
        output = model({name: torch.stack([row[name] for row in rows]) for name in DIMS})
    return (output.logits.argmax(dim=1) == torch.stack([row["labels"] for row in rows])).double().mean().item()


def answers(model, features):
    model.eval()
    with torch.no_grad():
        return model(features).logits


def test_lightning_trains_the_model_and_its_checkpoint_answers_as_the_model_does(rows, held_out, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, fusion):
            super().__init__()
            self.wrapped = Wrapped(fusion)

        def training_step(self, batch, _):
            return self.wrapped(**batch)["loss"]

        def validation_step(self, batch, _):
            self.log("loss", self.wrapped(**batch)["loss"])

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.02)

    module, batches = Module(fitted(rows)), torch.utils.data.DataLoader(rows, batch_size=16)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=EPOCHS, accelerator="cpu", enable_checkpointing=False, **quiet)
    trainer.fit(module, batches, batches)
    assert accuracy(module.wrapped.fusion, rows) > 0.85
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    unfitted = Module.load_from_checkpoint(tmp_path / "last.ckpt", fusion=small(), weights_only=False)
    assert torch.equal(answers(unfitted.wrapped.fusion, held_out), answers(module.wrapped.fusion, held_out))


def test_accelerate_trains_the_model_and_its_state_answers_as_the_model_does(rows, held_out, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Wrapped(fitted(rows))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    batches = torch.utils.data.DataLoader(rows, batch_size=8)
    prepared, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    for _ in range(EPOCHS):
        for batch in batches:
            with accelerator.accumulate(prepared):
                accelerator.backward(prepared(**batch)["loss"])
                optimizer.step()
                optimizer.zero_grad()
    assert accuracy(accelerator.unwrap_model(prepared).fusion, rows) > 0.85
    wanted = answers(model.fusion, held_out)
    accelerator.save_model(prepared, tmp_path / "weights")
    accelerator.save_state(tmp_path / "state")
    loaded = Wrapped(small())
    accelerate.load_checkpoint_in_model(size_of_folder(loaded, tmp_path / "weights"), str(tmp_path / "weights"))
    assert torch.equal(answers(loaded.fusion, held_out), wanted)
    torch.nn.init.zeros_(next(model.parameters()))
    accelerator.load_state(tmp_path / "state", strict=False)  # of the buffers that are empty, one was saved
    assert torch.equal(answers(model.fusion, held_out), wanted)


def size_of_folder(model, folder):
    """Give a model the sizes of a folder's weights."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        size_learned(model, {name: file.get_slice(name).get_shape() for name in file.keys()})  # noqa: SIM118
    return model


def test_the_trainer_of_transformers_trains_a_wrapper_and_resumes_from_its_checkpoint(rows, held_out, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    def trainer(model, epochs):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=epochs, per_device_train_batch_size=16, learning_rate=0.04,
            report_to=[], use_cpu=True, save_strategy="epoch", eval_strategy="epoch", disable_tqdm=True, seed=0,
        )  # fmt: skip
        return transformers.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)

    model = Wrapped(fitted(rows))
    trainer(model, EPOCHS).train()
    assert accuracy(model.fusion, rows) > 0.85
    last = max(tmp_path.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    resumed = Wrapped(small())
    predicting = trainer(resumed, EPOCHS)
    predicting.train(resume_from_checkpoint=str(last))  # there is nothing left to train
    assert torch.equal(answers(resumed.fusion, held_out), answers(model.fusion, held_out))
    model.eval()
    found = torch.from_numpy(predicting.predict(rows).predictions)
    wanted = [model(**{name: row[name][None] for name in DIMS})["logits"][0] for row in rows]
    torch.testing.assert_close(found, torch.stack(wanted).detach(), rtol=1e-4, atol=1e-5)


def test_a_pretrained_model_of_transformers_holds_the_fusion(rows, held_out, tmp_path):
    transformers = pytest.importorskip("transformers")

    class Config(transformers.PretrainedConfig):
        model_type = "fusion_inside"

        def __init__(self, sizes=None, **more):
            super().__init__(**more)
            self.sizes = sizes or {}

    class Model(transformers.PreTrainedModel):
        config_class = Config

        def __init__(self, config):
            super().__init__(config)
            self.fusion = small()
            size_learned(self, config.sizes)
            self.post_init()

        def _init_weights(self, module):
            """The fusion has initialised itself."""

    model = Model(Config())
    model.fusion.fit({name: torch.stack([row[name] for row in rows]) for name in DIMS})
    model.config.sizes = {name: list(value.shape) for name, value in model.state_dict().items()}
    model.save_pretrained(tmp_path)
    loaded = Model.from_pretrained(tmp_path)
    assert torch.equal(answers(loaded.fusion, held_out), answers(model.fusion, held_out))
    assert loaded.config.num_labels == CLASSES == loaded.fusion.num_classes
