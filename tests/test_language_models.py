"""Tokens: shifted, padded and packed, counted over micro-batches, weighted by token or sequence."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kd_balance import BilevelOptimizer, MetaWeightNet, WeightedKDLoss
from kd_balance.check import check_hypergradient
from tests.habits import assert_one_sentence

WORDS, LENGTH, T = 7, 6, 2.0
FEATURES = (  # none depends on the student, which features count as constants to
    "teacher_ce", "teacher_probability", "teacher_entropy", "position", "given.domain"
)


class Language(nn.Module):
    """[B, L] to [B, L, V], causal, its embedding tied to its head."""

    def __init__(self):
        super().__init__()
        self.embed, self.body = nn.Embedding(WORDS, 5), nn.Linear(5, 5)

    def forward(self, tokens):
        seen = self.embed(tokens).cumsum(1) / torch.arange(1, 1 + tokens.shape[1]).view(-1, 1)
        return torch.tanh(self.body(seen)) @ self.embed.weight.T


def draw(generator, rows=3):
    """Tokens, labels with padding, the places of packed sequences, the rows' domains, a teacher."""
    tokens = torch.randint(WORDS, (rows, LENGTH), generator=generator)
    lengths = torch.randint(3, LENGTH + 1, (rows, 1), generator=generator)
    places = torch.tensor([0, 1, 2, 0, 1, 2]).expand(rows, -1)
    domain = torch.rand(rows, generator=generator).double()
    teacher = 3 * torch.randn(rows, LENGTH, WORDS, generator=generator).double()
    labels = tokens.masked_fill(torch.arange(LENGTH) >= lengths, -100)
    return tokens, labels, places, domain, teacher


def shifted(criterion, student, batch):
    tokens, labels, _, domain, teacher = batch
    given = {"domain": domain}
    return criterion(student(tokens)[:, :-1], teacher[:, :-1], labels[:, 1:], given=given)


def packed(criterion, student, batch):
    tokens, labels, places, domain, teacher = batch
    labels = labels.masked_fill(places == 0, -100)  # that no sequence predicts
    return criterion(
        student(tokens)[:, :-1], teacher[:, :-1], labels[:, 1:],
        sequences=(places == 0).cumsum(1)[:, :-1], given={"domain": domain},
    )


def flattened(criterion, student, batch):
    tokens, labels, places, domain, teacher = batch
    labels = labels.masked_fill(places == 0, -100)[:, 1:].reshape(-1)
    logits, teacher = (x[:, :-1].reshape(-1, WORDS) for x in (student(tokens), teacher))
    sequences = (places == 0).flatten().cumsum(0).view(-1, LENGTH)[:, :-1].reshape(-1)
    domain = domain.view(-1, 1).expand(-1, LENGTH - 1).reshape(-1)
    return criterion(logits, teacher, labels, sequences=sequences, given={"domain": domain})


CALLS = {  # the call, settings, whether a row holds two sequences
    "tokens": (shifted, {}, False),
    "sequences": (shifted, {"per": "sequence"}, False),
    "packed": (packed, {"per": "sequence"}, True),
    "packed tokens": (packed, {"class_dim": -1}, True),
    "flattened": (flattened, {"per": "sequence"}, True),
    "counted": (shifted, {"reduction": "sum", "per": "sequence"}, False),
}


def weight_net():
    torch.manual_seed(3)
    return MetaWeightNet(FEATURES, hidden=(4,)).double()


def micro_batches(name, batch):
    """Two of unequal numbers of tokens where these are counted, else one."""
    if name != "counted":
        return [batch]
    return [tuple(x[:1] for x in batch), tuple(x[1:] for x in batch)]


def by_hand(name, net, student, batch):
    """The mean loss of all tokens, sequence by sequence, in a program of its own."""
    _, settings, two = CALLS[name]
    total, count = 0, 0
    for tokens, labels, _, domain, teacher in zip(*batch):
        logits = student(tokens[None])[0]
        for start in (0, 3) if two else (0,):
            end = start + 3 if two else LENGTH
            at = [i for i in range(start, end - 1) if labels[i + 1] >= 0]
            if not at:
                continue
            q, p = logits[at].log_softmax(-1), teacher[at].log_softmax(-1)
            label = labels[[i + 1 for i in at]].unsqueeze(1)
            ce = -p.gather(1, label).squeeze(1)
            features = torch.stack((
                ce, (-ce).exp(), -(p.exp() * p).sum(1),
                torch.tensor([1.0 + i - start for i in at]).double().log(),
                domain.expand(len(at)),
            ), 1)
            if settings.get("per") == "sequence":
                features = features.mean(0, keepdim=True).expand(len(at), -1)
            weights = net.layers(features)
            soft, teacher_soft = (logits[at] / T).log_softmax(-1), (teacher[at] / T).softmax(-1)
            kl = (teacher_soft * (teacher_soft.log() - soft)).sum(1) * T**2
            total = total + (weights[:, 0] * -q.gather(1, label).squeeze(1)).sum()
            total = total + (weights[:, 1] * kl).sum()
            count += len(at)
    return total / count


