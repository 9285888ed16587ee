"""The providers of a training step: one model, its frozen weights shared, adapted by PEFT, by this library, or not at all."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import bidora_kernels as bk

from . import oracle
from .cases import DTYPES, StepCase
from .graphs import GRAPHS, GraphedGradients
from .peers import BACKENDS, backend_context, need_backend, need_package, ours
from .plain_function import plain_function
from .timing import Candidate

# relative error of a loss, and of the gradients of all layers together: a layer's tolerance, accumulated through the depth
TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (3e-2, 1e-1)}
LEARNING_RATE = 1e-4
BATCHES = 4
TARGETS = {
    "roberta": {
        "all-linear": r".*encoder\.layer\.\d+\..*(query|key|value|dense)",
        "q+v": r".*encoder\.layer\.\d+\..*(query|value)",
    },
    "llama": {"all-linear": r".*layers\.\d+\..*_proj", "q+v": r".*layers\.\d+\..*(q_proj|v_proj)"},
}
Batch = dict[str, Tensor]
Model = Any  # an nn.Module whose layers are reached by name


class Workbench:
    """A model with random frozen weights, batches, and one set of adapter values for every provider."""

    def __init__(self, case: StepCase, device: str) -> None:
        need_package("transformers")
        self.case, self.device = case, device
        self.family = case.model.split("-")[0]
        self.weight_dtype = DTYPES[case.dtype] if self.family == "llama" else torch.float32
        self.autocast = case.dtype != "fp32" and self.family != "llama"  # an encoder stays in fp32 under autocast
        torch.manual_seed(0)
        with torch.device(device):
            self.base: Model = self._build().to(self.weight_dtype).train()
        self.base.requires_grad_(False)
        self.targets = TARGETS[self.family][case.targets]
        self.heads = ["classifier"] if self.family == "roberta" else []
        self.batches = [self._batch(case.batch) for _ in range(BATCHES)]
        self.scaling = 2.0
        self.values = self._adapter_values()

    def _build(self) -> Model:
        case = self.case
        sizes: dict[str, Any] = {
            "hidden_size": case.hidden,
            "intermediate_size": case.intermediate,
            "num_hidden_layers": case.layers,
            "num_attention_heads": case.heads,
        }
        if self.family == "llama":
            from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
            from transformers.integrations.sdpa_attention import sdpa_attention_forward

            model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=32000 if case.hidden > 512 else 512, use_cache=False))
            # no batch is padded. Named "sdpa", transformers computes with a mask while a CUDA graph is recorded, which it leaves
            # out otherwise
            AttentionInterface.register("sdpa_without_mask", sdpa_attention_forward)
            model.set_attn_implementation("sdpa_without_mask")
            return model
        from transformers import RobertaConfig, RobertaForSequenceClassification

        config = RobertaConfig(
            **sizes,
            vocab_size=50265 if case.hidden > 512 else 512,
            max_position_embeddings=max(514, case.sequence + 2),
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        return RobertaForSequenceClassification(config)

    def _batch(self, rows: int) -> Batch:
        ids = torch.randint(4, self.base.config.vocab_size, (rows, self.case.sequence), device=self.device)
        if self.family == "llama":
            return {"input_ids": ids, "labels": ids}
        batch = {"input_ids": ids, "labels": torch.arange(rows, device=self.device) % 2}
        if self.case.padding:
            spread = (torch.arange(rows, device=self.device) + torch.rand(rows, device=self.device)) / rows
            lengths = self.case.sequence * (1 - 2 * self.case.padding * spread)
            real = torch.arange(self.case.sequence, device=self.device) < lengths.ceil().unsqueeze(1)
            batch["attention_mask"], batch["input_ids"] = real.long(), ids.where(real, self.base.config.pad_token_id)
        return batch

    def batch_part(self, share: float) -> list[Batch]:
        """Batches of a share of the rows."""
        return [self._batch(max(1, round(self.case.batch * share))) for _ in range(BATCHES)]

    def _adapter_values(self) -> dict[str, oracle.Adapter]:
        """By layer name: factors with ||scaling B A|| of a third of ||W0||, magnitudes up to 20 % off the norms."""
        import re

        values = {}
        for name, module in self.base.named_modules():
            if isinstance(module, nn.Linear) and re.fullmatch(self.targets, name):
                n, k, r = module.out_features, module.in_features, self.case.r
                weight = module.weight.float()
                lora_A = torch.randn(r, k, device=self.device) / math.sqrt(k)
                lora_B = torch.randn(n, r, device=self.device) * float(weight.norm()) / math.sqrt(n * r) / 3 / self.scaling
                norm = (weight + self.scaling * lora_B @ lora_A).norm(dim=1)
                magnitude = norm * torch.empty(n, device=self.device).uniform_(0.8, 1.2)
                values[name] = oracle.Adapter(lora_A, lora_B, magnitude, self.scaling)
        return values

    def copy(self, dtype: torch.dtype | None = None) -> Model:
        """The model again: every frozen tensor shared, the head its own; or all of it in another dtype."""
        if dtype is not None:
            return copy.deepcopy(self.base).to(dtype)
        head = {id(p) for name in self.heads for p in self.base.get_submodule(name).parameters()}
        shared = {id(p): p for p in (*self.base.parameters(), *self.base.buffers()) if id(p) not in head}
        return copy.deepcopy(self.base, shared)

    def loss(self, model: Model, batch: Batch, autocast: bool = False) -> Tensor:
        """The mean loss of a batch, under autocast where the case or the provider says so."""
        with torch.autocast(self.device, torch.bfloat16) if self.autocast or autocast else contextlib.nullcontext():
            return model(**batch).loss

    @functools.cached_property
    def exact(self) -> dict[str, Any]:
        """Losses of the plain, LoRA and DoRA model on the first batch, and the DoRA gradients by layer, in fp64."""
        first = self.batches[0]
        found: dict[str, Any] = {}
        model = self.copy(torch.float64)
        with torch.no_grad():
            found["frozen"] = float(model(**first).loss)
            for name, a in self.values.items():
                model.get_submodule(name).weight.add_(a.scaling * a.lora_B.double() @ a.lora_A.double())
            found["lora"] = float(model(**first).loss)
        model = self.copy(torch.float64)
        bk.apply_dora(model, self.dora_config())
        self.fill_bidora(model)
        with bk.use_backend("reference"):
            loss = model(**first).loss
            loss.backward()
        found["dora"] = float(loss)
        layers = {name: model.get_submodule(name) for name in self.values}
        found["gradients"] = {
            part: torch.cat([getattr(layer, part).grad.flatten() for layer in layers.values()])
            for part in ("lora_A", "lora_B", "magnitude")
        }
        return found

    def dora_config(self) -> bk.DoraConfig:
        """This library's settings of the case."""
        return bk.DoraConfig(
            r=self.case.r,
            lora_alpha=self.scaling * self.case.r,
            target_modules=self.targets,
            modules_to_save=self.heads or None,
        )

    @torch.no_grad()
    def fill_bidora(self, model: nn.Module) -> None:
        """Write the adapter values into this library's layers."""
        for name, adapter in self.values.items():
            layer = model.get_submodule(name)
            for part in ("lora_A", "lora_B", "magnitude"):
                getattr(layer, part).copy_(getattr(adapter, part))


