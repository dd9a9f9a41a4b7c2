"""A causal language model whose LoRA adapters alone train, padded and checkpointed."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from kd_balance.soft_losses import GeneralizedJSD
from kd_balance.top_k import TopK

peft = pytest.importorskip("peft", reason="peft is not installed")
transformers = pytest.importorskip("transformers", reason="transformers is not installed")

WORDS, BATCH, LENGTH = 23, 3, 6


def student():
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(  # whose norms stay in float64
        transformers.GPT2Config(
            vocab_size=WORDS, n_embd=16, n_layer=2, n_head=2, n_positions=LENGTH, use_cache=False,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )
    adapters = peft.LoraConfig(
        r=2, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, adapters).double()
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.1)
    model.gradient_checkpointing_enable()
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    return model.train()


def draw(generator):
    """Token ids, their mask and labels, padded at different lengths."""
    ids = torch.randint(WORDS, (BATCH, LENGTH), generator=generator)
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [4], [5]])
    return {
        "input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)
    }


class Table(nn.Module):
    """Weights that are parameters: a pair for each predicted token."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(0.3 + 0.4 * torch.rand(BATCH * (LENGTH - 1), 2).double())

    def forward(self, features):
        return self.weights


def meta_loss(model, batch):
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:].flatten()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, ignore_index=-100)


def run(unroll, nudge=None, engine=None, sparse=False):
    model = student()
    criterion = WeightedKDLoss(
        Table(), temperature=2.0, class_dim=-1, soft_loss=GeneralizedJSD(0.3) if sparse else None
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02, eps=1e-3)  # smooth where a gradient is small
    generator = torch.Generator().manual_seed(1)
    steps, meta = [draw(generator) for _ in range(unroll)], draw(generator)
    meta_loss(model, draw(generator)).backward()
    optimizer.step()
    if nudge is not None:
        criterion.weight_net.weights.data += nudge
    if engine:
        optimizer = BilevelOptimizer(
            optimizer, model, criterion, [meta], engine=engine, unroll=unroll, every=unroll
        )
    for batch in steps:
        teacher = 3 * torch.randn(BATCH, LENGTH, WORDS, generator=generator).double()
        if sparse:
            teacher = TopK(*(x[:, :-1] for x in teacher.log_softmax(-1).topk(4)))
        else:
            teacher = teacher[:, :-1]
        optimizer.zero_grad()
        given = {key: batch[key] for key in ("input_ids", "attention_mask")}
        logits = model(**given).logits
        criterion(logits[:, :-1], teacher, batch["labels"][:, 1:]).backward()
        optimizer.step()
    if engine:
        return criterion.weight_net.weights.grad
    with torch.no_grad():
        return meta_loss(model, meta).item()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("unroll", [1, 2])
@pytest.mark.parametrize("engine", ["adjoint", "unroll"])
def test_the_hypergradient_is_the_finite_difference(engine, unroll, sparse):
    hypergradient = run(unroll, engine=engine, sparse=sparse)
    direction = torch.randn(hypergradient.shape, generator=torch.Generator().manual_seed(2))

    def difference(h):
        up, down = (run(unroll, s * h * direction.double(), sparse=sparse) for s in (1, -1))
        return (up - down) / (2 * h)

    expected = (4 * difference(1e-3) - difference(2e-3)) / 3
    assert (hypergradient * direction).sum().item() == pytest.approx(expected, rel=1e-5)


def test_a_base_in_bfloat16_under_adapters_in_float32():
    """Nearly the hypergradient of the same base in float32."""
    found = []
    for base in (torch.bfloat16, torch.float32):
        model = student().to(torch.bfloat16)
        for param in model.parameters():
            param.data = param.data.to(torch.float32 if param.requires_grad else base)
        base_model = model.get_base_model()
        assert base_model.lm_head.weight is base_model.transformer.wte.weight  # tied
        trained = [p for p in model.parameters() if p.requires_grad]
        assert {p.dtype for p in trained} == {torch.float32}
        before = [p.clone() for p in model.parameters() if not p.requires_grad]
        criterion = WeightedKDLoss(Table().float(), temperature=2.0)
        generator = torch.Generator().manual_seed(1)
        steps, meta = [draw(generator) for _ in range(2)], draw(generator)
        optimizer = BilevelOptimizer(
            torch.optim.SGD(trained, lr=0.5, momentum=0.9), model, criterion, [meta],
            unroll=2, every=2,
        )
        for batch in steps:
            teacher = 3 * torch.randn(BATCH, LENGTH, WORDS, generator=generator)
            optimizer.zero_grad()
            given = {key: batch[key] for key in ("input_ids", "attention_mask")}
            logits = model(**given).logits
            criterion(logits[:, :-1], teacher[:, :-1], batch["labels"][:, 1:]).backward()
            optimizer.step()
        assert optimizer.metrics["meta_updates"] == 1
        assert optimizer.metrics["skipped_updates"] == 0
        frozen = [p for p in model.parameters() if not p.requires_grad]
        torch.testing.assert_close(frozen, before, rtol=0, atol=0)
        found.append(criterion.weight_net.weights.grad)
    coarse, fine = found
    assert ((coarse - fine).norm() / fine.norm()).item() < 0.1


class Adapted(nn.Module):
    """Two frozen layers with adapters, one behind the other."""

    def __init__(self, layers):
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.ModuleList(layers)
        self.down = nn.ModuleList(nn.Linear(64, 2, bias=False) for _ in layers)
        self.up = nn.ModuleList(nn.Linear(2, 64, bias=False) for _ in layers)

    def forward(self, inputs):
        for base, down, up in zip(self.base, self.down, self.up):
            inputs = torch.tanh(base(inputs) + up(down(inputs)))
        return inputs


@pytest.mark.parametrize("engine", ["adjoint", "unroll"])
def test_a_base_of_four_bits_is_that_of_the_weights_that_it_stands_for(engine):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    quantised = [
        bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32).to("cpu")
        for _ in range(2)
    ]
    plain = [nn.Linear(64, 64, bias=False) for _ in quantised]
    for layer, stored in zip(plain, quantised):
        weight = bitsandbytes.functional.dequantize_4bit(stored.weight, stored.weight.quant_state)
        layer.weight.data.copy_(weight)
    found = []
    for layers in (quantised, plain):
        model = Adapted(layers)
        model.base.requires_grad_(False)
        criterion = WeightedKDLoss(MetaWeightNet())
        trained = [p for p in model.parameters() if p.requires_grad]
        generator = torch.Generator().manual_seed(1)
        draws = [torch.randn(8, 64, generator=generator) for _ in range(5)]
        labels = torch.randint(64, (8,), generator=generator)
        optimizer = BilevelOptimizer(
            torch.optim.SGD(trained, lr=1.0, momentum=0.9), model, criterion, [(draws[4], labels)],
            engine=engine, unroll=2, every=2,
        )
        for inputs, teacher in (draws[:2], draws[2:4]):
            optimizer.zero_grad()
            criterion(model(inputs), teacher, labels).backward()
            optimizer.step()
        found.append(torch.cat([p.grad.flatten() for p in criterion.phi]))
    assert ((found[0] - found[1]).norm() / found[1].norm()).item() < 1e-5
