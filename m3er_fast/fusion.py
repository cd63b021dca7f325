"""M3ERFusion: the whole model, as the paper's Figure 2 draws it: standardise, check, regenerate, classify.

Dimension legend: M modalities, B samples, T time steps, C classes, d_m features of modality m, P pairs of modalities.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from m3er_fast import functional
from m3er_fast._validation import can_look_at, not_fitted
from m3er_fast.check import CheckResult, ModalityCheck
from m3er_fast.config import M3ERConfig
from m3er_fast.cuda_graphs import CompiledInference, Stages
from m3er_fast.distributed import broadcast_state, fit_shares
from m3er_fast.fitted_module import eval_mode, ordinary_tensors
from m3er_fast.hub import HubModel
from m3er_fast.inputs import (
    Array,
    Features,
    FeatureSource,
    check_input_dims,
    check_mask,
    iterate_batches,
    prepare_batch,
)
from m3er_fast.loss import MultiplicativeFusionLoss, as_target
from m3er_fast.network import MemoryFusionNetwork, NetworkOutput
from m3er_fast.operands import LossOptions, modality_pairs, upcast
from m3er_fast.proxy import ProxyGenerator, ReplacedBatch
from m3er_fast.standardize import StandardizedBatch, Standardizer
from m3er_fast.temperature import TemperatureScaling


class M3EROutput(NamedTuple):
    """The model's output for a batch; every entry is finite."""

    logits: Tensor  # (B, C), from the fused head: the prediction
    modality_logits: Tensor  # (M, B, C), from each modality's own head, for the fusion loss
    fused: Tensor  # (B, 160 by default): multiplicatively fused features beside the memory
    effective: Tensor  # (B, M) bool, the modalities judged good; the available ones where no check ran
    correlation: Tensor  # (B, P), ρ of each pair; 0 where no check ran
    energy: Tensor  # (B, M); 0 where no check ran
    p_value: Tensor  # (B, M); 1 for available modalities where no check ran
    abstained: Tensor  # (B,) bool, no modality was effective: the sample was classified as it came
    available: Tensor  # (B, M) bool, the modalities that had a valid frame and were known from training
    reason: Tensor  # (B, M) int64, why a modality was rejected, an index of ``ModalityCheck.reasons``; 0 if it was not
    probabilities: Tensor  # (B, C), of the fused head, calibrated if the model's temperature is fitted


class _Answer(NamedTuple):
    """What the network says, and how sure it is."""

    network: NetworkOutput
    probabilities: Tensor  # (B, C)