Parts = dict[str, list[Tensor]]


def frozen_model(bench: Workbench) -> tuple[Model, Parts]:
    """The floor: no adapters, the head trained, gradients flowing back to where the first adapters would sit."""
    model = bench.copy()

    def start_here(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output if output.requires_grad else output.requires_grad_()

    for name in bench.values:
        model.get_submodule(name).register_forward_hook(start_here)
    for name in bench.heads:
        model.get_submodule(name).requires_grad_(True)
    return model, {}


def outputs_not_kept(bench: Workbench) -> int:
    """Bytes of the adapted layers' outputs that the frozen model does not keep for its own backward pass.

    The magnitude's gradient needs every adapted layer's output: these are the ones that it alone keeps.
    """
    model, _ = frozen_model(bench)
    outputs: list[Tensor] = []  # held, so that no other tensor takes their place
    kept: set[int] = set()

    def pack(tensor: Tensor) -> Tensor:
        kept.add(tensor.untyped_storage().data_ptr())
        return tensor

    for name in bench.values:
        model.get_submodule(name).register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = bench.loss(model, bench.batches[0])
    del loss
    return sum(output.nbytes for output in outputs if output.untyped_storage().data_ptr() not in kept)


def peft_model(bench: Workbench, dora: bool, fp32: bool = False) -> tuple[Model, Parts]:
    """The model under PEFT, with the adapter values; adapters in the weights' dtype, or in fp32."""
    need_package("peft")
    import peft

    config = peft.LoraConfig(
        r=bench.case.r,
        lora_alpha=int(bench.scaling * bench.case.r),
        target_modules=bench.targets,
        modules_to_save=bench.heads or None,
        use_dora=dora,
        lora_dropout=0.0,
    )
    model: Model = peft.get_peft_model(bench.copy(), config, autocast_adapter_dtype=fp32)
    parts: Parts = {"lora_A": [], "lora_B": [], "magnitude": []}
    with torch.no_grad():
        for name, adapter in bench.values.items():
            layer = model.base_model.model.get_submodule(name)
            parameters = [layer.lora_A.default.weight, layer.lora_B.default.weight]
            parameters += [layer.lora_magnitude_vector.default.weight] if dora else []
            for part, parameter in zip(parts, parameters, strict=False):
                parameter.copy_(getattr(adapter, part))
                parts[part].append(parameter)
    return model, parts if dora else {}


def bidora_model(bench: Workbench) -> tuple[Model, Parts]:
    """The model with this library's layers."""
    model = bench.copy()
    bk.apply_dora(model, bench.dora_config())
    bench.fill_bidora(model)
    layers = [model.get_submodule(name) for name in bench.values]
    return model, {part: [getattr(layer, part) for layer in layers] for part in ("lora_A", "lora_B", "magnitude")}


class _PlainFunctionLinear(nn.Module):
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor

    def __init__(self, linear: nn.Linear, adapter: oracle.Adapter) -> None:
        super().__init__()
        self.weight, self.bias, self.scaling = linear.weight, linear.bias, adapter.scaling
        for name in ("lora_A", "lora_B", "magnitude"):
            setattr(self, name, nn.Parameter(getattr(adapter, name).clone()))

    def forward(self, x: Tensor) -> Tensor:
        return plain_function(x, self.weight, self.lora_A, self.lora_B, self.magnitude, self.scaling, self.bias)


def plain_function_model(bench: Workbench) -> tuple[Model, Parts]:
    """The model with the twenty-line function in its layers."""
    model = bench.copy()
    for name, adapter in bench.values.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, _PlainFunctionLinear(model.get_submodule(name), adapter))
    for name in bench.heads:
        model.get_submodule(name).requires_grad_(True)
    layers = [model.get_submodule(name) for name in bench.values]
    return model, {part: [getattr(layer, part) for layer in layers] for part in ("lora_A", "lora_B", "magnitude")}


