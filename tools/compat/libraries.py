"""torch.ao, and libraries that are not torch's."""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic

from compat.registry import LAYERS, B, H, I, Library, Section, T, same, total

libraries = Section("Other libraries")
row = libraries.row
X = torch.randn(T, B, I)
ROWS = X.transpose(0, 1).contiguous()


@row(
    "torch.ao: quantize_dynamic makes the layer int8",
    exception="it warns, and names two ways: `rnnkernels.revert(model)` first, or the weights of 8 "
    "bits of `rnnkernels.serving` "
    "([what differs](leaving_and_coming_back.md#quantize_dynamic)).",
)
def _(library: Library) -> None:
    model = library.model()
    kinds = {type(model.layer)}
    done = quantize_dynamic(model, kinds, dtype=torch.qint8)
    assert "quantized" in type(done.layer).__module__


@row("torch.ao: quantize_dynamic after rnnkernels.revert", ours_only=True)
def _(library: Library) -> None:
    model = library.module.revert(library.model()).eval()
    done = quantize_dynamic(model, {nn.LSTM, nn.Linear}, dtype=torch.qint8)
    assert "quantized" in type(done.layer).__module__
    same(done(X), model(X), 0.05)


@row("torchao: quantize_ of a model that holds a layer", needs=["torchao"])
def _(library: Library) -> None:
    quantization = importlib.import_module("torchao.quantization")
    model = library.model().eval()
    want = model(X)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    same(model(X), want, 0.05)