def meta_loss(student, meta):
    tokens, labels = meta
    logits = student(tokens)[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100)


def start(seed=0):
    torch.manual_seed(seed)
    student = Language().double()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-2)
    generator = torch.Generator().manual_seed(1)
    return student, optimizer, generator, draw(generator, rows=5)[:2]


def reference(name, steps, move):
    """The meta loss after steps by hand, φ moved."""
    student, optimizer, generator, meta = start()
    net = weight_net()
    with torch.no_grad():
        for param, part in zip(net.parameters(), move):
            param += part
    for _ in range(steps):
        optimizer.zero_grad()
        by_hand(name, net, student, draw(generator)).backward()
        optimizer.step()
    with torch.no_grad():
        return meta_loss(student, meta).item()


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", CALLS)
def test_the_hypergradient_is_the_finite_difference(name, steps):
    call, settings, _ = CALLS[name]
    found = []
    for engine in ("adjoint", "unroll"):
        student, optimizer, generator, meta = start()
        criterion = WeightedKDLoss(weight_net(), temperature=T, **settings)
        optimizer = BilevelOptimizer(
            optimizer, student, criterion, [meta], engine=engine, unroll=steps, every=steps
        )
        for _ in range(steps):
            optimizer.zero_grad()
            batch = draw(generator)
            items = (batch[1][:, 1:] >= 0).sum()
            for part in micro_batches(name, batch):
                loss = call(criterion, student, part)
                (loss / items if name == "counted" else loss).backward()
            optimizer.step()
        found.append([p.grad for p in criterion.phi])
    torch.manual_seed(4)
    direction = [torch.randn_like(part) for part in found[0]]

    def difference(h):
        up, down = (reference(name, steps, [s * h * d for d in direction]) for s in (1, -1))
        return (up - down) / (2 * h)

    expected = (4 * difference(1e-3) - difference(2e-3)) / 3
    for hypergradient in found:
        along = sum((h * d).sum().item() for h, d in zip(hypergradient, direction))
        assert along == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("per", ["position", "sequence"])
def test_the_check_passes_with_features_of_the_student(per):
    student, optimizer, generator, meta = start()
    net = MetaWeightNet(("student_ce", "kl", "position"), mean=0.5).double()
    criterion = WeightedKDLoss(net, per=per)
    optimizer = BilevelOptimizer(optimizer, student, criterion, [meta], unroll=2, every=2)

    def step(batch):
        optimizer.zero_grad()
        shifted(criterion, student, batch).backward()
        optimizer.step()

    batches = [draw(generator) for _ in range(8)]
    assert check_hypergradient(optimizer, step, batches).error < 1e-7


def logits_and_labels():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, LENGTH, WORDS).unbind()
    return student, teacher, torch.randint(WORDS, (2, LENGTH))


def test_a_sequence_weighs_the_same_padded_packed_or_alone():
    student, teacher, labels = logits_and_labels()
    torch.manual_seed(1)
    net = MetaWeightNet(("student_ce", "teacher_entropy", "position"))
    criterion = WeightedKDLoss(net, per="sequence", reduction="none")
    expected, weights = [], []
    for row, end in ((0, LENGTH), (1, 4)):
        parts = (x[row:row + 1, :end] for x in (student, teacher, labels))
        expected.append(criterion(*parts).flatten())
        weights.append(criterion.weights[0])
        assert criterion.weights.equal(criterion.weights[:1].expand(end, -1))
    assert not torch.allclose(*weights)

    ignored = labels.clone()
    ignored[1, 4:] = -100
    result = criterion(student, teacher, ignored)
    torch.testing.assert_close(result[0], expected[0])
    torch.testing.assert_close(result[1, :4], expected[1])
    assert not result[1, 4:].any() and not criterion.weights[-2:].any()

    row = [torch.cat((x[:1], x[1:, :4]), 1) for x in (student, teacher, labels)]
    sequences = torch.tensor([[8] * LENGTH + [3] * 4])
    torch.testing.assert_close(criterion(*row, sequences=sequences)[0], torch.cat(expected))
    flat = [x.flatten(0, 1) for x in row]
    result = criterion(*flat, sequences=sequences[0])
    torch.testing.assert_close(result, torch.cat(expected))


def test_neighbouring_rows_of_the_same_number_are_two_sequences():
    student, teacher, labels = logits_and_labels()
    net = MetaWeightNet(("student_ce", "position"))
    criterion = WeightedKDLoss(net, per="sequence")
    expected = criterion(student, teacher, labels)
    actual = criterion(student, teacher, labels, sequences=torch.zeros_like(labels))
    torch.testing.assert_close(actual, expected)


def test_a_weight_for_each_image_or_row_too():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, WORDS, 2, 2).unbind()
    criterion = WeightedKDLoss(MetaWeightNet(), per="sequence")
    criterion(student, teacher, torch.randint(WORDS, (3, 2, 2)))
    weights = criterion.weights.view(3, 4, 2)
    assert weights.equal(weights[:, :1].expand(-1, 4, -1))
    assert not torch.allclose(weights[0], weights[1])