def check_model(bench: Workbench, model: Model, parts: Parts, rule: str, autocast: bool = False) -> dict[str, float]:
    """Compare a model's loss, and its gradients where `parts` names the parameters, with the fp64 ones; leaves no gradient."""
    tolerance, gradient_tolerance = TOLERANCE[DTYPES[bench.case.dtype]]
    exact = bench.exact
    loss = bench.loss(model, bench.batches[0], autocast)
    errors = oracle.require({"loss": abs(float(loss.detach()) - exact[rule]) / abs(exact[rule])}, tolerance)
    if parts:
        flat = list(itertools.chain.from_iterable(parts.values()))
        grads = iter(torch.autograd.grad(loss, flat))
        gradient_errors = {}
        for part, parameters in parts.items():
            actual = torch.cat([next(grads).flatten().double() for _ in parameters])
            wanted = exact["gradients"][part]
            gradient_errors[part] = float((actual - wanted).norm() / wanted.norm())
        errors |= oracle.require(gradient_errors, gradient_tolerance)
    return errors


def trained(model: nn.Module) -> list[Tensor]:
    """The parameters that train."""
    return [p for p in model.parameters() if p.requires_grad]


def step_candidate(
    name: str,
    bench: Workbench,
    rule: str,
    build: Callable[[Workbench], tuple[Model, Parts]],
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    compiled: bool = False,
    autocast: bool = False,
    graphs: bool = False,
) -> Candidate:
    """One AdamW step on one batch.

    autocast: the forward pass runs under it, as the Trainer's does with bf16=True. graphs: forward and backward are one CUDA
    graph.
    """
    model, parts = build(bench)
    parameters = trained(model)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE) if parameters else None
    run: Model = torch.compile(model) if compiled else model
    graphed = GraphedGradients(lambda batch: bench.loss(run, batch, autocast)) if graphs else None

    def step(batch: Batch) -> None:
        for parameter in parameters:
            parameter.grad = None
        if graphed is None:
            bench.loss(run, batch, autocast).backward()
        else:
            for parameter, gradient in zip(parameters, graphed(batch, parameters), strict=True):
                parameter.grad = gradient
        if optimizer is not None:
            optimizer.step()

    def verify() -> dict[str, float]:
        with around():
            return check_model(bench, run, parts, rule, autocast)

    return Candidate(name, [functools.partial(step, batch) for batch in bench.batches], verify, around)