class M3ERFusion(
    HubModel,
    library_name="m3er-fast",
    tags=["emotion-recognition", "multimodal"],
    license="mit",
    paper_url="https://arxiv.org/abs/1911.05659",
):
    """Multimodal emotion recognition that survives a lost modality (Mittal et al. 2020, arXiv 1911.05659).

    The modality check judges standardised features. Modalities that it judges ineffectual are regenerated from the
    good ones, and the memory fusion network classifies the result. Check and proxies act in eval mode only, unless
    ``config.check_in_training`` is set.

    Args:
        input_dims: feature count d_m of each modality; its order is the order of every (B, M) result.
        num_classes: number C of classes.
        config: all settings; see :class:`m3er_fast.M3ERConfig`.
        classes: names of the C classes, kept with the model; None numbers them.
        extraction: how its features are made from recordings (``Corpus.extraction``), kept with the model; None for
            features from elsewhere.

    Raises:
        ValueError: naming the argument that is out of range.

    Example:
        >>> model = M3ERFusion({"text": 300, "audio": 74, "face": 36}, num_classes=3)
        >>> features = {"text": torch.randn(64, 20, 300), "audio": torch.randn(64, 20, 74)}
        >>> loss = model.train().loss(model(features), torch.zeros(64, dtype=torch.int64))
    """

    @ordinary_tensors()
    def __init__(
        self,
        input_dims: Mapping[str, int],
        num_classes: int,
        config: M3ERConfig | None = None,
        classes: Sequence[str] | None = None,
        extraction: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.extraction = None if extraction is None else dict(extraction)
        given: Any = M3ERConfig() if config is None else config
        if not isinstance(given, M3ERConfig):
            way_out = ": M3ERConfig.from_dict(config) makes one" if isinstance(given, Mapping) else ""
            raise ValueError(f"config must be an M3ERConfig, got {type(given).__name__}{way_out}")
        self.config = config = given
        self.input_dims = check_input_dims(input_dims)
        if len(self.input_dims) < 2:
            raise ValueError(f"input_dims: fusion needs two modalities or more, got {self.input_dims}")
        if num_classes == 1 and config.loss.activation == "softmax":
            raise ValueError(
                "num_classes = 1: a softmax over one class is always 1; wanted two or more, or, for one yes/no "
                'question, LossConfig(activation="sigmoid")'
            )
        self.num_classes = num_classes
        self.network = MemoryFusionNetwork(self.input_dims, num_classes, **vars(config.network))
        self.classes = tuple(map(str, range(num_classes))) if classes is None else tuple(classes)
        are_names = not isinstance(classes, str) and all(isinstance(name, str) for name in self.classes)
        if not are_names or len(self.classes) != num_classes or len(set(self.classes)) != num_classes:
            raise ValueError(f"classes must be {num_classes} different names, got {classes!r}")
        self.standardizer = Standardizer(self.input_dims)
        self.modality_check = None if config.check is None else ModalityCheck(self.input_dims, **vars(config.check))
        self.proxy_generator = None if config.proxy is None else ProxyGenerator(self.input_dims, **vars(config.proxy))
        self.calibration = TemperatureScaling()
        options: Any = {name: value for name, value in vars(config.loss).items() if name in LossOptions._fields}
        self.criterion = MultiplicativeFusionLoss(
            class_weight=_weights("class_weight", config.loss.class_weight, num_classes),
            modality_weight=_weights("modality_weight", config.loss.modality_weight, len(self.input_dims)),
            **options,
        )

    def fit(self, features: FeatureSource, *, lengths: Array | None = None, available: Array | None = None) -> Self:
        """Learn the standardiser, the modality check and the proxy bank from clean training data.

        The network's weights stay as they are: train them with :meth:`loss`, like any module's, or with
        ``m3er_fast.training``.

        Args:
            features: mapping from modality to (N, T, d_m) or (N, d_m), or a re-iterable of such batches: mappings or
                (mapping, lengths, available) tuples. It is read several times.
            lengths: (N,) valid leading frames; only beside a mapping.
            available: (N, M) bool; only beside a mapping.

        Raises:
            ValueError: for bad input, naming it.

        Warns:
            UserWarning: if no utterance has all frames of the time axis, if some end in frames of zeros that count as
                valid, or if a modality has no valid frame at all; and as the check does.
        """
        self.standardizer.fit(features, lengths=lengths, available=available)

        def batches() -> Any:
            return map(
                self.standardizer.standardize,
                iterate_batches(features, lengths, available, input_dims=self.input_dims),
            )

        for step in (self.modality_check, self.proxy_generator):
            if step is not None:
                step.fit_batches(batches)
        return self

    def fit_distributed(
        self, features: FeatureSource, *, lengths: Array | None = None, available: Array | None = None
    ) -> Self:
        """Learn what :meth:`fit` learns from the data of all processes, each of which gives a share of its own.

        Call it in every process of ``torch.distributed``. The result is that of ``fit`` for all shares, one after the
        other in the order of the ranks, except for the order in which float64 sums are added up; with
        ``proxy.bank="basis"`` the basis is chosen in other rounds.

        Args:
            features: this process's share, as :meth:`fit` takes it. Keep the utterances of a recording together.
            lengths: (N,) valid leading frames; only beside a mapping.
            available: (N, M) bool; only beside a mapping.

        Raises:
            OtherRankError: if another process has failed, saying why.
            RuntimeError: if there is no process group.
            ValueError: for bad input, naming it, or if the models' settings differ between the processes.

        Warns:
            UserWarning: as ``fit`` does; of a few calibration samples on rank 0 only.
        """
        fit_shares(self.standardizer, self.modality_check, self.proxy_generator, features, lengths, available)
        return self.broadcast_fitted()

    def broadcast_fitted(self, src: int = 0) -> Self:
        """Give the standardiser, check, proxies and temperature of one process to all others, whatever they have.

        Call it in every process of ``torch.distributed``, before the model is wrapped in ``DistributedDataParallel``.
        The sizes of the fitted state, which follow the data, are sent before its content. The network is not sent:
        ``DistributedDataParallel`` does that.

        Args:
            src: rank of the process whose fitted state is sent.

        Raises:
            ValueError: if the models' settings differ between the processes, or there is no rank ``src``.
            RuntimeError: if there is no process group.
        """
        parts = {
            "standardizer": self.standardizer,
            "check": self.modality_check,
            "proxy": self.proxy_generator,
            "calibration": self.calibration,
        }
        settings: dict[str, Any] = {"input_dims": list(self.input_dims.items())}
        for name in ("check", "proxy"):
            config = getattr(self.config, name)
            settings[name] = "unused" if config is None else "used"
            settings |= {} if config is None else {f"{name}.{key}": value for key, value in vars(config).items()}
        broadcast_state(nn.ModuleDict({n: part for n, part in parts.items() if part is not None}), settings, src)
        return self

    def forward(
        self,
        features: Features,
        lengths: Array | None = None,
        available: Array | None = None,
        *,
        effective: Array | None = None,
    ) -> M3EROutput:
        """Classify a batch.

        Args:
            features: mapping from modality to a (B, T, d_m) or (B, d_m) tensor; missing or None: unavailable.
            lengths: (B,) valid leading frames, 0..T; None means all.
            available: (B, M) bool; None means every modality given.
            effective: (B, M) bool, a verdict from elsewhere that replaces the modality check's.

        Raises:
            NotFittedError: in eval mode with a check that is not fitted.
            ValueError: naming the modality, the shape got and the shape wanted.
        """
        batch = self.standardize(features, lengths, available)
        if not self.training or self.config.check_in_training or effective is not None:
            verdict = self._judge(batch, effective)
            replaced = self._replace_ineffectual(batch, verdict.effective)
        else:
            verdict = _trust_available(batch)
            replaced = ReplacedBatch(batch.features, ~batch.available.any(dim=1))
        return self._output(batch, verdict, replaced, self._classify(replaced.features, batch.lengths))

    def standardize(
        self, features: Features, lengths: Array | None = None, available: Array | None = None
    ) -> StandardizedBatch:
        """Return the features as check, proxies and network see them: the first step of :meth:`forward`.

        Arguments are those of :meth:`forward`. A modality that training never saw counts as unavailable, since no
        weight has learned to read it.
        """
        batch = self.standardizer.standardize(prepare_batch(features, lengths, available, input_dims=self.input_dims))
        count = self.standardizer.count
        if can_look_at(count) and (all(frames := count.tolist()) or not any(frames)):
            return batch
        known = (count > 0) | (count == 0).all()  # before any fit, all modalities count as known
        kept = [x.where(known[m], 0.0) for m, x in enumerate(batch.features)]
        return StandardizedBatch(kept, batch.lengths, batch.available & known, batch.frame_valid & known)

    def loss(self, output: M3EROutput, target: Array) -> Tensor:
        """Return the fusion loss of the modality heads + ``head_weight`` · cross entropy of the fused head, a scalar.

        Args:
            output: the output of :meth:`forward`.
            target: a tensor, an array or a list: (B,) labels, or (B, C) a distribution over classes or, with
                ``activation="sigmoid"``, answers to C yes/no questions; a label of -100 has no loss.

        Raises:
            ValueError: as :func:`m3er_fast.functional.fusion_loss` does, or if ``output`` is something else.
        """
        if not hasattr(output, "modality_logits"):
            raise ValueError(
                f"loss: output must be what the model returned, an M3EROutput, got {type(output).__name__}: the loss "
                "needs the logits of every modality beside the fused ones"
            )
        target = as_target(target, output.logits)
        fusion: Tensor = self.criterion(output.modality_logits, target, output.available)
        # With one modality the weight is 1: the fusion loss of the fused head alone is its cross entropy.
        head = functional.fusion_loss(
            output.logits[None],
            target,
            activation=self.config.loss.activation,
            class_weight=self.criterion.class_weight,
        )
        return fusion + self.config.loss.head_weight * head

    def fit_temperature(self, logits: Array, target: Array) -> Self:
        """Calibrate the probabilities: fit the temperature that divides the fused head's logits.

        Logits, losses and predictions stay as they are. ``m3er_fast.training`` does this after training.

        Args:
            logits: (N, C) logits of outputs in eval mode, of utterances that the model was not trained on.
            target: their labels, as for :meth:`loss`.

        Raises:
            ValueError: if they do not fit each other, or a logit is not finite.
        """
        logits = torch.as_tensor(logits)
        if logits.ndim != 2 or logits.shape[1] != self.num_classes or not logits.is_floating_point():
            raise ValueError(
                f"logits must be floats of shape (N, {self.num_classes}), got {logits.dtype} of {tuple(logits.shape)}"
            )
        self.calibration.fit(logits, as_target(target, logits), self.config.loss.activation)
        return self

    @torch.no_grad()
    def predict_proba(
        self,
        features: Features,
        lengths: Array | None = None,
        available: Array | None = None,
        *,
        effective: Array | None = None,
        calibrate: bool = True,
    ) -> Tensor:
        """Return class probabilities (B, C), in eval mode whatever mode the model is in.

        Arguments are those of :meth:`forward`, and ``calibrate``: False leaves the temperature out. With
        ``activation="softmax"`` the probabilities sum to 1; with "sigmoid" they are independent answers.
        """
        with eval_mode(self):
            return self.probabilities(self(features, lengths, available, effective=effective), calibrate=calibrate)

    def probabilities(self, output: M3EROutput, *, calibrate: bool = True) -> Tensor:
        """Return (B, C) probabilities of an output's fused head; ``calibrate=False`` leaves the temperature out."""
        return self._activate(self.calibration(output.logits) if calibrate else output.logits)

    def modality_probabilities(self, output: M3EROutput) -> Tensor:
        """Return (M, B, C) probabilities of an output's modality heads, each of which reads its modality alone.

        The temperature is the fused head's: these are as the heads give them.
        """
        return self._activate(output.modality_logits)

    def _activate(self, logits: Tensor) -> Tensor:
        logits = upcast(logits)
        return logits.sigmoid() if self.config.loss.activation == "sigmoid" else logits.softmax(dim=-1)

    def compile_for_inference(self, batch_size: int, steps: int = 1) -> CompiledInference[M3EROutput]:
        """Return this model for batches of one shape on a GPU, recorded in a pair of CUDA graphs.

        Standardising and checking are one graph, the network another; proxies, whose number differs from batch to
        batch, are computed between them. A call takes the arguments of :meth:`forward` and returns the same output
        with few launches and without gradients. Weights may change in place. A batch of another shape, or on another
        device, goes through the model itself, with a warning the first time. So does every batch on the CPU, where
        there are no CUDA graphs, and after ``to`` or ``fit``, which move the recorded tensors: then compile anew.

        Args:
            batch_size: number B of samples.
            steps: number T of frames.

        Raises:
            ValueError: if an argument is no positive int, or in train mode.
            NotFittedError: if the check is not fitted.
        """
        if self.training:
            raise ValueError("compile_for_inference: the model is in train mode, wanted eval mode: call eval() first")
        example = {
            name: self.standardizer.count.new_zeros((1, 1, dim), dtype=torch.float32)
            for name, dim in self.input_dims.items()
        }
        with torch.no_grad():
            self(example)  # raises if a fit is missing
        stages = Stages(self, self.standardize, self._judge, self._replace_ineffectual, self._classify, self._output)
        return CompiledInference(stages, self.input_dims, batch_size, steps, self.standardizer.count.device)

    def ablated(self, *, check: bool | ModalityCheck = True, proxy: bool = True) -> Self:
        """Return a model that shares all weights with this one, without its modality check or its proxies.

        Without the check every available modality counts as effective; without proxies ineffectual modalities are
        replaced by their training mean.

        Args:
            check: False takes the check away, another fitted check replaces it.
            proxy: False takes the proxies away.
        """
        clone = copy.copy(self)
        clone._modules = dict(self._modules)
        if check is not True:
            clone.modality_check = check or None
            clone.config = clone.config.replace(check=check.config if check else None)
        if not proxy:
            clone.proxy_generator = None
            clone.config = clone.config.replace(proxy=None)
        return clone

    # --- Steps ---

    def _judge(self, batch: StandardizedBatch, effective: Array | None = None) -> CheckResult:
        if effective is not None:
            mask = check_mask("effective", effective, batch.available.shape, batch.available.device)
            return _trust_available(batch)._replace(effective=mask & batch.available)
        if self.modality_check is not None:
            if not self.modality_check.is_fitted:
                raise _not_fitted("modality check")
            # A compiled backward pass goes through every result, used or not, and 0 times infinity is no gradient.
            with torch.set_grad_enabled(torch.is_grad_enabled() and not torch.compiler.is_compiling()):
                return self.modality_check.check_batch(batch)
        return _trust_available(batch)

    def _replace_ineffectual(self, batch: StandardizedBatch, effective: Tensor) -> ReplacedBatch:
        if self.proxy_generator is not None and (self.proxy_generator.is_fitted or self.modality_check is not None):
            if not self.proxy_generator.is_fitted:
                raise _not_fitted("proxy generator")
            return self.proxy_generator.proxy_batch(batch, effective)
        if (batch.is_complete and effective is batch.available) or (can_look_at(effective) and effective.all()):
            return ReplacedBatch(batch.features, effective.new_zeros(len(effective)))
        abstained = ~effective.any(dim=1)
        kept = effective | abstained[:, None]
        filled = [x.where(kept[:, m, None, None], 0.0) for m, x in enumerate(batch.features)]
        return ReplacedBatch(filled, abstained)

    def _classify(self, features: Sequence[Tensor], lengths: Tensor) -> _Answer:
        answer = self.network.classify(features, lengths)
        return _Answer(answer, self._activate(self.calibration(answer.logits)))

    @staticmethod
    def _output(batch: StandardizedBatch, verdict: CheckResult, replaced: ReplacedBatch, answer: _Answer) -> M3EROutput:
        effective, correlation, energy, p_value, reason = verdict
        return M3EROutput(
            *answer.network,
            effective,
            correlation,
            energy,
            p_value,
            replaced.abstained,
            batch.available,
            reason,
            answer.probabilities,
        )


def _trust_available(batch: StandardizedBatch) -> CheckResult:
    """Return the verdict where no check runs: every available modality is effective."""
    size, modalities = batch.available.shape
    zeros = batch.features[0].new_zeros
    return CheckResult(
        effective=batch.available,
        correlation=zeros((size, len(modality_pairs(modalities)))),
        energy=zeros((size, modalities)),
        p_value=batch.available.to(batch.features[0].dtype),
        reason=torch.zeros_like(batch.available, dtype=torch.int64),
    )


def _not_fitted(step: str) -> Exception:
    return not_fitted(
        f"this model's {step} is not fitted: call model.fit(features) with clean training data, or take "
        "model.ablated(check=False, proxy=False), which needs no fit"
    )


def _weights(name: str, values: Sequence[float] | None, size: int) -> Tensor | None:
    if values is None:
        return None
    if len(values) != size:
        raise ValueError(f"loss.{name} has {len(values)} values, wanted {size}")
    return torch.tensor(values)