def test_the_dimension_of_classes_is_found():
    student, teacher, labels = logits_and_labels()
    expected = WeightedKDLoss(class_dim=-1)(student, teacher, labels)
    torch.testing.assert_close(WeightedKDLoss()(student, teacher, labels), expected)
    student, teacher = student.mT, teacher.mT
    torch.testing.assert_close(WeightedKDLoss()(student, teacher, labels), expected)
    square = [x[:, :, :LENGTH] for x in (student.mT, teacher.mT)]
    with pytest.raises(ValueError, match="dimension 1 or 2 .*class_dim=-1") as error:
        WeightedKDLoss()(*square, labels % LENGTH)
    assert_one_sentence(error)
    WeightedKDLoss(class_dim=-1)(*square, labels % LENGTH)


REFUSED = {  # (features, settings, what the call is given, the words)
    "flat without sequences": ({"per": "sequence"}, {}, "leave logits and targets unflattened"),
    "a position of nothing": ({"features": ("position",)}, {}, "give the call sequences="),
    "sequences of another length": (
        {"per": "sequence"}, {"sequences": torch.zeros(LENGTH, dtype=torch.long)}, "cut them as",
    ),
    "sequences that are no integers": (
        {"per": "sequence"}, {"sequences": torch.zeros(2 * LENGTH)}, "expected integers",
    ),
    "nothing given": ({"features": ("given.domain",)}, {}, "given={'domain': …}"),
    "given of another length": (
        {"features": ("given.domain",)}, {"given": {"domain": torch.zeros(3)}}, "one number for",
    ),
    "probabilities of tokens": ({"targets": "probabilities"}, {}, "class_dim=-1"),
    "labels that are not cut": ({"targets": "whole"}, {}, "cut both alike"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_in_one_sentence(what):
    settings, given, words = copy.copy(REFUSED[what])
    settings = dict(settings)
    features, targets = settings.pop("features", ("student_ce",)), settings.pop("targets", None)
    student, teacher, labels = logits_and_labels()
    if targets == "probabilities":
        labels = F.one_hot(labels, WORDS).float()
    elif targets == "whole":
        student, teacher = student[:, :-1], teacher[:, :-1]
    else:
        student, teacher, labels = (x.flatten(0, 1) for x in (student, teacher, labels))
    criterion = WeightedKDLoss(MetaWeightNet(features), **settings)
    with pytest.raises(ValueError, match=words.replace("{", r"\{").replace("}", r"\}")) as error:
        criterion(student, teacher, labels, **given)
    assert_one_sentence(error)


def test_an_unknown_unit_of_weights_is_refused():
    with pytest.raises(ValueError, match="'position' or 'sequence'"):
        WeightedKDLoss(per="token")


def test_hugging_face_divides_by_the_items_of_all_micro_batches(tmp_path, monkeypatch):
    """Two micro-batches of different numbers of tokens are one batch of both."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    from kd_balance.integrations.huggingface import BilevelTrainer

    class DistillationTrainer(BilevelTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
            teacher = teacher_of(inputs["input_ids"][:, :-1])
            return self.criterion(logits, teacher, inputs["labels"][:, 1:]) / num_items_in_batch

    def teacher_of(tokens):
        return 3 * torch.eye(WORDS, dtype=torch.float64)[(tokens + 1) % WORDS]

    def student():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=WORDS, n_embd=4, n_layer=1, n_head=1, n_positions=LENGTH, resid_pdrop=0.0,
            embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False, bos_token_id=0, eos_token_id=0,
        )).double()

    tokens = torch.randint(WORDS, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    labels = tokens.masked_fill(torch.arange(LENGTH) >= torch.tensor([[6], [5], [2], [3]]), -100)
    labels[:, 0] = -100  # which is no target, and Trainer counts it
    rows = [{"input_ids": t, "labels": y} for t, y in zip(tokens, labels)]
    meta = [{"input_ids": tokens, "labels": labels}]
    settings = {"every": 1, "unroll": 1}

    torch.manual_seed(3)
    criterion = WeightedKDLoss(MetaWeightNet().double(), reduction="sum")
    trainer = DistillationTrainer(
        student(),
        transformers.TrainingArguments(
            output_dir=tmp_path, use_cpu=True, report_to="none", disable_tqdm=True, max_steps=1,
            per_device_train_batch_size=2, gradient_accumulation_steps=2, optim="sgd",
            learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0, save_strategy="no",
            train_sampling_strategy="sequential",
        ),
        train_dataset=rows, criterion=criterion, meta_loader=meta, bilevel=settings,
    )
    trainer.train()

    model = student()
    torch.manual_seed(3)
    whole = WeightedKDLoss(MetaWeightNet().double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer = BilevelOptimizer(optimizer, model, whole, meta, **settings)
    logits = model(input_ids=tokens).logits[:, :-1]
    whole(logits, teacher_of(tokens[:, :-1]), labels[:, 1:]).backward()
    optimizer.step()
    torch.testing.assert_close(
        [*trainer.model.parameters()], [*model.parameters()], rtol=1e-9, atol=1e-12
    )
    found = [[p.grad for p in c.phi] for c in (criterion, whole)]
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-12)