def _bidora(bench: Workbench, backend: str, compiled: bool = False, graphs: bool = False) -> Candidate:
    need_backend(backend, bench.device)
    name = ours(backend) + (", torch.compile" if compiled else "")
    around = functools.partial(backend_context, backend)
    with around():
        return step_candidate(name, bench, "dora", bidora_model, around, compiled, graphs=graphs)


def peft_steps(bench_case: StepCase) -> dict[str, Callable[[Workbench], Candidate]]:
    """The floor and PEFT's adapters, as one training step each."""
    found: dict[str, Callable[[Workbench], Candidate]] = {
        "frozen model": lambda b: step_candidate("frozen model", b, "frozen", frozen_model),
        "PEFT LoRA": lambda b: step_candidate("PEFT LoRA", b, "lora", lambda b: peft_model(b, dora=False)),
        "PEFT DoRA": lambda b: step_candidate("PEFT DoRA", b, "dora", lambda b: peft_model(b, dora=True)),
    }
    if torch.cuda.is_available():
        for peer, rule in (("PEFT LoRA", "lora"), ("PEFT DoRA", "dora")):
            build = functools.partial(peft_model, dora=rule == "dora")
            found[peer + GRAPHS] = functools.partial(step_candidate, peer, rule=rule, build=build, graphs=True)
    if bench_case.model.startswith("llama"):
        name = "PEFT DoRA, fp32 adapters"
        found[name] = lambda b: step_candidate(name, b, "dora", lambda b: peft_model(b, dora=True, fp32=True), autocast=True)
    return found


def step_providers(case: StepCase) -> dict[str, Callable[[Workbench], Candidate]]:
    """Every provider of a training step by name, the floor first."""
    found = peft_steps(case)
    found["plain function"] = lambda b: step_candidate("plain function", b, "dora", plain_function_model)
    for backend in BACKENDS:
        found[ours(backend)] = functools.partial(_bidora, backend=backend)
        if torch.cuda.is_available() and backend == "triton":
            found[ours(backend) + GRAPHS] = functools.partial(_bidora, backend=backend, graphs=True)
    if case.model.startswith("llama") and case.hidden > 512:
        found[ours("reference") + ", torch.compile"] = functools.partial(_bidora, backend="reference", compiled=True)
    return found