class Classified(nn.Module):
    """Rows in, a class out."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.head = output_alone(layer), nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.layer(x)[:, -1])
        return result


def output_alone(layer: Any) -> Any:
    """The layer, which gives no states any more: opacus multiplies what modules give."""
    kind = type(layer)

    class Alone(kind):  # type: ignore[misc,valid-type]
        def forward(self, x: Tensor) -> Any:
            return super().forward(x)[0]

    layer.__class__ = Alone
    return layer


def classified(library: Library, kind: str = "LSTM") -> Classified:
    return Classified(library.make(kind, batch_first=True))


@row("opacus: GradSampleModule, gradients of each sample", needs=["opacus"])
def _(library: Library) -> None:
    opacus = importlib.import_module("opacus")
    for kind in LAYERS:
        model, twin = classified(library, kind), classified(library, kind)
        twin.load_state_dict(model.state_dict())
        wrapped = opacus.GradSampleModule(
            model, strict=False, force_functorch=True, loss_reduction="sum"
        )
        wrapped(ROWS).square().sum().backward()
        parameters: list[Any] = list(model.parameters())
        for i in range(B):
            loss = twin(ROWS[i : i + 1]).square().sum()
            want = torch.autograd.grad(loss, list(twin.parameters()))
            same([p.grad_sample[i] for p in parameters], list(want))


@row("opacus: make_private, an epoch", needs=["opacus"])
def _(library: Library) -> None:
    opacus = importlib.import_module("opacus")
    model = classified(library)
    data = torch.utils.data.TensorDataset(torch.randn(8, T, I), torch.randint(0, 2, (8,)))
    model, optimizer, loader = opacus.PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(model.parameters(), 0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode="functorch",
    )
    for x, y in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())


@row("lightning: Trainer.fit, checkpoint, clipping, bf16-mixed", needs=["lightning"], costly=True)
def _(library: Library) -> None:
    lightning = importlib.import_module("lightning")

    class Task(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = classified(library)

        def training_step(self, batch: Any, _: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]).float(), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters())

    data = torch.utils.data.TensorDataset(torch.randn(8, T, I), torch.randint(0, 2, (8,)))
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_epochs=1,
            default_root_dir=folder,
            gradient_clip_val=1.0,
            precision="bf16-mixed",
            deterministic=True,
            logger=False,
            enable_progress_bar=False,
        )
        task = Task()
        try:
            trainer.fit(task, torch.utils.data.DataLoader(data, batch_size=4))
        finally:
            torch.use_deterministic_algorithms(False)
        (path,) = Path(folder).rglob("*.ckpt")
        twin = Task()
        twin.load_state_dict(torch.load(path, weights_only=False)["state_dict"])
    same(twin.model(ROWS), task.model(ROWS))


@row("accelerate: prepare, backward, save_state, load_state", needs=["accelerate"])
def _(library: Library) -> None:
    accelerator = importlib.import_module("accelerate").Accelerator(cpu=True)
    model = library.model()
    prepared, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
    accelerator.backward(total(prepared(X)))
    with tempfile.TemporaryDirectory() as folder:
        accelerator.save_state(folder)
        want = prepared(X)
        optimizer.step()
        assert (prepared(X) != want).any()
        accelerator.load_state(folder)
    same(prepared(X), want)


@row(
    "accelerate: init_empty_weights, load_checkpoint_and_dispatch, cpu_offload",
    needs=["accelerate"],
)
def _(library: Library) -> None:
    accelerate = importlib.import_module("accelerate")
    whole = library.model()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "weights.bin"))
        torch.save(whole.state_dict(), path)
        with accelerate.init_empty_weights():
            empty = library.model()
        loaded = accelerate.load_checkpoint_and_dispatch(empty, path, device_map={"": "cpu"})
    same(loaded(X), whole(X))
    accelerate.cpu_offload(loaded, execution_device=torch.device("cpu"))
    same(loaded(X), whole(X))


@row("safetensors: save_model, load_model", needs=["safetensors"])
def _(library: Library) -> None:
    files = importlib.import_module("safetensors.torch")
    model, twin = library.model(), library.model("LSTM")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "model.safetensors"))
        files.save_model(model, path)
        files.load_model(twin, path)
    same(twin(X), model(X))


@row("transformers: PreTrainedModel, save_pretrained, from_pretrained", needs=["transformers"])
def _(library: Library) -> None:
    transformers = importlib.import_module("transformers")

    class Config(transformers.PretrainedConfig):  # type: ignore[name-defined,misc]
        model_type = "recurrent"

    class Pretrained(transformers.PreTrainedModel):  # type: ignore[name-defined,misc]
        config_class = Config

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.model = library.model()
            self.post_init()

        def forward(self, x: Tensor) -> Any:
            return self.model(x)

    model = Pretrained(Config())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        twin = Pretrained.from_pretrained(folder)
    same(twin(X), model(X))


@row("torchinfo.summary counts parameters and multiplications", needs=["torchinfo"])
def _(library: Library) -> None:
    model = library.model()
    found = importlib.import_module("torchinfo").summary(model, input_data=X, verbose=0)
    assert found.total_params == sum(p.numel() for p in model.parameters())
    assert found.total_mult_adds > 0


@row("tensordict: TensorDict.from_module, an ensemble by vmap", needs=["tensordict"])
def _(library: Library) -> None:
    tensordict = importlib.import_module("tensordict")
    models = [library.model("GRU") for _ in range(2)]
    stacked = tensordict.TensorDict.from_modules(*models, as_module=True)

    def run(parameters: Any, x: Tensor) -> Any:
        with parameters.to_module(models[0]):
            return models[0](x)

    found = torch.vmap(run, in_dims=(0, None))(stacked, X)
    same(found, torch.stack([model(X) for model in models]))


@row("torchrl: LSTMModule and GRUModule with a given layer", needs=["torchrl"])
def _(library: Library) -> None:
    modules = importlib.import_module("torchrl.modules")
    data = importlib.import_module("tensordict").TensorDict
    keys = {"LSTM": ["h", "c"], "GRU": ["h"]}
    for kind, states in keys.items():
        layer = library.make(kind, batch_first=True)
        nexts = [("next", name) for name in states]
        wrapper = getattr(modules, f"{kind}Module")
        module = wrapper(**{kind.lower(): layer}, in_keys=["x", *states], out_keys=["y", *nexts])
        given = {"x": ROWS[:, 0], "is_init": torch.zeros(B, 1, dtype=torch.bool)}
        found = module(data({**given, **{n: torch.zeros(B, 1, H) for n in states}}, [B]))
        same(found["y"], layer(ROWS[:, :1])[0][:, 0])


@row("tensorboard: add_graph of a model", needs=["tensorboard"])
def _(library: Library) -> None:
    writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
    with tempfile.TemporaryDirectory() as folder:
        for kind in LAYERS:
            with writer(folder) as made:
                made.add_graph(library.model(kind), X)
